"""The forms of the persistent decode step that are compiled without a GPU."""

from __future__ import annotations

from typing import Any

from mrss_kernels.linear_cuts import HOPPER_SHARED, NUM_MULTIPROCESSORS
from mrss_kernels.persistent7 import NUM_AHEAD, SLICE_LEN, num_parts, num_stages
from mrss_kernels.persistent7_kernel import NUM_COMPUTING_WARPS, persistent7_kernel
from triton.experimental.gluon import language as gl

RANKS = {1024: (64, 64, 128, 64), 2048: (128, 128, 256, 64)}
FORMS = [
    (2048, "fp16", "fp32", 8),
    (2048, "fp16", "fp16", 4),
    (2048, "fp16", "fp32", 12),
    (1024, "bf16", "fp32", 1),
]


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return label, kernel, types of the arguments, constants and options of every form."""
    return [_case(*form) for form in FORMS]


def _case(
    width: int, dtype: str, pool: str, rows: int
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    layout = gl.NVMMASharedLayout(128, 16)
    weight = f"tensordesc<{dtype}[64, 256],{layout!r}>"
    types = dict.fromkeys(("w_project", "w_up", "w_output", "w_key", "w_value"), weight)
    vectors = ("norm1", "norm2", "mix", "ffn_mix", "vectors", "shift_att", "shift_ffn", "x")
    types |= {f"p_{name}": "*fp32" for name in (*vectors, "first", "floats")}
    types |= {"p_mixed": f"*{dtype}", "p_halves": f"*{dtype}", "p_pool": f"*{pool}"}
    types |= {"p_groups": "*i32", "p_slots": "*i64"}
    counts = ("num_layers", "num_programs", "pool_stride", "shift_stride")
    types |= dict.fromkeys(counts, "i32")
    tiles = width // 64
    parts = [num_parts(size, tiles, NUM_MULTIPROCESSORS) for size in (width, 4 * width)]
    constants = {"B": rows, "C": width, "F": 4 * width, "PDL": True, "AHEAD": NUM_AHEAD}
    constants |= {"G": -(-rows * tiles // NUM_MULTIPROCESSORS), "SLICE": SLICE_LEN}
    constants |= dict(zip(("RW", "RA", "RG", "RV"), RANKS[width], strict=True))
    constants |= {"OUTPUT_PARTS": parts[0], "VALUE_PARTS": parts[1]}
    constants |= {"STAGES": num_stages(HOPPER_SHARED, width, parts[1], rows)}
    options = {"num_warps": NUM_COMPUTING_WARPS, "launch_pdl": True}
    return (
        f"persistent7_kernel {width} {dtype} {pool} {rows}",
        persistent7_kernel,
        types,
        constants,
        options,
    )
