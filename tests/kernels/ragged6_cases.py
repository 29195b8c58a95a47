"""Compilations of RWKV-6's ragged kernels: name, kernel, types, constants and options."""

from __future__ import annotations

from typing import Any

from mrss_kernels import ragged_inputs6, ragged_mix6

Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]

HALF = "*fp16"
TYPES = dict.fromkeys(("p_codes", "p_in", "p_low", "p_up", "p_out", "p_gate"), HALF)
TYPES |= dict.fromkeys(("p_h", "p_mix", "p_before", "p_vectors", "p_w", "p_offset"), "*fp32")
TYPES |= {"p_index": "*i32", "p_y": HALF, "T": "i32", "eps": "fp32", "out_scale": "fp32"}
FEW = dict.fromkeys(("p_codes", "p_in", "p_low", "p_y"), "*fp32")


def cases() -> list[Case]:
    """Return what few and many tokens launch at 2048 and 4096 channels."""
    found: list[Case] = []
    for tokens, block_m, width, rank, decay_rank in (
        ("many", 64, 2048, 32, 64),
        ("few", 16, 2048, 32, 64),
        ("many of 7B", 64, 4096, 64, 128),
    ):
        is_few = tokens == "few"
        types = TYPES | FEW if is_few else TYPES
        head = {"H": width // 64, "N": 64, "BM": block_m, "PDL": True}
        flags = {"C": width, "D": rank, "BD": rank, "INPUTS": 5, "BN": 64}
        decay = {"R": 4 * width + decay_rank if is_few else decay_rank, "W": decay_rank}
        decay |= {"BW": decay_rank, "STACKED": not is_few}
        parts = {"PARTS": 4 if is_few else 1}
        for kernel, constants in (
            (ragged_inputs6.ragged_inputs6_kernel, flags | parts),
            (ragged_mix6.time_inputs6_kernel, decay | parts),
            (ragged_mix6.time_output6_kernel, {}),
        ):
            own = {k: v for k, v in (head | constants).items() if k in kernel.arg_names}
            options = {"num_warps": 4, "launch_pdl": True}
            found.append((f"{kernel.__name__} {tokens}", kernel, types, own, options))
    return found
