# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""What the recurrences in blocks of tokens share: their cut, products of split factors, kept terms.

Used by `wkv7_chunk` and `wkv6_chunk`, whose oracles are its own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

BLOCK_LEN = 16
"""Tokens a block, counted from a sequence's own start."""

MAX_SIZE = 64
"""Largest head size whose blocks fit a program's registers."""

Precision = Literal["fp32", "bf16x3", "fp16"]

SCRATCH = {"fp32": torch.float32, "bf16x3": torch.bfloat16, "fp16": torch.float16}


class Form(NamedTuple):
    """How a call is cut into programs. State and sums are fp32 in all of them."""

    precision: Precision
    """What products round their factors to: `fp32` and `bf16x3` (16 bits) multiply them in two
    parts, three passes in all; `fp16` in one, into which the factors have to fit."""
    block_v: int
    num_warps: int
    num_stages: int
    terms_warps: int = 2
    registers: int | None = None
    """How many a thread of the scan may have; None leaves it to the compiler."""


@triton.jit
def split(x, PRECISION: tl.constexpr):
    """Return x as the sum of two numbers that the tensor cores take, the larger one first.

    Where one pass is enough there is one number, returned twice.
    """
    bits = x.to(tl.uint32, bitcast=True)
    if PRECISION == "fp16":
        high = x.to(tl.float16)
        low = high
    elif PRECISION == "bf16x3":
        cut = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        high = cut.to(tl.bfloat16)
        low = (x - cut).to(tl.bfloat16)
    else:
        # Rounded to tf32's 10 bits behind the point; of the rest the product itself takes as many.
        high = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        low = x - high
    return high, low


@triton.jit
def add_dot(x, a_high, a_low, b_high, b_low, PRECISION: tl.constexpr):
    """Return x + a @ b for split a and b, small terms first."""
    if PRECISION != "fp16":
        x = tl.dot(a_low, b_high, x, input_precision="tf32")
        x = tl.dot(a_high, b_low, x, input_precision="tf32")
    return tl.dot(a_high, b_high, x, input_precision="tf32")


@triton.jit
def dot(a_high, a_low, b_high, b_low, PRECISION: tl.constexpr):
    x = tl.zeros([a_high.shape[0], b_high.shape[1]], tl.float32)
    return add_dot(x, a_high, a_low, b_high, b_low, PRECISION)


@triton.jit
def find_block(p_slots, p_cu_seqlens, i_b, n, BT: tl.constexpr, BN: tl.constexpr):
    """Return the slot, first token and sequence's end of block i_b of T // BT + n.

    Sequence i has its blocks from cu_seqlens[i] // BT + i on, which leaves room for all of them
    whatever the lengths. A block that nobody has begins before its sequence or behind its end.
    """
    o_b = tl.arange(0, BN)
    first = tl.load(p_cu_seqlens + o_b, mask=o_b < n, other=0).to(tl.int32) // BT + o_b
    i_n = tl.maximum(tl.sum(((first <= i_b) & (o_b < n)).to(tl.int32), 0) - 1, 0)
    slot = tl.load(p_slots + i_n)
    start = tl.load(p_cu_seqlens + i_n).to(tl.int32)
    end = tl.load(p_cu_seqlens + i_n + 1).to(tl.int32)
    begin = start + (i_b - start // BT - i_n) * BT
    return tl.where(begin >= start, slot, -1), begin, end


@triton.jit
def load_block(p, at, m_t, PITCH: tl.constexpr, WIDE: tl.constexpr, BT: tl.constexpr):
    """Return WIDE channels of BT tokens, whose rows are PITCH apart, zeros where m_t says so."""
    o = tl.arange(0, BT)[:, None] * PITCH + tl.arange(0, WIDE)[None, :]
    return tl.load(p + at + o, mask=m_t[:, None], other=0.0)


@triton.jit
def store_term(p, high, low, SIZE: tl.constexpr, PITCH: tl.constexpr, PRECISION: tl.constexpr):
    """Keep a term, or some columns of one, whose parts are SIZE and rows PITCH apart."""
    o = tl.arange(0, high.shape[0])[:, None] * PITCH + tl.arange(0, high.shape[1])[None, :]
    tl.store(p + o, high)
    if PRECISION != "fp16":
        tl.store(p + SIZE + o, low)


@triton.jit
def load_term(p, ROWS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the parts of a term [ROWS, WIDE], one behind the other, and where the next one is."""
    o = tl.arange(0, ROWS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    high = tl.load(p + o)
    low = high
    if PRECISION != "fp16":
        p += ROWS * WIDE
        low = tl.load(p + o)
    return high, low, p + ROWS * WIDE
