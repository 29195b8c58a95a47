"""RWKV-7's fused parts for tuning against plain torch under autograd, in fp64 and whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mrss_kernels import train_ffn, train_mix7, train_time7
from mrss_kernels.train_time7 import GateVectors
from oracle import DEVICE, INTERPRETED, assert_as_good_as_reference, randn
from tiny_model import Shape, checkpoint

from mrss_provider.tune import network, rwkv7
from mrss_provider.tune.packed7 import forward_packed
from mrss_provider.tune.packing import Packing

# The interpreter cuts bf16 off where a GPU rounds it.
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
DTYPES += [] if INTERPRETED else [torch.bfloat16]
LENGTHS = (5, 1, 8)


def compare(function, got, inputs, grads, rounded_to):
    """Hold results and gradients to those of `function` in fp64 and fp32; None is left out."""
    runs = []
    for dtype in (torch.float64, torch.float32):
        leaves = [
            None if x is None else x.detach().to(dtype, copy=True).requires_grad_() for x in inputs
        ]
        outs = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None]
        weighed = [(out * grad.to(dtype)).sum() for out, grad in zip(outs, grads, strict=True)]
        found = torch.autograd.grad(sum(weighed), wanted)
        runs.append([x.detach() for x in (*outs, *found)])
    got = [x for x in got if x is not None]
    for ours, exact, reference in zip(got, *runs, strict=True):
        assert_as_good_as_reference(ours, reference, exact, rounded_to)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_mixes", [1, 6])
def test_norm_and_token_shift_do_not_cross_sequences(num_mixes, dtype):
    size, channels = sum(LENGTHS), 96
    packing = Packing.of(LENGTHS, max(LENGTHS), torch.device(DEVICE))
    x = randn(size, channels, seed=1)
    delta, weight, bias = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate(
        [(size, channels), (channels,), (channels,)]
    ))  # fmt: skip
    shift, mix = randn(3, channels, seed=5), randn(num_mixes, channels, seed=6, dtype=dtype)

    def plain(x, delta):
        to = x.dtype
        total = x + delta
        h = F.layer_norm(total, (channels,), weight.to(to), bias.to(to), train_mix7.LN_EPS)
        parts = zip(h.split(LENGTHS), shift.to(to), strict=True)
        d = torch.cat([rwkv7.token_shift(part[None], row[None])[0] for part, row in parts])
        return [total, *(h + d * mix[i].to(to) for i in range(num_mixes))]

    total, out = train_mix7.norm_mix(x, delta, weight, bias, shift, packing.first, mix)
    grads = [randn(size, channels, seed=7)]
    grads += [randn(size, channels, seed=8 + i, dtype=dtype) for i in range(num_mixes)]
    dx, ddelta = train_mix7.norm_mix_grad(
        total, grads[0], grads[1:], weight, packing.first, mix, dtype
    )
    assert dx.dtype == torch.float32
    compare(plain, [total, *out, dx, ddelta], [x, delta], grads, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_first", [True, False])
def test_gates_and_their_gradients(is_first, dtype):
    size, heads, n = 6, 3, 16
    rows = [randn(size, heads, n, seed=i, dtype=dtype) for i in range(6)]
    vectors = [randn(heads * n, seed=10 + i, dtype=dtype) for i in range(5)]
    if is_first:
        rows[2] = rows[5] = vectors[2] = None

    def plain(w_low, a_low, v_low, k, v, first_v):
        w0, a0, v0, k_k, k_a = (
            None if vector is None else vector.view(heads, n).to(k.dtype) for vector in vectors
        )
        a = torch.sigmoid(a0 + a_low)
        value = v if is_first else torch.lerp(v, first_v, torch.sigmoid(v0 + v_low))
        kk = F.normalize(k * k_k, dim=-1)
        decay = rwkv7.LOG_DECAY_SCALE * torch.sigmoid(w0 + w_low)
        return [decay, k * (1 + (a - 1) * k_a), value, -kk, kk * a]

    outs = train_time7.gates7(rows, GateVectors(*vectors))
    grads = [randn(size, heads, n, seed=20 + i, dtype=dtype) for i in range(5)]
    found = train_time7.gates7_grad(rows, GateVectors(*vectors), grads)
    compare(plain, [*outs, *found], rows, grads, dtype)


def test_a_key_of_zeros_has_finite_gradients():
    rows = [randn(1, 1, 16, seed=i) for i in range(6)]
    vectors = GateVectors(*(randn(16, seed=10 + i) for i in range(5)))
    rows[3].zero_()
    grads = [randn(1, 1, 16, seed=20 + i) for i in range(5)]
    assert all(found.isfinite().all() for found in train_time7.gates7_grad(rows, vectors, grads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_its_gradients(dtype):
    size, heads, n = 6, 3, 16
    rows = [randn(size, heads, n, seed=i, dtype=dtype) for i in range(5)]
    weight, bias, r_k = (randn(heads * n, seed=10 + i, dtype=dtype) for i in range(3))

    def plain(y, r, k, v, g):
        weight_, bias_, r_k_ = (x.view(heads, n).to(y.dtype) for x in (weight, bias, r_k))
        normal = F.layer_norm(y, (n,), eps=train_time7.GROUP_NORM_EPS) * weight_ + bias_
        return [(normal + (r * k * r_k_).sum(-1, keepdim=True) * v) * g]

    out = train_time7.output7(rows, weight, bias, r_k)
    grad = randn(size, heads, n, seed=20, dtype=dtype)
    found = train_time7.output7_grad(rows, weight, bias, r_k, grad)
    compare(plain, [out, *found], rows, [grad], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_relu_and_its_gradient(dtype):
    x, grad = (randn(3, 700, seed=i, dtype=dtype) for i in range(2))
    found = [train_ffn.square_relu(x), train_ffn.square_relu_grad(x, grad)]
    compare(lambda x: [torch.relu(x) ** 2], found, [x], [grad], dtype)


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("offset", [pytest.param(False, marks=pytest.mark.slow), True])
def test_packed_sequences_have_the_values_and_gradients_of_each_by_itself(offset):
    shape = Shape(hidden_size=64, head_size=32, ffn_size=96, vocab_size=40)
    weights = {name: tensor.to(DEVICE) for name, tensor in checkpoint(7, shape).items()}
    lengths = (6, 1, 2)
    ids = torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    packing = Packing.of(lengths, 6, ids.device)
    # The rows of a batch may begin at one state.
    wkv = randn(2, 2, 2, 32, 32, seed=3).requires_grad_()
    jobs = torch.tensor([0, 1, 1], device=DEVICE)
    offsets = randn(3, 2, 64, seed=4, scale=0.3).requires_grad_() if offset else None
    leaves = [x for x in (wkv, offsets) if x is not None]

    packed = forward_packed(
        weights, packing.pack(ids), packing, wkv[jobs], offsets=offsets, backend="torch"
    )
    alone = []
    for i, size in enumerate(lengths):
        start = network.start_state(network.Shape.of(weights), wkv[jobs[i]][None], torch.float32)
        one = None if offsets is None else offsets[i : i + 1]
        hidden, _ = network.forward(weights, ids[i : i + 1, :size], start, offsets=one)
        alone.append(hidden[0])
    found = []
    for hidden in (packed, torch.cat(alone)):
        weighed = (hidden * randn(*hidden.shape, seed=5)).sum()
        found.append([hidden.detach(), *torch.autograd.grad(weighed, leaves)])
    for got, wanted in zip(*found, strict=True):
        assert relative(got, wanted) < 1e-4
    rows = packing.unpack(found[0][0], 6)
    assert torch.equal(packing.pack(rows), found[0][0])
    assert (rows[1, 1:] == 0).all()
