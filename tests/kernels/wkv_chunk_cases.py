"""Compilations of the blocked recurrences: name, kernel, types of arguments, constants, options."""

from __future__ import annotations

from typing import Any

import torch
from mrss_kernels import blocked, wkv6_chunk, wkv7_chunk

Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]

HEADS, SIZE = 32, 64
# The first form of a kernel is what CI compiles, so the quickest.
NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def cases() -> list[Case]:
    """Return what inputs of each dtype launch."""
    found: list[Case] = []
    for dtype, name in NAMES.items():
        types = dict.fromkeys(("p_r", "p_k", "p_v", "p_kk", "p_a"), name)
        types |= dict.fromkeys(("p_w", "p_y", "p_pool", "p_decay"), "*fp32")
        types |= {"p_slots": "*i64", "p_cu_seqlens": "*i64", "n": "i32"}
        form = wkv7_chunk.choose_form(HEADS, SIZE, dtype)
        assert form is not None
        types |= {"p_terms": NAMES[blocked.SCRATCH[form.precision]]}
        shape = {"H": HEADS, "N": SIZE, "BT": blocked.BLOCK_LEN, "PDL": True}
        shape |= {"PRECISION": form.precision}
        shape |= {"SIZE": wkv7_chunk.terms_size(SIZE, form.precision)}
        cut = {"BV": form.block_v, "STAGES": form.num_stages}
        for kernel, constants, num_warps in (
            (wkv7_chunk.wkv7_scan_kernel, shape | cut, form.num_warps),
            (wkv7_chunk.wkv7_terms_kernel, shape | {"BN": 8}, form.terms_warps),
        ):
            options = {"num_warps": num_warps, "launch_pdl": True}
            label = f"{kernel.__name__} {form.precision}"
            found.append((label, kernel, types, constants, options))
        form = wkv6_chunk.choose_form(SIZE, dtype)
        if form is None:
            continue
        types |= {"p_u": "*fp32", "y_scale": "fp32", "p_y": name}
        types |= {"p_terms": NAMES[blocked.SCRATCH[form.precision]]}
        shape |= {"SIZE": wkv6_chunk.terms_size(SIZE, form.precision)}
        shape |= {"SCALE": 1 / 64, "PRECISION": form.precision}
        cut = {"BV": form.block_v, "STAGES": form.num_stages}
        prepared = shape | {"BN": 8, "BC": 32, "LOWEST": wkv6_chunk.MIN_LOG_DECAY}
        limit = {"maxnreg": form.registers}
        for kernel, constants, options in (
            (wkv6_chunk.wkv6_scan_kernel, shape | cut, {"num_warps": form.num_warps} | limit),
            (wkv6_chunk.wkv6_terms_kernel, prepared, {"num_warps": form.terms_warps}),
        ):
            options |= {"launch_pdl": True}
            label = f"{kernel.__name__} {form.precision}"
            found.append((label, kernel, types, constants, options))
    return found
