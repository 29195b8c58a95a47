"""What `compile_kernels.py` compiles of the tail of a step: up to 32 rows a request."""

from __future__ import annotations

from typing import Any

from mrss_kernels import allowed_tokens, draw_token, find_candidates, gate_rows, merge_rows

FLOATS = (
    "p_logits p_floats p_named p_gates p_bias p_counts p_part_max p_part_mass p_parts p_row_max "
    "p_row_mass p_row_log_mass p_row_weight p_merged p_scores p_top p_mass p_merged_top "
    "p_merged_mass p_low p_plan p_candidates p_log_probs"
)
INTS = (
    "p_ints p_rule p_arrived p_best_id p_cell p_level_mass p_level_count p_least_cell p_offset "
    "p_count p_num_candidates p_candidate_ids p_bracket p_num_undecided p_allowed"
)
TYPES = dict.fromkeys(FLOATS.split(), "*fp32")
TYPES |= dict.fromkeys(INTS.split(), "*i32")
TYPES |= dict.fromkeys(("p_seeds", "p_token_ids", "p_ids", "p_bins", "p_sums"), "*i64")
TYPES |= {"p_banned": "*u8", "p_marks": "*u8", "G": "i32", "per": "i32"}
SIZES = ((65536, 1024), (65529, 1024), (262144, 2048))


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return name, kernel, types of the arguments, constants and options of every compilation."""
    return [case for vocab, block in SIZES for case in _cases(vocab, block)]


def _cases(
    vocab: int, block: int
) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    num_blocks = -(-vocab // block)
    sizes = {"V": vocab, "NB": num_blocks, "BLOCK": block, "PDL": True}
    padded = {**sizes, "NBP": num_blocks}
    gate = {**padded, "KT": 8192 // block, "KB": 32}
    pick = {**padded, "PAIRS": 256, "FEW": 64, "WIDTH": 8, "TILE": 1024}
    find = {**sizes, "PAIRS": 256, "CHUNK": 1024}
    allow = {"V": vocab, "BLOCK": block, "PDL": True}
    warps = block // 128
    stats, gates = gate_rows.row_stats_kernel, gate_rows.gate_kernel
    merge, draw = merge_rows.merge_rows_kernel, draw_token.draw_token_kernel
    found: list[tuple[str, Any, dict[str, Any], int]] = [
        ("allow_tokens_kernel", allowed_tokens.allow_tokens_kernel, allow, warps),
        ("row_stats_kernel", stats, gate, warps),
        ("gate_kernel", gates, gate | {"KL": 4096 // block}, warps),
        ("find_candidates_kernel", find_candidates.find_candidates_kernel, find, 4),
    ]
    # The first form of a kernel is what CI compiles, so the quickest.
    for truncate in (False, True):
        label = "truncated" if truncate else "whole"
        flags = {"TRUNCATE": truncate}
        found.append((f"draw_token_kernel {label}", draw, pick | flags, 8))
        for mixed in (False, True):
            name = f"merge_rows_kernel {label} {'mixed' if mixed else 'single'}"
            found.append(
                (
                    name,
                    merge,
                    padded | flags | {"KT": 4, "MIXED": mixed},
                    warps if mixed else warps // 2,
                )
            )
    # Other sizes: the variants that need most registers are enough.
    largest = ("allow", "row_stats", "gate", "merge_rows_kernel truncated mixed", "draw", "find")
    if vocab != SIZES[0][0]:
        found = [one for one in found if one[0].startswith(largest) and "whole" not in one[0]]
    return [
        (
            f"{name} {vocab}",
            kernel,
            TYPES,
            constants,
            {"num_warps": warps, "launch_pdl": True, "enable_fp_fusion": False},
        )
        for name, kernel, constants, warps in found
    ]
