"""Gates trained on made-up rows, where it is known which row is right and when."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from mrss_provider.engine.gate_file import SHAPES, load_gate
from mrss_provider.errors import FileFormatError, InvalidRequestError
from mrss_provider.model import ModelConfig
from mrss_provider.tune.gate_data import GateData
from mrss_provider.tune.gate_files import gate_path, save_gate
from mrss_provider.tune.gate_report import best_fixed_weights, bootstrap, report_gate
from mrss_provider.tune.gate_training import GateConfig, gated_log_probs, split, train_gate

CONFIG = GateConfig(epochs=40, batch_size=256)
MODEL = ModelConfig(7, 2, 128, 2, 64, 320, 256, "fp32", "a" * 64, "tiny")


def toy(num_documents=60, *, seed=0, states=2, told=True):
    """Texts of 20 tokens: one state, by chance, is right, and its margin says so if `told`."""
    gen = torch.Generator().manual_seed(seed)
    num = 20 * num_documents
    right = torch.randint(states, (num,), generator=gen)
    is_right = torch.nn.functional.one_hot(right, states).bool()
    features = torch.randn(num, states, 5, generator=gen)
    if told:
        features[..., 2] += torch.where(is_right, 3.0, 0.0)
    log_probs = torch.where(is_right, -0.1, -3.0)
    document = torch.arange(num_documents).repeat_interleave(20)
    return GateData(torch.full((states,), 1 / states), features, log_probs, document)


def nll(data, tensors):
    return report_gate(tensors, data, data).nll


@pytest.mark.parametrize("states", [2, 4])
def test_training_finds_which_row_is_right_on_texts_it_never_saw(states):
    result = train_gate(toy(states=states), CONFIG)
    report = report_gate(result.tensors, toy(states=states), toy(seed=1, states=states))
    # The best that a gate can do is 0.1 nats, the best fixed weights log K and more.
    assert report.nll["learned"] < 0.35 < report.nll["fixed"]
    assert report.over_fixed.low > 0.2
    assert report.documents == 60
    assert report.tokens == 1200


def test_a_gate_trained_on_two_states_reads_four():
    result = train_gate(toy(states=2), CONFIG)
    report = report_gate(result.tensors, toy(states=4), toy(seed=1, states=4))
    assert report.nll["learned"] < report.nll["fixed"] - 0.2


def test_a_network_with_a_silent_last_layer_is_the_named_weights():
    data = toy()
    tensors = train_gate(data, GateConfig(epochs=1)).tensors
    tensors["score.weight"] = torch.zeros(16)
    got = nll(data, tensors)
    assert got["learned"] == pytest.approx(got["named"], abs=1e-6)


def test_the_same_seed_gives_the_same_numbers_and_another_one_does_not():
    first, again, other = (
        train_gate(toy(), GateConfig(epochs=3, seed=seed)).tensors for seed in (1, 1, 2)
    )
    for name in SHAPES:
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["hidden.weight"], other["hidden.weight"])


def test_training_stops_when_the_stopping_part_no_longer_gains():
    told = []
    config = GateConfig(epochs=200, patience=3, learning_rate=0.05)
    noise = toy(num_documents=12, told=False)
    result = train_gate(noise, config, on_epoch=lambda *said: told.append(said))
    assert [number for number, _ in told] == list(range(1, result.epochs + 1))
    assert result.epochs < 200
    named = -float(gated_log_probs(noise, torch.zeros(len(noise.document), 2)).mean())
    assert result.stop_nll <= named + 0.2


def test_a_strong_prior_keeps_the_gate_at_the_named_weights():
    data = toy()
    free, held = (
        nll(data, train_gate(data, GateConfig(epochs=30, prior_strength=mu)).tensors)
        for mu in (0.0, 1e4)
    )
    assert free["learned"] < 0.4
    assert held["learned"] == pytest.approx(held["named"], abs=0.02)


@pytest.mark.parametrize("states", [2, 3])
def test_the_best_fixed_weights_are_better_than_any_of_a_grid(states):
    data = toy(states=states)
    data.log_probs[::3, 0] = -0.01
    best = best_fixed_weights(data)
    assert float(best.sum()) == pytest.approx(1, abs=1e-6)
    probs = data.log_probs.double().exp()
    least = -(probs @ best.double()).log().mean()
    steps = torch.linspace(0, 1, 21, dtype=torch.float64)
    grid = torch.cartesian_prod(*[steps] * states)
    grid = grid[(grid.sum(-1) - 1).abs() < 1e-9]
    assert least <= -(probs @ grid.T).log().mean(0).min() + 1e-9


def test_an_interval_is_by_texts_and_narrows_with_their_number():
    gen = torch.Generator().manual_seed(0)

    def interval(num, tokens):
        document = torch.arange(num).repeat_interleave(tokens)
        of_text = torch.randn(num, generator=gen, dtype=torch.float64) + 1
        return bootstrap(of_text[document], document, seed=3)

    few, many, longer = interval(50, 4), interval(800, 4), interval(50, 64)
    for found in (few, many, longer):
        assert found.low < found.mean < found.high
        assert found.low < 1.4
        assert found.high > 0.6
    assert many.high - many.low == pytest.approx((few.high - few.low) / 4, rel=0.4)
    # More tokens of the same texts are no more evidence.
    assert longer.high - longer.low > 0.6 * (few.high - few.low)


def test_documents_are_parted_whole_by_the_seed():
    larger, smaller = split(10, 0.2, seed=0)
    assert sorted(larger + smaller) == list(range(10))
    assert len(smaller) == 2
    assert split(10, 0.2, seed=0) == (larger, smaller)
    assert split(2, 0.01, seed=0)[1]
    with pytest.raises(InvalidRequestError, match="cannot be parted"):
        split(1, 0.2, seed=0)


def test_too_few_texts_are_refused():
    with pytest.raises(InvalidRequestError, match="10 texts or more, got 9"):
        train_gate(toy(num_documents=9), CONFIG)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"learning_rate": float("nan")},
        {"prior_strength": -1.0},
        {"stop_share": 1.0},
    ],
)
def test_values_that_cannot_work_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(InvalidRequestError, match=name):
        GateConfig(**bad)


def test_a_saved_gate_loads_for_its_model_with_its_provenance(tmp_path):
    data = toy()
    result = train_gate(data, CONFIG)
    # Of so few texts an interval has no ends.
    report = report_gate(result.tensors, data, toy(seed=1).part([0, 1, 2]))
    assert math.isinf(report.over_fixed.low)
    states = SimpleNamespace(name="tone", sha256="b" * 64), None
    path = gate_path(tmp_path, "mine")
    save_gate(
        path,
        result,
        report,
        data,
        model=MODEL,
        mixture=SimpleNamespace(canonical="knowledge+tone", states=states),
        config=CONFIG,
        data_sha256="c" * 64,
        licence="MIT",
    )
    assert path == tmp_path / "gates/mine.safetensors"
    gate = load_gate(path, MODEL, name="mine")
    about = gate.metadata
    assert about.states == {"tone": "b" * 64}
    assert about.licence == "MIT"
    assert about.training["tokens"] == 1200
    assert about.training["data_sha256"] == "c" * 64
    assert about.training["held_out"]["nll"] == {
        name: pytest.approx(value, abs=1e-4) for name, value in report.nll.items()
    }
    assert [p.name for p in path.parent.iterdir()] == ["mine.safetensors"]
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["training"], parse_constant=pytest.fail)
        assert told["held_out"]["over_fixed"]["low"] is None
        assert json.loads(file.metadata()["base_model"])["sha256"] == MODEL.fingerprint


def test_a_gate_that_cannot_be_written_says_so(tmp_path):
    data = toy(num_documents=10)
    result = train_gate(data, GateConfig(epochs=1))
    report = report_gate(result.tensors, data, data)
    (tmp_path / "gates").write_text("a file")
    with pytest.raises(FileFormatError, match="cannot be written"):
        save_gate(
            gate_path(tmp_path, "mine"),
            result,
            report,
            data,
            model=MODEL,
            mixture=SimpleNamespace(canonical="x", states=()),
            config=CONFIG,
            data_sha256="",
        )
