"""What to compile of RWKV-6's fused decode step."""

from __future__ import annotations

import itertools
from typing import Any

from mrss_kernels import ffn6, norm_mix6, time_mix6

HALF = "*fp16"
POOLS = {"*fp32": "fp32", "*fp16": "fp16"}
NORM6 = dict.fromkeys(("p_x", "p_parts", "p_gate", "p_shift", "p_mix", "p_sum", "p_h"), "*fp32")
NORM6 |= dict.fromkeys(("p_weight0", "p_bias0", "p_weight", "p_bias"), "*fp32")
NORM6 |= {"p_tokens": "*i64", "p_slots": "*i64", "p_down": HALF, "p_out": HALF, "B": "i32"}
NORM6 |= {"R": "i32", "eps": "fp32", "unscale": "fp32", "key_scale": "fp32"}
MIX6 = dict.fromkeys(("p_in", "p_low", "p_vectors", "p_h", "p_shift", "p_offset"), "*fp32")
MIX6 |= dict.fromkeys(("p_codes", "p_mix"), "*fp32")
MIX6 |= {"p_up": HALF, "p_slots": "*i64", "p_out": HALF, "B": "i32", "eps": "fp32"}
MIX6 |= {"out_scale": "fp32"}
FFN6 = {"p_x": HALF, "p_w": HALF, "p_key": HALF, "p_gate": "*fp32"}
FFN6 |= dict.fromkeys(("B", "F", "R"), "i32")


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return what `compile_kernels.cases` returns."""
    found: list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]] = []
    for width, mixes, down, num_warps in (
        (2048, 1, True, 8), (4096, 1, True, 16), (2048, 1, False, 16), (4096, 2, False, 16),
        (2048, 0, False, 8),
    ):  # fmt: skip
        embed = mixes == 1 and not down
        constants = {"C": width, "BC": width, "BS": 32 if down else 256, "MIXES": mixes}
        constants |= {"BN": width // 1024, "DOWN": down, "PARTS": 1 if down else 4, "PDL": True}
        constants |= {"EMBED": embed, "NORM0": embed, "GATED": mixes < 2}
        types = NORM6 | {"p_out": "*fp32"} if down or not mixes else NORM6
        label = f"norm_mix6_kernel {width} {mixes} {'codes' if down else 'apart'}"
        options = {"num_warps": num_warps, "launch_pdl": True}
        found.append((label, norm_mix6.norm_mix6_kernel, types, constants, options))
    for rows, rank in ((1, 32), (1, 64), (16, 32), (32, 64)):
        constants = {"C": 2048, "D": rank, "BD": rank, "PARTS": 1 if rows == 1 else 4}
        constants |= {"BM": rows, "BN": 64, "PDL": True}
        options = {"num_warps": 4, "launch_pdl": True}
        label = f"mix_inputs_kernel {rows} {rank}"
        found.append((label, time_mix6.mix_inputs_kernel, MIX6, constants, options))
    for (pool, name), num_warps in itertools.product(POOLS.items(), (2, 4, 8)):
        rank = 64 if num_warps < 8 else 128
        constants = {"H": 32, "N": 64, "R": 4 * 2048 + rank, "W": rank, "BW": rank, "PARTS": 1}
        constants |= {"STACKED": num_warps == 2, "OFFSET": num_warps == 4, "PDL": True}
        types = MIX6 | {"p_pool": pool}
        options = {"num_warps": num_warps, "launch_pdl": True}
        label = f"time_mix6_kernel {name} {num_warps} warps"
        found.append((label, time_mix6.time_mix6_kernel, types, constants, options))
    for width, block_n, block_k, num_warps in ((2048, 4, 1024, 4), (4096, 4, 2048, 8)):
        constants = {"K": width, "BN": block_n, "BK": block_k, "PDL": True}
        options = {"num_warps": num_warps, "launch_pdl": True}
        kernel = ffn6.key_receptance_gemv_kernel
        found.append((f"{kernel.__name__} {width}", kernel, FFN6, constants, options))
    for rows, stages in ((16, 4), (64, 3)):
        constants = {"K": 2048, "BM": rows, "BN": 64, "BK": 128, "STAGES": stages, "PDL": True}
        options = {"num_warps": 4, "num_stages": stages, "launch_pdl": True}
        kernel = ffn6.key_receptance_kernel
        found.append((f"{kernel.__name__} {rows}", kernel, FFN6, constants, options))
    return found
