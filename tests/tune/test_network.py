"""The differentiable network against the engine's own model, on the same checkpoint."""

import pytest
import torch
from tiny_model import TINY, write_checkpoint

from mrss_provider.model import TunedState, load_model
from mrss_provider.tune import read_weights
from mrss_provider.tune.network import Shape, forward, logits, start_state


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tune") / "tiny.pth")


@pytest.fixture(scope="module")
def weights(path):
    return {name: tensor.float() for name, tensor in read_weights(path).items()}


@pytest.fixture(scope="module")
def states():
    gen = torch.Generator().manual_seed(3)
    size = (3, TINY.num_layers, TINY.num_heads, TINY.head_size, TINY.head_size)
    return torch.randn(size, generator=gen)


TOKENS = torch.randint(0, TINY.vocab_size, (3, 40), generator=torch.Generator().manual_seed(4))


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def test_the_shape_is_read_from_the_tensors(weights):
    assert Shape.of(weights) == Shape(
        TINY.num_layers, TINY.hidden_size, TINY.num_heads, TINY.head_size, TINY.vocab_size
    )


def test_logits_and_states_equal_those_of_the_engines_model(path, weights, states):
    model = load_model(path, device="cpu", dtype="fp32", threads=1)
    pool = model.new_pool(3)
    for slot in range(3):
        pool.write(slot, TunedState(f"s{slot}", states[slot]))
    hidden, after = forward(weights, TOKENS, start_state(Shape.of(weights), states, torch.float32))
    ours = logits(weights, hidden)
    ends = [0, 40, 80, 120]
    theirs = model.prefill(TOKENS.flatten(), ends, torch.arange(3), pool, all_positions=True)
    assert relative(ours.flatten(0, 1), model.head(theirs)) < 1e-5
    for slot in range(3):
        wkv = torch.stack([layer[slot] for layer in after.wkv])
        assert relative(wkv, pool.snapshot(slot).wkv) < 1e-5


def test_token_by_token_equals_the_whole_text(weights, states):
    start = start_state(Shape.of(weights), states, torch.float32)
    whole, _ = forward(weights, TOKENS, start)
    state, pieces = start, []
    for t in range(TOKENS.shape[1]):
        piece, state = forward(weights, TOKENS[:, t : t + 1], state)
        pieces.append(piece)
    assert relative(torch.cat(pieces, 1), whole) < 1e-5


def test_a_row_does_not_feel_the_other_rows(weights, states):
    together, _ = forward(weights, TOKENS, start_state(Shape.of(weights), states, torch.float32))
    alone, _ = forward(
        weights, TOKENS[1:2], start_state(Shape.of(weights), states[1:2], torch.float32)
    )
    assert relative(together[1:2], alone) < 1e-6
