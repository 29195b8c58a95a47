"""The ragged kernels' compilations: name, kernel, types of arguments, constants and options."""

from __future__ import annotations

from typing import Any

from mrss_kernels import lora_down7, ragged_index, ragged_norm, time_inputs7, time_output7

Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]

HALF = "*fp16"
RANKS = {"RW": 128, "RA": 128, "RG": 256, "RV": 64}
SUM = sum(RANKS.values())
SIZES = {"T": "i32", "n": "i32", "eps": "fp32"}
NORM = dict.fromkeys(("p_weight0", "p_bias0", "p_weight", "p_bias", "p_before"), "*fp32")
NORM |= {"p_shift": "*fp32", "p_mix": "*fp32", "p_sum": "*fp32", "p_out": HALF}
NORM |= {"p_x": "*fp32", "p_tokens": "*i64", "p_index": "*i32", "p_cu_seqlens": "*i64"}
NORM |= {"p_slots": "*i64", "p_gate": HALF, "p_h": "*fp32"} | SIZES
PLAIN = {"p_gate": None, "p_h": None, "UNSCALE": 1.0, "FIRST_SCALE": 1.0}
TIME = dict.fromkeys(("p_low", "p_in", "p_up", "p_first", "p_r", "p_k", "p_v"), HALF)
TIME |= dict.fromkeys(("p_kk", "p_a", "p_out", "p_x", "p_z"), HALF)
TIME |= dict.fromkeys(("p_w", "p_bonus", "p_vectors", "p_y", "p_offset"), "*fp32")
TIME |= {"p_index": "*i32"} | SIZES


def cases() -> list[Case]:
    """Return what small and large batches launch at 2048 channels."""
    pdl = {"launch_pdl": True}
    found: list[Case] = [
        ("ragged_index_kernel", ragged_index.ragged_index_kernel, NORM, {"BT": 64, "BN": 32}, {})
    ]
    kernel = ragged_index.ragged_tail_kernel
    found.append((kernel.__name__, kernel, NORM | {"p_rows": "*i64"}, {"BN": 64}, {}))
    whole = {"C": 2048, "BC": 2048, "PDL": True}
    no_lookup = dict.fromkeys(("p_tokens", "p_weight0", "p_bias0"))
    lookup = {"p_parts": None, "PARTS": 0} | PLAIN
    gated = no_lookup | {"UNSCALE": 64.0, "FIRST_SCALE": 1.0, "PARTS": 1}
    no_lookup |= PLAIN
    for name, parts, constants in (
        ("lookup many", HALF, lookup | {"BS": 2048, "BT": 8, "MIXES": 6}),
        ("lookup few", HALF, lookup | {"BS": 512, "BT": 1, "MIXES": 6}),
        ("many", HALF, no_lookup | {"BS": 2048, "BT": 8, "MIXES": 6, "PARTS": 1}),
        ("few", "*fp32", no_lookup | {"BS": 512, "BT": 1, "MIXES": 6, "PARTS": 4}),
        ("ffn", HALF, no_lookup | {"BS": 2048, "BT": 4, "MIXES": 1, "PARTS": 1}),
        ("gated many", HALF, gated | {"BS": 2048, "BT": 2, "MIXES": 1}),
        ("gated few", "*fp32", gated | {"BS": 512, "BT": 1, "MIXES": 1, "PARTS": 4}),
    ):
        types = NORM | {"p_parts": parts} | ({"p_x": HALF} if name.startswith("lookup") else {})
        kernel = ragged_norm.ragged_norm_mix_kernel
        label = f"{kernel.__name__} {name}"
        found.append((label, kernel, types, whole | constants, pdl | {"num_warps": 8}))
    kernel = ragged_norm.ragged_norm_last_kernel
    types = NORM | {"p_parts": HALF}
    last = whole | {"PARTS": 1, "UNSCALE": 64.0}
    found.append((kernel.__name__, kernel, types, last, pdl | {"num_warps": 8}))
    for tokens, (bm, bn, bk, warps, stages) in {
        "few": (32, 64, 128, 4, 4),
        "some": (64, 128, 64, 4, 4),
        "many": (128, 128, 64, 8, 3),
    }.items():
        kernel = lora_down7.lora_down_kernel
        constants = {"C": 2048, "BM": bm, "BN": bn, "BK": bk, "STAGES": stages, "PDL": True}
        options = pdl | {"num_warps": warps, "num_stages": stages}
        label = f"{kernel.__name__} {tokens}"
        types = TIME | {"p_w": HALF}
        found.append((label, kernel, types, RANKS | constants, options))
    head = {"H": 32, "N": 64, "BR": 64, "STAGES": 3, "PDL": True}
    for tokens, bm, parts in (("few", 16, 4), ("some", 32, 1), ("many", 64, 1)):
        stacked = tokens != "few"
        types = TIME if stacked else TIME | {"p_in": "*fp32", "p_low": "*fp32"}
        row = SUM if stacked else 3 * 2048 + SUM
        constants = head | {"BM": bm, "PARTS": parts, "R": row}
        kernel = time_inputs7.time_inputs7_kernel
        flags = {"STACKED": stacked} | RANKS
        options = pdl | {"num_warps": 4 if bm == 32 else 8}
        found.append((f"{kernel.__name__} {tokens}", kernel, types, constants | flags, options))
        kernel = time_output7.time_output7_kernel
        flags = {"FIRST": 256, "RG": 256, "SUM": SUM, "ACTIVATED": stacked}
        found.append((f"{kernel.__name__} {tokens}", kernel, types, constants | flags, options))
    return found
