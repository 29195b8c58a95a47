"""Whole runs on the tiny model: gone on with exactly, ended in time, inside and after mixtures."""

import json
import math
import pickle
import random
from dataclasses import replace

import pytest
import torch
from tiny_model import TINY, checkpoint
from tiny_model import Shape as TinyShape

from mrss_provider.engine.gates import make_gate
from mrss_provider.engine.merges import Rows, make_merge
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.errors import ConflictError, FileFormatError, InvalidRequestError
from mrss_provider.mixture import parse_method
from mrss_provider.model import TunedState
from mrss_provider.tune import Example, TuneConfig, TuneJob, tune_states
from mrss_provider.tune.chats import Line
from mrss_provider.tune.learner import Learner
from mrss_provider.tune.network import Shape, forward, logits, start_state
from mrss_provider.tune.rates import RateTrial, best_rate, sweep
from mrss_provider.tune.run_file import Record, Unfinished, load_run, run_path, save_run
from mrss_provider.tune.surprise import mark_surprising
from mrss_provider.tune.token_loss import Beside, FrozenRows, Imitation, nll
from mrss_provider.tune.training import Plan, Training


@pytest.fixture(scope="module")
def weights():
    return checkpoint()


def example(first, size=6):
    ids = tuple((first + 7 * i) % 300 for i in range(size))
    return Example(ids, (False,) + (True,) * (size - 1), (False,) * size)


def batch_of(step):
    return [example(random.Random(f"{step}/{i}").randrange(4)) for i in range(2)]


HELD_OUT = [[example(0), example(1)]]


def config(**changes):
    usual = {"steps": 6, "batch_size": 2, "learning_rate": 0.3, "warmup_steps": 1, "max_len": 16}
    return TuneConfig(**usual | changes)


def run_of(weights, settings, *, patience=0, held_out=HELD_OUT, eval_every=2, record=None):
    learner = Learner(weights, [settings], [None])
    plan = Plan(settings.steps, eval_every, patience)
    return Training(learner, batch_of, held_out, plan, record or Record(), {})


@pytest.mark.parametrize("offsets", [False, True])
def test_a_run_that_was_left_ends_bit_for_bit_as_one_that_was_not(tmp_path, weights, offsets):
    settings = config(offsets=offsets)
    whole = run_of(weights, settings)
    whole.run()

    part = run_of(weights, settings)
    path = run_path(tmp_path / "x.safetensors")
    said = {"seed": 1, "files": ["a"]}

    def save():
        save_run(path, Unfinished(said, {}, part.record, part.learner.snapshot(), part.best))

    part.run(stop=lambda: part.record.step == 3, save=save)
    assert not part.is_done
    left = load_run(path, said)
    rest = run_of(weights, settings, record=left.record)
    rest.learner.restore(left.learner)
    rest.best = left.best
    rest.run()
    assert rest.record.losses == whole.record.losses
    assert rest.record.held_out == whole.record.held_out
    for name, tensor in whole.learner.snapshot().items():
        assert torch.equal(tensor, rest.learner.snapshot()[name]), name
    assert rest.record.best_step == whole.record.best_step


def test_a_run_goes_on_only_with_its_own_settings(tmp_path, weights):
    path = tmp_path / "x.safetensors.unfinished"
    with pytest.raises(ConflictError, match="no unfinished run"):
        load_run(path, {})
    save_run(path, Unfinished({"seed": 1, "steps": 4}, {}, Record(), {}, {}))
    with pytest.raises(ConflictError, match="seed was 1 and is 2; start anew"):
        load_run(path, {"seed": 2, "steps": 4})


@pytest.mark.parametrize(
    "content", [b"", b"no run", pickle.dumps([1], protocol=2), pickle.dumps({"format": "another"})]
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_no_run_is_one_sentence(tmp_path, content):
    path = tmp_path / "x.safetensors.unfinished"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"no unfinished run.*--force") as got:
        load_run(path, {})
    assert "\n" not in str(got.value)


def test_a_run_ends_when_the_held_out_loss_stops_falling_and_keeps_its_best(weights):
    # What is learnt says the opposite of what it is judged by.
    against = [[Example((0, 9, 9, 9, 9), (False,) + (True,) * 4, (False,) * 5)]]
    training = run_of(
        weights, config(steps=40, learning_rate=1.0), patience=2, held_out=against, eval_every=1
    )
    training.run()
    assert training.record.step < 40
    losses = dict(training.record.held_out)
    assert training.record.best_step == min(losses, key=losses.get)
    training.finish()
    assert training.learner.evaluate(against)[0] == pytest.approx(min(losses.values()), rel=1e-6)


def test_a_rate_that_is_far_too_low_is_not_chosen(weights):
    trials = sweep(
        weights, config(steps=8), batch_of, HELD_OUT, token_loss=nll, rates=(1e-4, 0.3, 1e-3)
    )
    assert [trial.rate for trial in trials] == [1e-4, 0.3, 1e-3]
    assert best_rate(trials) == 0.3
    assert trials[1].loss < trials[0].loss - 0.5


def test_a_rate_that_blew_up_is_told_in_json():
    told = json.dumps([RateTrial(3.0, math.inf).to_json(), RateTrial(0.3, 1.25).to_json()])
    assert told == '[{"rate": 3.0, "loss": null}, {"rate": 0.3, "loss": 1.25}]'


def test_offsets_are_learnt_beside_the_state_or_not_at_all(weights):
    learner = Learner(weights, [config(), config(offsets=True)], [None, None])
    learner.step(0, [[example(1)], [example(1)]])
    assert learner.time_offset(0) is None
    moved = learner.time_offset(1)
    assert moved.shape == (TINY.num_layers, TINY.hidden_size)
    assert moved.abs().max() > 0
    assert torch.equal(learner.offsets.values[0], torch.zeros_like(moved))


def test_what_is_gone_on_from_is_where_every_learner_and_trial_starts(weights):
    def started(initial, offset, settings):
        return Learner(weights, [settings], [initial], initial_offsets=[offset])

    settings = config(offsets=True)
    first = started(None, None, settings)
    for step in range(4):
        first.step(step, [batch_of(step)])
    state, offset = first.wkv(0), first.time_offset(0)
    again = started(state, offset, settings)
    assert torch.equal(again.wkv(0), state)
    assert torch.equal(again.time_offset(0), offset)
    wanted = first.evaluate(HELD_OUT)[0]
    assert again.evaluate(HELD_OUT)[0] == wanted
    # A rate of next to nothing leaves it where it is.
    still = config(offsets=True, steps=1, offset_rate=1e-9)
    (trial,) = sweep(
        weights,
        still,
        batch_of,
        HELD_OUT,
        token_loss=nll,
        rates=(1e-9,),
        initial=state,
        initial_offset=offset,
    )
    assert trial.loss == pytest.approx(wanted, abs=1e-6)
    job = TuneJob(lambda rng: example(1), still, state, offset)
    (result,) = tune_states(weights, [replace(job, config=replace(still, learning_rate=1e-9))])
    assert torch.allclose(result.wkv, state, atol=1e-6)
    assert torch.allclose(result.time_offset, offset, atol=1e-6)


def test_offsets_of_another_shape_are_refused(weights):
    with pytest.raises(InvalidRequestError, match=r"a part of shape \[1, 2\], where") as caught:
        Learner(weights, [config(offsets=True)], [None], initial_offsets=[torch.zeros(1, 2)])
    assert caught.value.param == "initial"


def test_surprising_tokens_are_facts_only_where_a_line_does_not_say(weights):
    silent = Line(1, "x", None, example(3, 12))
    told = Line(2, "x", (), example(5, 12))
    marked, kept = mark_surprising(weights, [silent, told], 0.3, 512)
    assert kept is told
    assert sum(marked.example.fact) == 3
    shape = Shape.of(weights)
    start = start_state(shape, torch.zeros(1, *shape.state_size), torch.float32)
    ids = torch.tensor([silent.example.token_ids])
    hidden, _ = forward(weights, ids[:, :-1], start)
    nats = -logits(weights, hidden).log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
    assert {i + 1 for i in nats.topk(3).indices.tolist()} == {
        i for i, flag in enumerate(marked.example.fact) if flag
    }


def frozen_state(seed):
    gen = torch.Generator().manual_seed(seed)
    size = TINY.num_layers, TINY.num_heads, 64, 64
    return TunedState("other", 0.3 * torch.randn(size, generator=gen))


def test_a_state_beside_others_is_learnt_for_what_the_mixture_says(weights):
    other = frozen_state(1)
    rule = make_merge(parse_method("delta", "merge", "merge"))
    gate = make_gate(parse_method("fixed", "gate", "gate"))
    beside = Beside(FrozenRows(weights, [None, other]), rule, gate, (0.0, 1.0, 1.0))
    learner = Learner(weights, [config(learning_rate=1.0)], [None], token_loss=beside)
    # A state at the base changes nothing of `delta`: the mixture says what the other state says.
    alone = Learner(weights, [config()], [other.wkv])
    before = learner.evaluate(HELD_OUT)[0]
    assert before == pytest.approx(alone.evaluate(HELD_OUT)[0], rel=1e-4)
    for step in range(6):
        learner.step(step, [batch_of(step)])
    after = learner.evaluate(HELD_OUT)[0]
    assert after < before - 0.1

    # The same by hand, row by row.
    shape, nats = Shape.of(weights), []
    for one in HELD_OUT[0]:
        ids = torch.tensor([one.token_ids])
        rows = []
        for wkv in (torch.zeros(shape.state_size), other.wkv, learner.wkv(0)):
            hidden, _ = forward(weights, ids[:, :-1], start_state(shape, wkv[None], torch.float32))
            rows.append(logits(weights, hidden)[0])
        named = torch.tensor([0.0, 1.0, 1.0]).expand(len(rows[0]), 3)
        merged = rule.merge(Rows(torch.stack(rows, 1), named, torch.zeros(len(rows[0]))), named)
        nats.append(-merged.log_softmax(-1).gather(-1, ids[0, 1:, None]))
    assert after == pytest.approx(float(torch.cat(nats).mean()), rel=1e-4)


def test_imitation_costs_the_divergence_from_the_mixture_and_nothing_of_itself(weights):
    other = frozen_state(2)
    linear, fixed = (parse_method(*x) for x in (("linear", "merge", ""), ("fixed", "gate", "")))
    rule, gate = make_merge(linear), make_gate(fixed)

    def mixture(*states):
        count = len(states)
        shares = (1 / count,) * count
        texts = ("",) * count
        return ResolvedMixture(
            "x", states, texts, texts, shares, shares, linear, fixed, 0.0, None, ""
        )

    itself = Imitation(weights, mixture(other), rule, gate)
    learner = Learner(weights, [config()], [other.wkv], token_loss=itself)
    assert learner.evaluate(HELD_OUT)[0] == pytest.approx(0.0, abs=1e-5)

    both = Imitation(weights, mixture(None, other), rule, gate)
    learner = Learner(weights, [config(learning_rate=0.02)], [None], token_loss=both)
    losses = [learner.step(step, HELD_OUT)[0] for step in range(6)]
    assert 0 < losses[-1] < 0.9 * losses[0]


def test_a_gate_that_reads_the_user_is_refused(weights):
    gate = make_gate(parse_method("posterior", "gate", "gate"))
    rule = make_merge(parse_method("linear", "merge", "merge"))
    with pytest.raises(InvalidRequestError, match="gate 'posterior'"):
        Beside(FrozenRows(weights, [None]), rule, gate, (0.5, 0.5))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_batch_without_room_on_the_device_is_one_sentence(weights, monkeypatch, error):
    learner = Learner(weights, [config(max_len=4)], [None])

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("mrss_provider.tune.learner.read_rows", full)
    before = learner.snapshot()
    for call in (lambda: learner.step(0, HELD_OUT), lambda: learner.evaluate(HELD_OUT)):
        with pytest.raises(
            InvalidRequestError, match="2 examples of up to 4 tokens; lower --batch"
        ):
            call()
    assert all(torch.equal(x, before[name]) for name, x in learner.snapshot().items())


@pytest.mark.gpu
@pytest.mark.parametrize("version", [6, 7])
def test_states_and_offsets_are_learnt_on_cuda_in_bf16(version):
    # As many heads as in the other tests on CUDA: fla compiles its kernels for each number.
    kept = checkpoint(version, TinyShape(hidden_size=256))
    tensors = {n: t.to("cuda", torch.bfloat16) for n, t in kept.items()}
    learner = Learner(tensors, [config(offsets=True, steps=20)], [None])
    before = learner.evaluate(HELD_OUT)[0]
    for step in range(20):
        learner.step(step, [batch_of(step)])
    assert learner.evaluate(HELD_OUT)[0] < before - 0.5
    assert learner.time_offset(0).abs().max() > 0
