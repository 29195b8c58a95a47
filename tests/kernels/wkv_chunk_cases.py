"""Compilations of the blocked recurrence: name, kernel, types of arguments, constants, options."""

from __future__ import annotations

from typing import Any

import torch
from mrss_kernels import wkv7_chunk

Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]

HEADS, SIZE = 32, 64
NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def cases() -> list[Case]:
    """Return what inputs of each dtype launch."""
    found: list[Case] = []
    for dtype, name in NAMES.items():
        types = dict.fromkeys(("p_r", "p_k", "p_v", "p_kk", "p_a"), name)
        types |= dict.fromkeys(("p_w", "p_y", "p_pool", "p_decay"), "*fp32")
        types |= {"p_slots": "*i64", "p_cu_seqlens": "*i64", "n": "i32"}
        form = wkv7_chunk.choose_form(HEADS, SIZE, dtype)
        assert form is not None
        types |= {"p_terms": NAMES[wkv7_chunk.SCRATCH[form.precision]]}
        shape = {"H": HEADS, "N": SIZE, "BT": wkv7_chunk.BLOCK_LEN, "PDL": True}
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
    return found
