# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""The second half of a LoRA of RWKV-7 over packed tokens, on the tensor cores.

No kernel here: those around the recurrence (`time_inputs7`, `time_output7`) multiply it themselves,
so that its result never lies in memory: at many tokens every [T, C] counts.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from mrss_kernels.lora_down7 import activate
from mrss_kernels.lora_up7 import sum_parts


class TimeCut(NamedTuple):
    """How these kernels are cut: tokens a program, warps, blocks of 64 ranks ahead."""

    block_m: int
    num_warps: int
    num_stages: int


def choose_cut(num_tokens: int) -> TimeCut:
    """Return the cut for T tokens: small blocks for latency, large ones to read weights seldom."""
    return TimeCut(16, 8, 3) if num_tokens <= 128 else TimeCut(64, 4, 3)


@triton.jit
def lora_up_tile(
    p_low, p_up, o_m, m_m, o_n, stride, R, BM: tl.constexpr, N: tl.constexpr, SUM: tl.constexpr,
    RANK: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Return act(low [BM, RANK]) @ up [N, RANK]^T, BR ranks at a time.

    low comes in parts, `stride` apart, of rows R apart; up has rows of SUM. ACT is a kind of
    `activate`, 0 for what is activated already.
    """
    o_d = tl.arange(0, BR)
    p_rows = p_low + o_m[:, None] * R + o_d[None, :]
    p_tile = p_up + o_n[:, None] * SUM + o_d[None, :]
    acc = tl.zeros([BM, N], tl.float32)
    for i in tl.range(0, RANK, BR, num_stages=STAGES):
        up = tl.load(p_tile + i)
        z = sum_parts(p_rows + i, m_m, stride, PARTS)
        if ACT > 0:
            z = activate(z, ACT)
        acc = tl.dot(z.to(up.dtype), tl.trans(up), acc, input_precision="ieee")
    return acc
