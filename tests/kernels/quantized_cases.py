"""Compilations of the kernels of quantised weights, for `compile_kernels.py`."""

from __future__ import annotations

from typing import Any

from mrss_kernels import dequantize, quantized_kernels, rows_linear

_TYPES = {"p_x": "*fp16", "p_groups": "*i32", "p_y": "*fp32", "B": "i32", "R": "i32"}
_TYPES4 = _TYPES | {"p_w": "*u8", "p_scales": "*i32", "stride": "i32"}
_TYPES8 = _TYPES | {"p_scales": "*fp32"}
_CODES = {"int8": "*i8", "fp8": "*fp8e4nv"}
_PDL = {"num_warps": 4, "launch_pdl": True}

Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]


def cases() -> list[Case]:
    """Return name, kernel, types of the arguments, constants and options of every compilation."""
    found: list[Case] = []
    for grouped in (True, False):
        flags = {"GROUPED": grouped, "RELU2": not grouped, "PDL": True}
        label = "grouped" if grouped else "relu2"
        for form, codes in _CODES.items():
            types = _TYPES8 | {"p_w": codes}
            found += _eight_bits(f"{label} {form}", types, flags, has_asm=form == "int8")
        found += _four_bits(label, flags)
    for form, codes in _CODES.items():
        types = {"p_codes": codes, "p_scales": "*fp32", "p_out": "*fp16", "R": "i32"}
        constants = {"K": 2048, "BN": 16, "BK": 512, "ASM": 4 * (form == "int8")}
        kernel = dequantize.dequantize8_kernel
        found.append((f"dequantize8_kernel {form}", kernel, types, constants, {}))
    types = {"p_codes": "*u8", "p_scales": "*i32", "p_out": "*fp16", "R": "i32", "stride": "i32"}
    constants = {"K": 2048, "BN": 64, "ASM": 4}
    found.append(("dequantize4_kernel", dequantize.dequantize4_kernel, types, constants, {}))
    return found


def _eight_bits(
    label: str, types: dict[str, str], flags: dict[str, Any], *, has_asm: bool
) -> list[Case]:
    flags = flags | {"SPLITS": 1}
    one = {"K": 4096, "BN": 4, "BK": 4096, "SCALED": True, "EVEN": True, "ASM": 4 * has_asm}
    few = {"K": 2048, "BM": 8, "BN": 32, "BK": 128, "WARPS": 4, "STAGES": 4, "ASM": 4 * has_asm}
    wide = {"K": 2048, "BM": 32, "BN": 64, "BK": 128, "STAGES": 4, "ASM": 2 * has_asm}
    return [
        *_cases(rows_linear.gemv_kernel, label, types, [one | flags], num_warps=8),
        *_cases(
            quantized_kernels.few8_kernel, label, types, [few | flags, few | flags | {"BM": 16}]
        ),
        *_cases(
            quantized_kernels.wide8_kernel, label, types, [wide | flags, wide | flags | {"BM": 64}]
        ),
    ]


def _four_bits(label: str, flags: dict[str, Any]) -> list[Case]:
    flags = flags | {"SPLITS": 1}
    one = {"K": 4096, "BN": 8, "BP": 32, "ASM": 4}
    few = {"K": 2048, "BM": 8, "BN": 32, "WARPS": 4, "PAIRS": 1, "STAGES": 4, "ASM": 4}
    wide = {"K": 2048, "BM": 32, "BN": 64, "PAIRS": 1, "STAGES": 4, "ASM": 2}
    return [
        *_cases(quantized_kernels.gemv4_kernel, label, _TYPES4, [one | flags], num_warps=8),
        *_cases(
            quantized_kernels.few4_kernel, label, _TYPES4, [few | flags, few | flags | {"BM": 16}]
        ),
        *_cases(
            quantized_kernels.wide4_kernel,
            label,
            _TYPES4,
            [wide | flags, wide | flags | {"BM": 64}],
        ),
    ]


def _cases(
    kernel: Any,
    label: str,
    types: dict[str, str],
    constants: list[dict[str, Any]],
    *,
    num_warps: int = 4,
) -> list[Case]:
    found: list[Case] = []
    for each in constants:
        options = _PDL | {"num_warps": num_warps, "num_stages": each.get("STAGES", 3)}
        name = f"{kernel.__name__} {label} {each.get('BM', 1)}"
        found.append((name, kernel, types, each, options))
    return found
