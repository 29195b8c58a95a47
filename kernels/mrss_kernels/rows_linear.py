# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Products of few rows with large weights: the weights are streamed once, whatever the rows.

One row is a matrix-vector product on the ordinary cores; up to 64 rows go through the tensor
cores, padded to 8, 16, 32 or 64. `num_splits` cuts K; the parts are added up by whoever reads them,
in a fixed order, so no sum depends on timing. Derivation and measurements: kernels/README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrss_kernels._checks import (
    FLOATS,
    expect_contiguous,
    expect_device,
    expect_dtype,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch, shared_bytes
from mrss_kernels.caching import KEEP, STREAM
from mrss_kernels.linear_cuts import LinearConfig, choose_config, rows_a_program
from mrss_kernels.unpack_codes import widen

GROUP_LEN = 64
"""Output rows that share one input group: the granularity of `groups`."""

MAX_ROWS = 64
"""Rows from which a library product is the better choice (kernels/README.md, measured)."""

ACTIVATIONS = ("none", "relu2")


@triton.jit
def gemv_kernel(
    p_x,
    p_w,
    p_scales,
    p_groups,
    p_y,
    R,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    ASM: tl.constexpr,
    GROUPED: tl.constexpr,
    RELU2: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R / BN, SPLITS). x [M, K], w [R, K], y [SPLITS, R]; the first block comes early.

    Of a SCALED weight w are codes in 8 bits, and scales [R] what they are multiplied by.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_n = tl.program_id(0)
    i_s = tl.program_id(1)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    o_k = i_s * (K // SPLITS) + tl.arange(0, BK)
    m_n = (o_n < R)[:, None]
    p_tile = p_w + o_n[:, None] * K + o_k[None, :]
    # A weight is read once a step: what else is in the L2 is worth more.
    if EVEN:
        w = tl.load(p_tile, eviction_policy=STREAM)
    else:
        w = tl.load(p_tile, mask=m_n, other=0.0, eviction_policy=STREAM)
    if GROUPED:
        p_x += tl.load(p_groups + i_n * BN // 64) * K
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = widen(w, tl.float32, ASM) * tl.load(p_x + o_k).to(tl.float32)[None, :]
    for k in tl.static_range(BK, K // SPLITS, BK):
        p_next = p_tile + k
        if EVEN:
            w = tl.load(p_next, eviction_policy=STREAM)
        else:
            w = tl.load(p_next, mask=m_n, other=0.0, eviction_policy=STREAM)
        acc += widen(w, tl.float32, ASM) * tl.load(p_x + k + o_k).to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if SCALED:
        y *= tl.load(p_scales + o_n, mask=o_n < R, other=0.0)
    if RELU2:
        y = tl.maximum(y, 0.0)
        y = y * y
    y = y.to(p_y.dtype.element_ty)
    tl.store(p_y + i_s * R + o_n, y, mask=o_n < R, eviction_policy=KEEP)


@triton.jit
def wait_for_inputs(k):
    """Wait for the kernels before this one; return 0.

    What is read from an address that this 0 is part of cannot be read before the wait, however the
    compiler moves a loop's loads ahead; and `k` keeps the wait in the loop.
    """
    return tl.inline_asm_elementwise(
        "{ griddepcontrol.wait; mov.u32 $0, 0; }", "=r,r", [k], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def wait_for_copies(k, after):
    """At k = 0 wait until all copies under way have arrived; return 0.

    What is copied from an address that this 0 is part of is asked for after what `after` is part
    of has arrived.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.s32 p, $1, 0; @p cp.async.wait_group 0; and.b32 $0, $2, 0; }",
        "=r,r,r", [k, after], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def prefetch_columns(p_w, first_row, R, K: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr):
    """Ask COLUMNS columns of BN rows of w [R, K] into the L2, the first of them at p_w."""
    PIECES: tl.constexpr = 64 // BN if BN < 64 else 1
    o = tl.arange(0, BN * PIECES)
    row = tl.minimum(first_row.to(tl.int64) + o // PIECES, R - 1)
    address = (p_w + row * K + o % PIECES * (COLUMNS // PIECES)).to(tl.int64, bitcast=True)
    num_bytes = o * 0 + COLUMNS // PIECES * (p_w.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r", [address, num_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def skinny_kernel(
    p_x,
    p_w,
    p_groups,
    p_y,
    B,
    R,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PIECES: tl.constexpr,
    PREFETCH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPED: tl.constexpr,
    RELU2: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (R / BN, SPLITS, B / BM). x [M, B, K], w [R, K], y [SPLITS, B, R].

    A block is BK columns in PIECES. Of the first block, which is there before x is, a piece is
    asked for when the piece before it has arrived; of the second one PREFETCH columns come into
    the L2.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_n = tl.program_id(0)
    i_s = tl.program_id(1)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    m_n = (o_n < R)[:, None]
    m_m = (o_m < B)[:, None]
    BP: tl.constexpr = BK // PIECES
    o_k = i_s * (K // SPLITS) + tl.arange(0, BP)
    p_tile = p_w + o_n[:, None] * K + o_k[None, :]
    if GROUPED:
        p_x += tl.load(p_groups + i_n * BN // 64).to(tl.int64) * B * K
    p_rows = p_x + o_m[:, None] * K + o_k[None, :]
    if PDL and PREFETCH > 0:
        prefetch_columns(p_w + i_s * (K // SPLITS) + BK, i_n * BN, R, K, BN, PREFETCH)
    if K // SPLITS == BP:
        w = tl.load(p_tile) if EVEN else tl.load(p_tile, mask=m_n, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        x = tl.load(p_rows, mask=m_m, other=0.0)
        acc = tl.dot(w, tl.trans(x), input_precision="ieee")
    else:
        acc = tl.zeros([BN, BM], tl.float32)
        for k in tl.range(0, K // SPLITS, BK, num_stages=STAGES):
            w = (_load_piece(p_tile + k, m_n, EVEN),)
            after = k
            for i in tl.static_range(1, PIECES):
                if PDL:
                    after = wait_for_copies(k, after)
                    at = tl.multiple_of(k + after, 16) + i * BP
                else:
                    at = k + i * BP
                w = w + (_load_piece(p_tile + at, m_n, EVEN),)  # noqa: RUF005 (no * in Triton)
            # The first copies of weights are under way by then, and x is not asked for before.
            at = tl.multiple_of(k + wait_for_inputs(k), 16) if PDL else k
            for i in tl.static_range(PIECES):
                x = tl.load(p_rows + at + i * BP, mask=m_m, other=0.0)
                acc = tl.dot(w[i], tl.trans(x), acc, input_precision="ieee")
    if RELU2:
        acc = tl.maximum(acc, 0.0)
        acc = acc * acc
    p_out = p_y + (i_s * B + o_m).to(tl.int64)[None, :] * R + o_n[:, None]
    acc = acc.to(p_y.dtype.element_ty)
    tl.store(p_out, acc, mask=m_n & (o_m < B)[None, :], eviction_policy=KEEP)


@triton.jit
def _load_piece(p_tile, mask, EVEN: tl.constexpr):
    return tl.load(p_tile) if EVEN else tl.load(p_tile, mask=mask, other=0.0)


@triton.jit
def square_relu_kernel(p_x, total, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (total / BLOCK). x = max(x, 0)^2."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.maximum(tl.load(p_x + o, mask=o < total, other=0.0).to(tl.float32), 0.0)
    tl.store(p_x + o, (x * x).to(p_x.dtype.element_ty), mask=o < total)


def square_relu_(x: Tensor) -> Tensor:
    """Replace every element by `max(x, 0)^2`, what stands between the two products of an FFN.

    Args:
        x: any shape, fp16, bf16 or fp32, contiguous, *modified*.

    Returns:
        `x`.

    Raises:
        ValueError: a dtype, stride or device that the kernel cannot take.
    """
    expect_dtype("x", x, FLOATS)
    expect_contiguous("x", x)
    expect_device("x", x, x.device)
    if x.numel():
        grid = (-(-x.numel() // 2048),)
        square_relu_kernel[grid](x, x.numel(), BLOCK=2048, **dependent_launch(x.device))
    return x


def rows_linear(
    x: Tensor,
    weight: Tensor,
    groups: Tensor | None = None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    config: LinearConfig | None = None,
    one_part: bool = False,
) -> Tensor:
    """Multiply few rows by one weight, each group of 64 outputs reading its own input.

    The weight is read before the kernel launched just before is done: that one must not write it.

    `y[s, b, j] = sum over part s of K of x[groups[j // 64], b, :] * weight[j, :]`.

    Args:
        x: inputs [M, B, K] fp16, bf16 or fp32, contiguous; K a multiple of 64.
        weight: [R, K], dtype of `x`, contiguous; R any, but a multiple of 64 with `groups`.
        groups: int32 [R / 64], which of the M inputs each 64 outputs read; None: M is 1.
        activation: "none", or "relu2" for max(y, 0)^2, which needs a config of one part.
        out_dtype: dtype of y; parts are fp32 whatever it says.
        config: how to cut the product; None takes `choose_config`.
        one_part: choose a cut of one part, whose y needs no adding up.

    Returns:
        y [num_splits, B, R]: the parts of each sum, to be added up by the reader.

    Raises:
        ValueError: a shape, dtype, stride, device or option that the kernel cannot take.
    """
    _check_linear(x, weight, groups, activation)
    _, rows, size_k = x.shape
    size_r = weight.shape[0]
    config = config or choose_config(
        rows,
        size_r,
        size_k,
        splittable=activation == "none" and not one_part,
        shared_bytes=shared_bytes(x.device) if x.element_size() == 2 else 0,
    )
    check_config(config, rows, size_k, groups is not None, activation)
    if config.num_splits > 1:
        out_dtype = torch.float32
    y = x.new_empty((config.num_splits, rows, size_r), dtype=out_dtype)
    grid = (-(-size_r // config.block_n), config.num_splits)
    flags = {
        "K": size_k,
        "BN": config.block_n,
        "BK": config.block_k,
        "SPLITS": config.num_splits,
        "GROUPED": groups is not None,
        "RELU2": activation == "relu2",
        "EVEN": size_r % config.block_n == 0,
        "num_warps": config.num_warps,
    }
    flags |= dependent_launch(x.device)
    if rows == 1 and config.num_stages == 1:
        flags |= {"SCALED": False, "ASM": 0}
        gemv_kernel[grid](x, weight, None, groups, y, size_r, **flags)
    elif rows:
        block_m = rows_a_program(rows, config)
        flags |= {"BM": block_m, "STAGES": config.num_stages}
        flags |= {"PIECES": config.num_pieces, "PREFETCH": config.prefetch}
        skinny_kernel[(*grid, -(-rows // block_m))](
            x, weight, groups, y, rows, size_r, num_stages=config.num_stages, **flags
        )
    return y


def check_config(
    config: LinearConfig, rows: int, size_k: int, grouped: bool, activation: str
) -> None:
    """Raise `ValueError` unless `config` can cut a product of `rows` rows over `size_k`."""
    part = size_k // config.num_splits
    if size_k % config.num_splits or part % config.block_k:
        raise ValueError(
            f"K must be a multiple of num_splits * block_k = "
            f"{config.num_splits * config.block_k}, got {size_k}"
        )
    if config.block_k % (16 * config.num_pieces):
        raise ValueError(
            f"block_k must be a multiple of 16 * num_pieces = {16 * config.num_pieces}, "
            f"got {config.block_k}"
        )
    most = min(config.block_k, part - config.block_k)
    if config.prefetch % 64 or not 0 <= config.prefetch <= most:
        raise ValueError(
            f"prefetch must be a multiple of 64 that a second block has, got {config.prefetch}"
        )
    if config.num_stages == 1 and rows > 1:
        raise ValueError(f"num_stages must be 2 or more for {rows} rows, got {config.num_stages}")
    if grouped and GROUP_LEN % config.block_n:
        raise ValueError(f"block_n must divide {GROUP_LEN} with groups, got {config.block_n}")
    if activation != "none" and config.num_splits > 1:
        raise ValueError(f"num_splits must be 1 with an activation, got {config.num_splits}")


def _check_linear(x: Tensor, weight: Tensor, groups: Tensor | None, activation: str) -> None:
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            f"x must be [M, B, K] and weight [R, K], got {list(x.shape)} and {list(weight.shape)}"
        )
    size_r, size_k = weight.shape[0], x.shape[-1]
    expect_shape("weight", weight, (size_r, size_k))
    expect_dtype("x", x, FLOATS)
    expect_dtype("weight", weight, (x.dtype,))
    for name, tensor in (("x", x), ("weight", weight)):
        expect_contiguous(name, tensor)
        expect_device(name, tensor, x.device)
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
    expect_device("groups", groups, x.device)
