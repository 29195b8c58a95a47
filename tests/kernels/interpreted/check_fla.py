"""Our use of flash-linear-attention's chunked kernels: orders, signs, layouts, gather and scatter.

The interpreter lacks three things that fla's kernels count on; they are supplied here, for fla's
modules only. What a GPU computes with them is fla's own to test.
"""

from __future__ import annotations

import builtins
import importlib
import sys

import pytest
import torch
import triton
import triton.language as tl
from check_wkv import PREFILL, SLOTS, guarded_pool, vectors
from mrss_kernels import fla_prefill, reference
from oracle import DEVICE, INTERPRETED, randn, rms

from mrss_provider.tune import wkv
from mrss_provider.tune.packing import Packing

FLA = {7: fla_prefill.wkv7_prefill, 6: fla_prefill.wkv6_prefill}
# fla multiplies in the inputs' dtype; this is a few roundings to fp16.
TOLERANCE = 5e-3


class _Index(int):
    """A loop index that has what a compiled one has."""

    def to(self, *_args, **_kwargs):
        return self


def _range(*bounds):
    ends = [int(x.handle.data.item()) if hasattr(x, "handle") else int(x) for x in bounds]
    for i in builtins.range(*ends):
        yield _Index(i)


@triton.jit
def _gather(src, index, axis: tl.constexpr):
    return tl.gather(src, index, axis)


@pytest.fixture(autouse=True)
def _interpretable_fla(monkeypatch) -> None:
    """Import fla, and make its kernels run in the interpreter."""
    importlib.import_module("fla.ops.rwkv6")
    importlib.import_module("fla.ops.rwkv7")
    from triton.runtime.autotuner import Autotuner

    if not INTERPRETED:
        return
    prune = Autotuner.prune_configs
    # Autotuning times its configurations on a device; here the first one is as good as any.
    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, kw: prune(self, kw)[:1])
    # Before 3.9 Triton times that one too, and for it asks for a device.
    monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, **kw: [0.0, 0.0, 0.0])
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops") and module is not None:
            monkeypatch.setattr(module, "range", _range, raising=False)
            if getattr(module, "gather", None) is tl.gather:
                monkeypatch.setattr(module, "gather", _gather)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("version", [pytest.param(6, marks=pytest.mark.slow), 7])
def test_fla_equals_reference(version) -> None:
    lengths, slots = [0, 3, 70], [8, 2]
    inputs = vectors(version, lengths[-1], torch.float16, seed=3)
    pool, check = guarded_pool(torch.float32, seed=5)
    before, exact = pool.clone(), pool.double()
    ids = torch.tensor(slots, device=DEVICE)
    y = FLA[version](*inputs, pool, ids, lengths)
    expected = getattr(reference, PREFILL[version][1].__name__)(
        *(x.double() for x in inputs), exact, ids, lengths
    )
    check()
    assert y.dtype == torch.float32
    assert rms(y - expected) <= TOLERANCE * rms(expected)
    assert rms(pool - exact) <= TOLERANCE * rms(exact)
    others = [s for s in range(SLOTS) if s not in slots]
    assert torch.equal(pool[others], before[others])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("keep", [False, True])
def test_packed_sequences_and_their_gradients_equal_the_torch_form(keep) -> None:
    packing = Packing.of((5, 70, 1), 70, torch.device(DEVICE))
    r, w, k, v, kk, a = vectors(7, 76, torch.float16, seed=3)
    state = randn(3, *r.shape[1:], r.shape[-1], seed=6)
    toward = randn(*r.shape, seed=7)
    found = []
    for backend, dtype in (("fla", torch.float16), ("torch", torch.float32)):
        inputs = [x.to(dtype) for x in (r, k, v, -kk, kk * a)]
        inputs = [inputs[0], w.float(), *inputs[1:], state]
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = wkv.wkv7_packed(*leaves, packing, keep=keep, backend=backend)
        found.append([y.detach(), *torch.autograd.grad((y.float() * toward).sum(), leaves)])
    for got, wanted in zip(*found, strict=True):
        assert rms(got.float() - wanted) <= 2 * TOLERANCE * rms(wanted)
