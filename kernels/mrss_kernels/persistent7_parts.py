# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""What all parts of `persistent7_kernel` share: how it waits for numbers of other programs.

Gluon, as Triton has no way to say how much of a weight is asked for and when. A number that is not
there yet is BLANK, all bits 1: a NaN that no instruction makes. Whoever needs it reads it until it
is something else, so that a number is one store and one load away from the program that wants it.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BLANK = gl.constexpr(0xFFFFFFFF)
"""The bits of a number in fp32, or of a pair of 16 bits, that has not been written."""

SIGNS = gl.constexpr(-2147450880)
"""The signs of two halves of 16 bits."""

NUM_OUTPUTS = gl.constexpr(64)
"""Outputs of a unit of work: the rows of a tile that `wgmma` takes."""

BLOCK_LEN = gl.constexpr(256)
"""Columns of a block of weights."""

MAX_POLLS = gl.constexpr(1 << 22)
"""Reads of a number that is not there, some seconds, after which the kernel traps."""

LN_EPS = gl.constexpr(1e-5)

gdc_wait = tl.extra.cuda.gdc_wait
# Triton 3.7 renamed it.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def bits(x):
    """Return the bits of x fp32: the largest of all numbers, BLANK, where one is not written."""
    return x.to(gl.uint32, bitcast=True)


@gluon.jit
def bits_at(p):
    """Return pointers to the bits of numbers in fp32 or of pairs of 16 bits."""
    return p.to(gl.pointer_type(gl.int32), bitcast=True)


@gluon.jit
def either(a, b):
    return a | b


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
def count(polls):
    """Return polls + 1; at MAX_POLLS trap: what never comes is an error, and no endless wait."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ge.s32 p, $1, $2; @p trap; mov.u32 $0, 0; }",
        "=r,r,r",
        [polls, gl.to_tensor(MAX_POLLS)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    return polls + 1


@gluon.jit
def await_word(p):
    """Wait until the number in fp32, or the pair of 16 bits, that p points to is there."""
    polls = gl.to_tensor(0)
    word = gl.load(bits_at(p), volatile=True)
    while word == -1:
        polls = count(polls)
        word = gl.load(bits_at(p), volatile=True)


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


@gluon.jit
def load_missing(p, words, mask, POSITIVE: gl.constexpr):
    """Return words int32 [..., n], those groups of n loaded once more where one is not there.

    Groups that have come are not read again: reads stand behind reads. A word is a number in fp32
    or two of 16 bits that are written at once; if POSITIVE, two that are written apart and whose
    sign bits are never set.
    """
    if POSITIVE:
        missing = gl.expand_dims(gl.reduce(words, 2, either), 2) & SIGNS != 0
    else:
        missing = gl.max(words.to(gl.uint32, bitcast=True), 2, keep_dims=True) == BLANK
    return gl.load(p, mask=mask & missing, other=words, volatile=True)
