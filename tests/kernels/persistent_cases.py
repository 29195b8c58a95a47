"""The forms of the persistent decode step that are compiled without a GPU."""

from __future__ import annotations

from typing import Any

from mrss_kernels.linear_cuts import HOPPER_SHARED, NUM_MULTIPROCESSORS
from mrss_kernels.persistent7_cuts import find_cuts
from mrss_kernels.persistent7_kernel import NUM_COMPUTING_WARPS, persistent7_kernel
from persistent_sizes import RANKS, UP_RANKS
from triton.experimental.gluon import language as gl

FORMS = [
    # What CI compiles, so the quickest: with all of a product's inputs at once, and in chunks.
    (1024, "bf16", "fp32", 1),
    (4096, "fp16", "fp32", 1),
    (2048, "fp16", "fp32", 8),
    (2048, "fp16", "fp16", 4),
    (2048, "fp16", "fp32", 16),
    (2048, "fp16", "fp32", 32),
    (4096, "bf16", "fp32", 8),
    (4096, "fp16", "fp32", 9),
]


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return label, kernel, types of the arguments, constants and options of every form."""
    return [_case(*form) for form in FORMS]


def _case(
    width: int, dtype: str, pool: str, rows: int
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    layout = gl.NVMMASharedLayout(128, 16)
    weight = f"tensordesc<{dtype}[64, 256],{layout!r}>"
    in_states = gl.NVMMASharedLayout(128, 32 if pool == "fp32" else 16)
    types = dict.fromkeys(("w_project", "w_up", "w_output", "w_key", "w_value"), weight)
    types["w_states"] = f"tensordesc<{pool}[64, 64],{in_states!r}>"
    vectors = ("norm1", "norm2", "mix", "ffn_mix", "vectors", "shift_att", "shift_ffn", "x")
    types |= {f"p_{name}": "*fp32" for name in (*vectors, "first", "floats")}
    types |= {"p_mixed": f"*{dtype}", "p_halves": f"*{dtype}", "p_pool": f"*{pool}"}
    types |= {"p_groups": "*i32", "p_help": "*i32", "p_slots": "*i64"}
    counts = [
        "num_layers",
        "keep_states",
        "num_programs",
        "num_slots",
        "pool_stride",
        "shift_stride",
    ]
    counts += [f"ahead_{name}" for name in ("project", "up", "output", "key", "value")]
    types |= dict.fromkeys(counts, "i32")
    ranks, up = RANKS[width], UP_RANKS[width]
    cuts = find_cuts(rows, width, sum(ranks), sum(up), NUM_MULTIPROCESSORS, HOPPER_SHARED)
    constants = {"B": rows, "C": width, "F": 4 * width, "PDL": True, "G": cuts.group}
    constants |= {"R": 3 * width + sum(ranks)}
    constants |= dict(zip(("RW", "RA", "RG", "RV"), up, strict=True))
    constants |= {f"LOW_{name}": sum(ranks[: i + 1]) for i, name in enumerate("AGV")}
    constants |= {"OUTPUT_PARTS": cuts.output_parts, "VALUE_PARTS": cuts.value_parts}
    constants |= {"HELPED": cuts.helped, "HELP_LEN": max(cuts.help) * 256}
    constants |= {"STAGES": cuts.num_stages, "INPUT_BLOCKS": cuts.input_blocks}
    constants |= {"CHUNK": cuts.chunk, "SLICE": cuts.slice_len}
    options = {"num_warps": NUM_COMPUTING_WARPS, "launch_pdl": True}
    return (
        f"persistent7_kernel {width} {dtype} {pool} {rows}",
        persistent7_kernel,
        types,
        constants,
        options,
    )
