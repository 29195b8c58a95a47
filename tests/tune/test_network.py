"""The differentiable network against the engine's own model, on the same checkpoint."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import TINY, checkpoint, tuned_state, write_checkpoint

from mrss_provider.model import TunedState, load_model
from mrss_provider.tune import Example, TuneConfig, read_weights, tune_state
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


def test_a_checkpoint_without_ln0_is_computed_as_the_engine_computes_it(tmp_path, states):
    path = tmp_path / "no_ln0.safetensors"
    save_file({name: t for name, t in checkpoint().items() if ".ln0." not in name}, path)
    model = load_model(path, device="cpu", dtype="fp32", threads=1)
    pool = model.new_pool(1)
    pool.write(0, TunedState("s", states[0]))
    theirs = model.prefill(TOKENS[0], [0, 40], torch.arange(1), pool, all_positions=True)
    weights = read_weights(path)
    hidden, _ = forward(
        weights, TOKENS[:1], start_state(Shape.of(weights), states[:1], torch.float32)
    )
    assert relative(hidden[0], theirs) < 1e-5


@pytest.mark.parametrize("locality", [0.0, 5.0])
def test_tuning_starts_at_and_keeps_to_the_base_state_of_the_checkpoint(tmp_path, locality):
    path = tmp_path / "based.safetensors"
    base = tuned_state()
    save_file(checkpoint() | base, path)
    model = load_model(path, device="cpu", dtype="fp32", threads=1)
    pool = model.new_pool(1)
    pool.write(0, None)
    ids = TOKENS[0, :7].tolist()
    hidden = model.prefill(TOKENS[0, :6], [0, 6], torch.arange(1), pool, all_positions=True)
    nll = -model.head(hidden).log_softmax(-1).gather(1, TOKENS[0, 1:7, None])[:, 0]
    # The last three tokens are the answer, the first of them the fact. At the base no other
    # token has drifted, so with locality the fact's loss is the whole loss.
    example = Example(tuple(ids), (False,) * 4 + (True,) * 3, (False,) * 4 + (True, False, False))
    wanted = float(nll[3] if locality else nll[3:].mean())
    config = TuneConfig(steps=1, batch_size=1, locality=locality)
    initial = torch.stack([base[f"blocks.{i}.att.time_state"] for i in range(TINY.num_layers)])
    for start in (None, initial):
        learnt = tune_state(read_weights(path), lambda rng: example, config, initial=start)
        assert learnt.losses[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("version", [6, 7])
def test_both_versions_equal_the_engines_model_with_states_and_offsets(tmp_path, version):
    path = write_checkpoint(tmp_path / "tiny.pth", version)
    model = load_model(path, device="cpu", dtype="fp32", threads=1)
    gen = torch.Generator().manual_seed(5)
    wkv = torch.randn((1, *model.config.state_shape), generator=gen)
    offsets = 0.3 * torch.randn((1, TINY.num_layers, TINY.hidden_size), generator=gen)
    pool = model.new_pool(1)
    pool.write(0, TunedState("s", wkv[0], time_offset=offsets[0]))
    theirs = model.prefill(TOKENS[0], [0, 40], torch.arange(1), pool, all_positions=True)
    weights = read_weights(path)
    start = start_state(Shape.of(weights), wkv, torch.float32)
    hidden, after = forward(weights, TOKENS[:1], start, offsets=offsets)
    assert relative(hidden[0], theirs) < 1e-5
    assert relative(torch.stack([layer[0] for layer in after.wkv]), pool.snapshot(0).wkv) < 1e-5


@pytest.mark.parametrize("version", [6, 7])
def test_gradients_of_states_and_offsets_equal_finite_differences(tmp_path, version):
    weights = read_weights(write_checkpoint(tmp_path / "tiny.pth", version))
    shape = Shape.of(weights)
    gen = torch.Generator().manual_seed(6)
    values = [
        0.1 * torch.randn(size, generator=gen)
        for size in ((1, *shape.state_size), (1, shape.num_layers, shape.hidden_size))
    ]

    def loss(wkv, offsets):
        start = start_state(shape, wkv, torch.float32)
        hidden, _ = forward(weights, TOKENS[:1, :20], start, offsets=offsets)
        log_probs = logits(weights, hidden).double().log_softmax(-1)
        return -log_probs.gather(-1, TOKENS[:1, 1:21, None]).mean()

    leaves = [value.clone().requires_grad_() for value in values]
    grads = torch.autograd.grad(loss(*leaves), leaves)
    for i, grad in enumerate(grads):
        step = 0.02 * grad / grad.norm()
        ahead, back = (
            [v + s * step if j == i else v for j, v in enumerate(values)] for s in (1, -1)
        )
        assert float((loss(*ahead) - loss(*back)) / 2) == pytest.approx(
            float((grad * step).sum()), rel=2e-2
        )
