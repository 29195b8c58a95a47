"""The interpreter that these checks use gives the bits of Triton's own, and leaves no traces."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from oracle import INTERPRETED, randn

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")


@triton.jit
def _scaled(x, factor):
    return x * factor + tl.sum(x, 0)


@triton.jit
def _kernel(p_x, p_index, p_y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    index = tl.load(p_index + at, mask=here, other=0)
    x = tl.load(p_x + index, mask=here, other=0.0).to(tl.float32)
    for step in tl.static_range(3):
        x = _scaled(x, step + 0.5)
    tl.store(p_y + at, tl.where(index % 2 == 0, tl.exp(x * 1e-3), x), mask=here)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_it_gives_the_bits_of_the_plain_one(dtype, index_dtype, monkeypatch):
    x, size = randn(50, seed=1, dtype=dtype), 45
    index = torch.randperm(50, generator=torch.Generator().manual_seed(2)).to(index_dtype)

    def launch():
        y = torch.full((50,), 7.0, dtype=dtype)
        _kernel[(4,)](x, index, y, size, BLOCK=16)
        return y

    import quick_interpreter
    from triton.runtime import interpreter

    quick = launch()
    for (owner, name), function in quick_interpreter.PLAIN.items():
        assert getattr(owner, name) is not function
        monkeypatch.setattr(owner, name, function)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", quick_interpreter.PLAIN_OPTIONS)
    assert launch().equal(quick)
    assert quick[:size].ne(7.0).all()
    assert quick[size:].eq(7.0).all()


def test_the_language_is_its_own_again_after_a_launch():
    """One that fails, too."""
    from triton.runtime import interpreter

    assert tl.core.is_builtin(tl.load)
    with pytest.raises(interpreter.InterpreterError):
        _kernel[(1,)](None, None, None, 1, BLOCK=16)
    assert tl.core.is_builtin(tl.load)
    assert tl.core.is_builtin(tl.tensor.__add__)
