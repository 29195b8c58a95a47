"""States of an evaluation: what they learn from, how a rate is chosen, runs that go on."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from models.demo import pair_states
from models.demo.init import init_weights
from models.demo.pair_data import KINDS, data_of, held_out
from models.demo.pair_states import Work, do
from models.demo.train import save
from models.demo.vocab import PieceEncoder, read_vocab
from mrss_provider.config import DEMO_MODEL
from mrss_provider.evaluate.world import voices_in
from mrss_provider.tune.learner import Learner

BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.fixture(scope="module")
def encoder():
    return PieceEncoder(read_vocab(DEMO_MODEL / "vocab.txt"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    weights = init_weights(1, 64, 1472, seed=0)
    # New layers add nothing, and a state under them would learn nothing.
    torch.manual_seed(0)
    weights["blocks.0.att.output.weight"].normal_(std=0.1)
    save(weights, folder / "model.safetensors", {})
    shutil.copy(DEMO_MODEL / "vocab.txt", folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("models.demo.pair_data.POOL_SIZE", 60)


def work(model, out, kind, steps=3, seeds=(1,)):
    return Work(model, out, kind, seeds, steps, 4, num_held_out=2, device="cpu", dtype="fp32")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_only_the_joint_data_has_a_home_fact_in_the_voice(encoder, kind):
    data = data_of(kind, 91, 4, encoder)
    both = []
    for example in [example for step in range(12) for example in data.batch(step)]:
        text = encoder.decode(example.token_ids)
        pairs = zip(example.token_ids, example.answer, strict=True)
        toned = voices_in(encoder.decode(i for i, answer in pairs if answer))
        assert toned <= {"pirate"}
        both.append(bool(toned) and "Larkhaven" in text)
    assert any(both) == (kind.name == "joint")


def test_a_batch_of_a_union_has_all_of_one_source_and_half_of_the_other(encoder):
    data = data_of(BY_NAME["union-local"], 1, 4, encoder)
    batch = data.batch(0)
    assert len(batch) == 6
    assert batch == data.batch(0)
    assert batch != data.batch(1)
    # What the voice says is all to be learnt; of plain chats the facts are.
    assert all(example.fact == example.answer for example in batch[4:])
    assert all(example.fact != example.answer for example in batch[:4])
    plain = held_out("facts", 3, encoder, facts_only=True)
    assert all(example.answer == example.fact for example in plain)


def test_a_rate_is_chosen_by_facts_and_voice_where_a_state_is_for_both():
    trial = {"own": 1.0, "facts": 2.0, "voice": 4.0, "joint": 8.0}
    scores = {name: pair_states._score(kind, trial) for name, kind in BY_NAME.items()}
    assert {name for name, score in scores.items() if score == 6.0} == {
        "union", "union-local", "sequential-kt", "sequential-tk", "sequential-tk-held",
    }  # fmt: skip
    assert {name for name, score in scores.items() if score == 1.0} == {
        "knowledge", "knowledge-plain", "tone", "joint",
    }  # fmt: skip


def test_a_state_that_goes_on_from_another_begins_there_and_is_written_with_its_history(
    model, tmp_path
):
    for name in ("tone", "sequential-tk-held"):
        one = work(model, tmp_path, name)
        assert one.seeds_left == (1,)
        do(one)
        assert one.seeds_left == ()
    tone, after = (
        load_file(tmp_path / folder / f"{name}.safetensors")
        for folder, name in (("pair-1", "tone"), ("baselines-1", "sequential-tk-held"))
    )
    (moved,) = [(after[name] - tone[name]).abs().max().item() for name in tone]
    assert 0 < moved < 3 * 1.5 + 1e-3


def test_a_killed_state_goes_on_to_the_numbers_that_it_would_have_had(model, tmp_path, monkeypatch):
    (whole,) = do(work(model, tmp_path / "whole", "knowledge"))
    monkeypatch.setattr(pair_states, "_SAVE_EVERY_S", 0.0)
    step = Learner.step

    def dies(self, number, batches):
        if number == 2:
            raise MemoryError
        return step(self, number, batches)

    killed = work(model, tmp_path / "killed", "knowledge")
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", dies)
        with pytest.raises(MemoryError):
            do(killed)
    assert killed.seeds_left == (1,)
    (again,) = do(killed)
    states = [load_file(one.parents[1] / "pair-1/knowledge.safetensors") for one in (whole, again)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
    assert not list(tmp_path.rglob("*.unfinished"))
