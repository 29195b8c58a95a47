"""A training run that was left or killed goes on to the weights that it would have had."""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from models.demo.checkpoint import Checkpoint, Left
from models.demo.data import Feed, Feeder, max_facts_at
from models.demo.init import init_weights
from models.demo.train import train
from models.demo.vocab import PieceEncoder, build_vocab
from mrss_provider.evaluate.world import base_document

STEPS = 6


@pytest.fixture(scope="module")
def feed():
    rng = random.Random(0)
    entries = build_vocab((base_document(rng).text for _ in range(60)), 2000, min_count=1)
    return Feed(entries, num_rows=2, length=32, seed=3, num_steps=STEPS)


class Batches:
    """The batches of a feed, made here; at `trouble_at` something happens."""

    def __init__(self, feed, first_step, trouble_at=None, trouble=None):
        self._feed, self._step = feed, first_step
        self._encoder = PieceEncoder(feed.entries)
        self._trouble_at, self._trouble = trouble_at, trouble
        self.max_facts = SimpleNamespace(value=0)

    def next(self):
        if self._step == self._trouble_at:
            self._trouble()
        self._step += 1
        return self._feed.batch(self._encoder, self._step - 1, 0)


def run(feed, path, trouble_at=None, trouble=None):
    """Train from where the run was left; return the weights and what `train` returned."""
    args = argparse.Namespace(
        steps=STEPS, seconds=0, rate=5e-3, batch=2, length=32, seed=0, log_every=1e9,
        checkpoint_every=0.0,
    )  # fmt: skip
    checkpoint = Checkpoint(path, {"seed": 0})
    left = checkpoint.load()
    begun = left.weights or init_weights(1, 64, 2048, seed=0)
    weights = {k: v.clone().requires_grad_() for k, v in begun.items()}
    batches = Batches(feed, left.step, trouble_at, trouble)
    return weights, train(weights, batches, args, "torch", checkpoint, left)


@pytest.fixture(scope="module")
def whole(feed, tmp_path_factory):
    return run(feed, tmp_path_factory.mktemp("whole") / "run")[0]


def assert_equal(weights, others):
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.slow
def test_a_run_that_was_asked_to_leave_goes_on_to_the_same_weights(feed, whole, tmp_path, capsys):
    path = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    _, log = run(feed, path, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert log is None
    assert "left off after step 4; the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    weights, log = run(feed, path)
    assert log["steps"] == STEPS
    assert_equal(weights, whole)


@pytest.mark.slow
def test_a_run_that_died_goes_on_from_its_last_checkpoint_to_the_same_weights(
    feed, whole, tmp_path
):
    def die():
        raise MemoryError

    path = tmp_path / "run"
    with pytest.raises(MemoryError):
        run(feed, path, 4, die)
    assert Checkpoint(path, {"seed": 0}).load().step == 4
    assert_equal(run(feed, path)[0], whole)


def test_a_checkpoint_of_other_settings_or_of_nothing_is_refused_and_kept(tmp_path):
    path = tmp_path / "run"
    assert Checkpoint(path, {"seed": 0}).load() == Left()
    weights = {"a": torch.zeros(2, requires_grad=True)}
    optimizer = torch.optim.AdamW(weights.values())
    Checkpoint(path, {"seed": 0, "width": 64}).save(1, 2.0, weights, optimizer)
    with pytest.raises(SystemExit, match="--seed was 0 and is 1; remove it"):
        Checkpoint(path, {"seed": 1, "width": 64}).load()
    for content in (b"half of a file", b""):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="is no unfinished run"):
            Checkpoint(path, {"seed": 0}).load()
        assert path.read_bytes() == content


def test_a_batch_depends_on_its_number_and_the_curriculum_on_the_share_that_is_done(feed):
    encoder = PieceEncoder(feed.entries)
    first, again, other = (feed.batch(encoder, step, 0)[0] for step in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert [max_facts_at(share) for share in (0, 0.1, 0.2, 1)] == [2, 8, 14, 14]


@pytest.mark.slow
def test_workers_give_the_batches_in_their_order_from_any_step(feed):
    encoder = PieceEncoder(feed.entries)
    with Feeder(feed, workers=2, first_step=3) as feeder:
        for step in (3, 4, 5):
            ids, kinds = feeder.next()
            wanted = feed.batch(encoder, step, 0)
            assert (ids == wanted[0]).all()
            assert (kinds == wanted[1]).all()


@pytest.mark.slow
def test_a_signal_to_all_of_a_run_leaves_its_workers_to_the_trainer(feed):
    with Feeder(feed, workers=1) as feeder:
        feeder.next()
        (worker,) = feeder._processes
        worker.terminate()
        # More than were ready.
        for _ in range(12):
            feeder.next()
        assert worker.is_alive()
    worker.join(30)
    assert not worker.is_alive()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_goes_on_after_a_kill_and_writes_the_same_model(tmp_path):
    def command(name):
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "models.demo.train", "--out", tmp_path / name),
                *("--steps", "60", "--layers", "1", "--width", "64", "--batch", "2"),
                *("--length", "32", "--checkpoint-every", "0", "--device", "cpu"),
            ]
        )

    killed = command("killed")
    unfinished = tmp_path / "killed/model.unfinished"
    while not unfinished.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended with {killed.wait(timeout=0.01)}")
    killed.kill()
    killed.wait()
    assert unfinished.exists()
    for process in (command("killed"), command("whole")):
        assert process.wait() == 0
    models = [(tmp_path / name / "model.safetensors") for name in ("killed", "whole")]
    assert not unfinished.exists()
    assert_equal(*map(load_file, models))
