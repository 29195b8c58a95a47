# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Codes of quantised weights to numbers, in registers.

An integer becomes a fp16 number by its place: a byte under the exponent of 1024 is 1024 more than
its value. That is 1.25 instructions a number, all at full rate, which conversions do not have.
ASM chooses this form, and says how many codes of a row a thread has side by side: 4, or 2 in an
operand of `wgmma`. 0, as in the interpreter, converts types.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def int8_to_half(codes):
    """Return int8 codes as fp16, four at a time."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, offset;
        mov.b32 offset, 0x64806480;
        xor.b32 a, $2, 0x80808080;
        prmt.b32 b, a, 0x64646464, 0x5140;
        sub.rn.f16x2 $0, b, offset;
        prmt.b32 b, a, 0x64646464, 0x5342;
        sub.rn.f16x2 $1, b, offset;
        }""",
        "=r,=r,r",
        [codes],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def int8_pairs_to_half(codes):
    """Return int8 codes as fp16, two at a time."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, offset;
        mov.b32 offset, 0x64806480;
        xor.b32 a, $1, 0x8080;
        prmt.b32 a, a, 0x64646464, 0x5140;
        sub.rn.f16x2 $0, a, offset;
        }""",
        "=r,r",
        [codes],
        dtype=tl.float16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def int4_to_halves(codes):
    """Return what bytes' low and high four bits stand for as fp16, four bytes at a time."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, offset, sixteenth, shifted;
        mov.b32 offset, 0x64086408;
        mov.b32 sixteenth, 0x2c002c00;
        mov.b32 shifted, 0xd480d480;
        prmt.b32 a, $4, 0x64646464, 0x5140;
        prmt.b32 b, $4, 0x64646464, 0x5342;
        and.b32 c, a, 0x640f640f;
        sub.rn.f16x2 $0, c, offset;
        and.b32 c, b, 0x640f640f;
        sub.rn.f16x2 $1, c, offset;
        and.b32 c, a, 0x64f064f0;
        fma.rn.f16x2 $2, c, sixteenth, shifted;
        and.b32 c, b, 0x64f064f0;
        fma.rn.f16x2 $3, c, sixteenth, shifted;
        }""",
        "=r,=r,=r,=r,r",
        [codes],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def int4_pairs_to_halves(codes):
    """Return what bytes' low and high four bits stand for as fp16, two bytes at a time."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, c, offset, sixteenth, shifted;
        mov.b32 offset, 0x64086408;
        mov.b32 sixteenth, 0x2c002c00;
        mov.b32 shifted, 0xd480d480;
        prmt.b32 a, $2, 0x64646464, 0x5140;
        and.b32 c, a, 0x640f640f;
        sub.rn.f16x2 $0, c, offset;
        and.b32 c, a, 0x64f064f0;
        fma.rn.f16x2 $1, c, sixteenth, shifted;
        }""",
        "=r,=r,r",
        [codes],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def widen(w, dtype: tl.constexpr, ASM: tl.constexpr):
    """Return weights, or codes of 8 bits, in `dtype`; ASM is for int8 codes."""
    if ASM == 4:
        w = int8_to_half(w)
    elif ASM == 2:
        w = int8_pairs_to_half(w)
    return w.to(dtype)


@triton.jit
def unpack(codes, dtype: tl.constexpr, ASM: tl.constexpr):
    """Return what bytes' low and high four bits stand for in `dtype`, -8 to 7."""
    if ASM == 4:
        low, high = int4_to_halves(codes)
    elif ASM == 2:
        low, high = int4_pairs_to_halves(codes)
    else:
        low = (codes & 15).to(tl.int8) - 8
        high = (codes >> 4).to(tl.int8) - 8
    return low.to(dtype), high.to(dtype)


@triton.jit
def both_scales(packed):
    """Return the fp32 scales of a pair's two groups from the 32 bits that they are loaded as."""
    first = (packed & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    second = (packed >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32)
