# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Products of few rows with weights in 8 or 4 bits: only codes and scales are read.

As `rows_linear`: one row on the ordinary cores, more on the tensor cores, K in parts that their
reader adds up in order. Sums are fp32, and the result is that of the weights that codes and scales
stand for exactly, not of a rounded copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrss_kernels._checks import expect_contiguous, expect_device, expect_dtype, expect_shape
from mrss_kernels._launch import dependent_launch, shared_bytes
from mrss_kernels.linear_cuts import HOPPER_SHARED, LinearConfig
from mrss_kernels.quantized import PAIR_SIZE, QuantizedWeight, check_quantized
from mrss_kernels.quantized_kernels import (
    few4_kernel,
    few8_kernel,
    gemv4_kernel,
    wide4_kernel,
    wide8_kernel,
)
from mrss_kernels.rows_linear import (
    ACTIVATIONS,
    GROUP_LEN,
    check_config,
    gemv_kernel,
)

WIDE = 64
"""Outputs of a program from which it takes `wgmma`; of fewer, its warps divide K."""


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    groups: Tensor | None = None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    config: LinearConfig | None = None,
    one_part: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply few rows by one quantised weight; as `rows_linear.rows_linear`.

    Args:
        x: inputs [M, B, K] in the dtype of `weight`, contiguous; K a multiple of 64.
        weight: [R, K]; R any, but a multiple of 64 with `groups`.
        groups: int32 [R / 64], which of the M inputs each 64 outputs read; None: M is 1.
        activation: "none", or "relu2" for max(y, 0)^2, which needs a config of one part.
        out_dtype: dtype of y; parts are fp32 whatever it says.
        config: how to cut the product; None takes `choose_quantized_config`.
        one_part: choose a cut of one part, whose y needs no adding up.
        out: where to put y of one part, [B, R] in `out_dtype`, contiguous; or None.

    Returns:
        y [num_splits, B, R]: the parts of each sum, to be added up by the reader.

    Raises:
        ValueError: a shape, dtype, stride, device or option that the kernel cannot take.
    """
    _check(x, weight, groups, activation)
    _, rows, size_k = x.shape
    size_r = len(weight)
    config = config or choose_quantized_config(
        weight.format,
        rows,
        size_r,
        size_k,
        splittable=activation == "none" and not one_part and out is None,
        shared_bytes=shared_bytes(x.device),
    )
    check_config(config, rows, size_k, groups is not None, activation)
    _check_warps(weight.format, config)
    if config.num_splits > 1:
        out_dtype = torch.float32
    if out is None:
        y = x.new_empty((config.num_splits, rows, size_r), dtype=out_dtype)
    else:
        expect_shape("out", out, (rows, size_r))
        expect_dtype("out", out, (out_dtype,))
        expect_contiguous("out", out)
        y = out[None]
    if rows:
        launch = _launch4 if weight.format == "int4" else _launch8
        launch(x, weight, groups, y, config, activation == "relu2")
    return y


def choose_quantized_config(
    form: str, rows: int, size_r: int, size_k: int, *, splittable: bool, shared_bytes: int = 0
) -> LinearConfig:
    """Return the cut for `rows` rows with a weight [size_r, size_k], measured for 1.5B on an H100.

    It depends on nothing else but what a program may have of shared memory, so that a row bucket
    always adds in the same order.
    """
    if rows == 1:
        return _cut_one_row(form, size_r, size_k, splittable)
    step = PAIR_SIZE if form == "int4" else GROUP_LEN
    is_wide = rows > 16 or (form == "int4" and size_r > 16384)
    num_parts = 1
    if splittable:
        most = _most_parts(form, size_r, size_k, is_wide=is_wide)
        while 2 * num_parts <= most and size_k % (8 * step * num_parts) == 0:
            num_parts *= 2
    part = size_k // num_parts
    has_room = not shared_bytes or shared_bytes >= HOPPER_SHARED
    if is_wide:
        is_long = rows <= 16 or (form != "int4" and splittable and size_k <= 4096)
        block_k = min(256 if is_long and has_room else 128, part & -part)
        return LinearConfig(WIDE, block_k, num_parts, 4, 3 if block_k == 256 else 4)
    # Each warp has one or two steps of a block.
    num_warps = min(part // step & -(part // step), 4)
    is_long = part % (2 * step * num_warps) == 0 and (form != "int4" or has_room)
    block_k = (2 if is_long else 1) * step * num_warps
    if form == "int4":
        return LinearConfig(16, block_k, num_parts, num_warps, 3 if is_long else 4)
    block_n = 32 if size_r > 16384 or (splittable and size_r > 4096) else 16
    return LinearConfig(block_n, block_k, num_parts, num_warps, 3 if block_n == 32 else 4)


def _most_parts(form: str, size_r: int, size_k: int, *, is_wide: bool) -> int:
    """Return in how many parts K may be cut so that there are programs enough."""
    if is_wide:
        return 4 if form == "int4" or size_r <= 4096 else 2
    if form == "int4":
        return 4 if size_r <= 4096 else 1
    return min(size_k // 1024, 4) if size_r <= 4096 else 2


def _cut_one_row(form: str, size_r: int, size_k: int, splittable: bool) -> LinearConfig:
    num_parts = 1
    if size_k % 4096 == 0 and splittable and size_k > size_r:
        num_parts = size_k // 4096
    part = size_k // num_parts
    block_k = min(part & -part, 2048 if form == "int4" else 4096)
    if block_k < 1024:
        return LinearConfig(16, block_k, num_parts, 4)
    if form == "int4":
        num_warps = 8 if num_parts == 1 and size_r <= size_k else 4
        return LinearConfig(8 if num_parts == 1 else 4, block_k, num_parts, num_warps)
    if block_k == 2048 and size_k < size_r < 8192:
        return LinearConfig(4, 1024, num_parts, 2)
    return LinearConfig(
        8 if block_k == 1024 else 4, block_k, num_parts, 8 if block_k == 4096 else 4
    )


def _launch8(x, weight, groups, y, config, is_squared) -> None:
    num_splits, rows, size_r = y.shape
    grid = (-(-size_r // config.block_n), num_splits)
    has_asm = x.device.type == "cuda" and weight.format == "int8"
    flags = {"K": x.shape[2], "BN": config.block_n, "SPLITS": num_splits}
    flags |= {"GROUPED": groups is not None, "RELU2": is_squared}
    flags |= {"num_warps": config.num_warps} | dependent_launch(x.device)
    if rows == 1 and config.num_stages == 1:
        flags |= {"BK": config.block_k, "SCALED": True, "EVEN": size_r % config.block_n == 0}
        flags |= {"ASM": 4 * has_asm}
        gemv_kernel[grid](x, weight.codes, weight.scales, groups, y, size_r, **flags)
        return
    block_m = _block_m(rows, config)
    flags |= {"BM": block_m, "STAGES": config.num_stages, "num_stages": config.num_stages}
    if config.block_n >= WIDE:
        kernel = wide8_kernel
        flags |= {"BK": config.block_k, "ASM": 2 * has_asm}
    else:
        kernel = few8_kernel
        flags |= {"BK": config.block_k // config.num_warps, "WARPS": config.num_warps}
        flags |= {"ASM": 4 * has_asm}
    kernel[(*grid, -(-rows // block_m))](
        x, weight.codes, weight.scales, groups, y, rows, size_r, **flags
    )


def _launch4(x, weight, groups, y, config, is_squared) -> None:
    num_splits, rows, size_r = y.shape
    grid = (-(-size_r // config.block_n), num_splits)
    has_asm = x.device.type == "cuda"
    # Both scales of a pair at once.
    scales = weight.scales.view(torch.int32)
    stride = scales.stride(0)
    flags = {"K": x.shape[2], "BN": config.block_n, "SPLITS": num_splits}
    flags |= {"GROUPED": groups is not None, "RELU2": is_squared}
    flags |= {"num_warps": config.num_warps} | dependent_launch(x.device)
    num_pairs = config.block_k // PAIR_SIZE
    if rows == 1 and config.num_stages == 1:
        flags |= {"BP": num_pairs, "ASM": 4 * has_asm}
        gemv4_kernel[grid](x, weight.codes, scales, groups, y, size_r, stride, **flags)
        return
    block_m = _block_m(rows, config)
    flags |= {"BM": block_m, "STAGES": config.num_stages, "num_stages": config.num_stages}
    if config.block_n >= WIDE:
        kernel = wide4_kernel
        flags |= {"PAIRS": num_pairs, "ASM": 2 * has_asm}
    else:
        kernel = few4_kernel
        flags |= {"PAIRS": num_pairs // config.num_warps, "WARPS": config.num_warps}
        flags |= {"ASM": 4 * has_asm}
    kernel[(*grid, -(-rows // block_m))](
        x, weight.codes, scales, groups, y, rows, size_r, stride, **flags
    )


def _block_m(rows: int, config: LinearConfig) -> int:
    blocks = (16, 32, 64) if config.block_n >= WIDE else (8, 16, 32, 64)
    return next(block for block in blocks if rows <= block or block == 64)


def _check_warps(form: str, config: LinearConfig) -> None:
    if config.num_stages == 1:
        return
    sharers = 1 if config.block_n >= WIDE else config.num_warps
    least = (PAIR_SIZE if form == "int4" else 16) * sharers
    if config.block_k % least:
        raise ValueError(f"block_k must be a multiple of {least}, got {config.block_k}")


def _check(x: Tensor, weight: QuantizedWeight, groups: Tensor | None, activation: str) -> None:
    check_quantized("weight", weight)
    size_r, size_k = weight.shape
    if x.dim() != 3 or x.shape[2] != size_k:
        raise ValueError(f"x must be [M, B, {size_k}], got {list(x.shape)}")
    expect_dtype("x", x, (weight.dtype,))
    expect_contiguous("x", x)
    expect_device("x", x, weight.device)
    if size_k % GROUP_LEN:
        raise ValueError(f"K must be a multiple of {GROUP_LEN}, got {size_k}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if groups is None:
        expect_shape("x", x, (1, *x.shape[1:]))
        return
    if size_r % GROUP_LEN:
        raise ValueError(f"R must be a multiple of {GROUP_LEN} with groups, got {size_r}")
    expect_shape("groups", groups, (size_r // GROUP_LEN,))
    expect_dtype("groups", groups, (torch.int32,))
    expect_device("groups", groups, weight.device)
