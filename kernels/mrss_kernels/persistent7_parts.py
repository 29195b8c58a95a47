# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""What all parts of `persistent7_kernel` share: sizes, marks of numbers that are not there, votes.

Gluon, as Triton has no way to say how much of a weight is asked for and when.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NUM_OUTPUTS = gl.constexpr(64)
"""Outputs of a unit of work: the rows of a tile that `wgmma` takes."""

BLOCK_LEN = gl.constexpr(256)
"""Columns of a block of weights."""

LN_EPS = gl.constexpr(1e-5)

gdc_wait = tl.extra.cuda.gdc_wait
# Triton 3.7 renamed it.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def bits_at(p):
    """Return pointers to the bits of numbers in fp32 or of pairs of 16 bits."""
    return p.to(gl.pointer_type(gl.int32), bitcast=True)


@gluon.jit
def put_votes(x, votes):
    """Store x [4], an element a warp, and return the place of all four, [4].

    What each thread reads there and reduces is a reduction over all threads with fewer barriers.
    """
    votes = votes._reinterpret(x.dtype, [4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    votes.store(x)
    return votes


@gluon.jit
def get_votes(votes):
    """Return what all warps have put [4]."""
    return votes.load(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def blank(p):
    """Return what marks an element that p points to as not written."""
    dtype: gl.constexpr = p.dtype.element_ty
    if dtype == gl.float32:
        return gl.to_tensor(-1).to(gl.float32, bitcast=True)
    else:  # noqa: RET505 (Gluon compiles what follows a return)
        return gl.to_tensor(-1).to(gl.int16).to(dtype, bitcast=True)


@gluon.jit
def fence():
    """Let all programs see what this one has written before what it will write."""
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.u32 $0, 0;",
        "=r,r",
        [gl.to_tensor(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
