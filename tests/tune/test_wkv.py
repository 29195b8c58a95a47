"""The forms of the recurrence that have a gradient, against its definition one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrss_provider.tune.wkv import wkv7
from mrss_provider.tune.wkv6 import wkv6

B, H, N = 2, 3, 64


def draw_inputs(num_tokens, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    r, k, v = (normal(B, num_tokens, H, N) for _ in range(3))
    kk = torch.nn.functional.normalize(normal(B, num_tokens, H, N), dim=-1)
    a = torch.sigmoid(normal(B, num_tokens, H, N))
    w = -0.6065306597 * torch.sigmoid(3 * normal(B, num_tokens, H, N))
    inputs = (r, w, k, v, kk, a, normal(B, H, N, N))
    return [x.requires_grad_() for x in inputs]


def by_definition(r, w, k, v, kk, a, state):
    outputs = []
    for t in range(r.shape[1]):
        decay = torch.diag_embed(w[:, t].exp())
        removal = kk[:, t, :, :, None] * (kk * a)[:, t, :, None, :]
        state = state @ (decay - removal) + v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append((state @ r[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, 1), state


def relative(got, wanted):
    return float((got - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 63, 100])
def test_values_and_all_gradients_equal_the_definition(num_tokens):
    inputs = draw_inputs(num_tokens, seed=num_tokens)
    gen = torch.Generator().manual_seed(1)
    results = []
    for form in (wkv7, by_definition):
        y, state = form(*inputs)
        if not results:
            grad_y = torch.randn(y.shape, generator=gen)
            grad_state = torch.randn(state.shape, generator=gen)
        loss = (y * grad_y).sum() + (state * grad_state).sum()
        results.append([y, state, *torch.autograd.grad(loss, inputs)])
    for got, wanted in zip(*results, strict=True):
        assert relative(got, wanted) < 2e-6


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 59))
def test_any_split_of_a_text_gives_the_same_outputs_and_state(cut):
    inputs = [x.detach() for x in draw_inputs(60)]
    whole, end = wkv7(*inputs)
    first, middle = wkv7(*(x[:, :cut] for x in inputs[:6]), inputs[6])
    second, last = wkv7(*(x[:, cut:] for x in inputs[:6]), middle)
    assert relative(torch.cat([first, second], 1), whole) < 2e-6
    assert relative(last, end) < 2e-6


def test_the_state_given_is_not_modified():
    inputs = [x.detach() for x in draw_inputs(20)]
    before = inputs[6].clone()
    wkv7(*inputs)
    assert torch.equal(inputs[6], before)


def test_the_slowest_and_fastest_decays_stay_finite_and_exact():
    inputs = [x.detach() for x in draw_inputs(64)]
    inputs[1] = torch.where(torch.rand(inputs[1].shape) < 0.5, -0.6065306597, -1e-7)
    got, wanted = wkv7(*inputs), by_definition(*inputs)
    assert relative(got[0], wanted[0]) < 2e-6
    assert relative(got[1], wanted[1]) < 2e-6


@pytest.mark.gpu
def test_fla_kernels_agree_with_the_torch_form_in_values_and_gradients():
    from models.demo.train import check_gradients

    assert check_gradients(torch.device("cuda")) == "fla"


def draw_inputs6(num_tokens, seed=0):
    gen = torch.Generator().manual_seed(seed)
    r, k, v = (torch.randn(B, num_tokens, H, N, generator=gen) for _ in range(3))
    # From no decay to one that leaves nothing.
    w = -torch.exp(3 * torch.randn(B, num_tokens, H, N, generator=gen))
    u = torch.randn(H, N, generator=gen)
    inputs = (r, w, k, v, u, torch.randn(B, H, N, N, generator=gen))
    return [x.requires_grad_() for x in inputs]


def by_definition6(r, w, k, v, u, state):
    outputs = []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((r[:, t, :, None] @ (state + u[:, :, None] * kv))[:, :, 0])
        state = w[:, t].exp()[..., None] * state + kv
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("num_tokens", [1, 17, 40])
def test_rwkv6_values_and_all_gradients_equal_the_definition(num_tokens):
    inputs = draw_inputs6(num_tokens, seed=num_tokens)
    gen = torch.Generator().manual_seed(1)
    results = []
    for form in (wkv6, by_definition6):
        y, state = form(*inputs)
        if not results:
            grad_y = torch.randn(y.shape, generator=gen)
            grad_state = torch.randn(state.shape, generator=gen)
        loss = (y * grad_y).sum() + (state * grad_state).sum()
        results.append([y, state, *torch.autograd.grad(loss, inputs)])
    for got, wanted in zip(*results, strict=True):
        assert relative(got, wanted) < 2e-6


@pytest.mark.gpu
def test_fla_rwkv6_kernels_agree_with_the_torch_form_in_values_and_gradients():
    inputs = [x.detach().cuda() for x in draw_inputs6(100)]
    inputs[1] = inputs[1].clamp_min(-5.0)
    results = []
    for backend, dtype in (("fla", torch.bfloat16), ("torch", torch.float32)):
        leaves = [
            (x.bfloat16().to(dtype) if i in (0, 2, 3) else x.clone()).requires_grad_()
            for i, x in enumerate(inputs)
        ]
        y, state = wkv6(*leaves, backend=backend)
        loss = y.float().square().mean() + state.square().mean()
        results.append([y, state, *torch.autograd.grad(loss, leaves)])
    for got, wanted in zip(*results, strict=True):
        assert relative(got.float(), wanted.float()) < 2e-2
