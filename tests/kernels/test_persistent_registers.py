"""Which numbers a thread of the persistent decode step has in which of its registers.

`await_words` takes neighbours in a thread's registers for neighbours in memory, and the first ones
for those of rows that are there. Layouts and widths are read from the kernels' sources; the order
is that of Triton's own linear layouts.
"""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import pytest
from mrss_kernels.linear_cuts import HOPPER_SHARED, NUM_MULTIPROCESSORS
from mrss_kernels.persistent7_choice import ROWS
from mrss_kernels.persistent7_cuts import find_cuts, padded
from persistent_sizes import RANK_SUMS

NUM_THREADS = 128
WIDTHS = tuple(RANK_SUMS)


def kernels() -> dict[str, Any]:
    # Not above: every worker would load Gluon.
    from mrss_kernels import persistent7_norm as norm
    from mrss_kernels import persistent7_products as products
    from mrss_kernels import persistent7_time as time
    from mrss_kernels import persistent7_time_inputs as time_inputs

    return {**vars(norm), **vars(products), **vars(time_inputs), **vars(time)}


def evaluated(node: ast.expr, sizes: dict[str, int]) -> Any:
    from triton.experimental.gluon import language as gl

    return eval(compile(ast.Expression(node), "kernel", "eval"), {"gl": gl, **sizes})


def constant_in(kernel: str, name: str, **sizes: int) -> Any:
    """Return a constant as a kernel's source computes it from sizes."""
    nodes = ast.walk(ast.parse(kernels()[kernel].src))
    found = [
        node.value
        for node in nodes
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name
    ]
    assert len(found) == 1
    return evaluated(found[0], sizes)


def arguments_in(kernel: str, **sizes: int) -> list[int]:
    """Return the width that a kernel calls `await_words` with, and which groups live if it says."""
    nodes = ast.walk(ast.parse(kernels()[kernel].src))
    (call,) = [
        node
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "await_words"
    ]
    return [evaluated(node, sizes) for node in call.args[1:3]]


def combined(bases: list[list[int]], num_dims: int) -> np.ndarray:
    """Return where each index of a linear layout's dimension points to [2^len(bases), dims]."""
    found = np.zeros((1, num_dims), int)
    for base in bases:
        found = np.concatenate([found, found ^ np.array(base)])
    return found


def elements_of(layout: Any, shape: list[int]) -> np.ndarray:
    """Return which element each thread holds in each register [128, registers, dims]."""
    from triton._C.libtriton import gluon_ir, ir

    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    linear = builder.to_linear_layout(layout._to_ir(builder), shape)
    registers, lanes, warps = (
        combined(bases, len(shape))
        for bases in (linear.reg_bases, linear.lane_bases, linear.warp_bases)
    )
    held = warps[:, None, None] ^ lanes[None, :, None] ^ registers
    return held.reshape(NUM_THREADS, -1, len(shape))


def staged_forms() -> set[tuple[int, int]]:
    """Return for how many padded rows, of how many columns each, inputs come all at once."""
    found = set()
    for width in WIDTHS:
        for rows in ROWS:
            cuts = find_cuts(rows, width, *RANK_SUMS[width], NUM_MULTIPROCESSORS, HOPPER_SHARED)
            if not cuts.chunk:
                parts = width // cuts.output_parts, 4 * width // cuts.value_parts
                found |= {(padded(rows), size) for size in (width, *parts)}
            if not cuts.chunk or max(cuts.help) <= cuts.chunk:
                found.add((padded(rows), 256 * max(cuts.help)))
    return found


def staged(rows: int, size_k: int) -> tuple[np.ndarray, int]:
    """Return what threads hold of the inputs of a product, and how many neighbours."""
    wide = constant_in("stage_rows", "WIDE", K=size_k)
    layout = constant_in("stage_rows", "LAYOUT", WIDE=wide)
    return elements_of(layout, [rows, size_k // 2 // wide, wide]), wide


def expect_neighbours(held: np.ndarray, width: int) -> None:
    """Check that of so many registers each is the next element of the last dimension."""
    assert held.shape[0] == NUM_THREADS
    groups = held.reshape(NUM_THREADS, -1, width, held.shape[-1])
    steps = np.zeros(groups.shape[2:], int)
    steps[:, -1] = range(width)
    assert (groups == groups[:, :, :1] + steps).all()
    # A read of so many words starts at a multiple of them.
    assert (groups[:, :, 0, -1] % width == 0).all()
    everything = held.reshape(-1, held.shape[-1])
    assert len(np.unique(everything, axis=0)) == len(everything)


def test_a_products_inputs_are_read_in_whole_vectors_and_no_row_that_is_none() -> None:
    for num_rows, size_k in staged_forms():
        held, wide = staged(num_rows, size_k)
        assert held.shape[1] * NUM_THREADS == num_rows * size_k // 2
        expect_neighbours(held, wide)
        for rows in (rows for rows in ROWS if padded(rows) == num_rows):
            width, live = arguments_in("stage_rows", B=rows, K=size_k, WIDE=wide)
            assert width == wide
            assert (held[:, : live * width, 0] < rows).all()
            assert (held[:, live * width :, 0] >= rows).all()


@pytest.mark.parametrize("num_rows", [8, 16, 32])
def test_a_chunk_of_a_products_inputs_is_read_in_whole_vectors(num_rows: int) -> None:
    layout = constant_in("multiply_chunks", "LAYOUT")
    expect_neighbours(elements_of(layout, [num_rows, 64, 4]), *arguments_in("_stage_chunk"))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_of_a_norm_is_read_in_whole_vectors(width: int) -> None:
    held = elements_of(constant_in("norm_unit", "LAYOUT"), [4, width // 16, 4])
    expect_neighbours(held, *arguments_in("norm_unit"))


def test_the_vectors_of_a_head_are_read_in_pairs_a_row_a_warp() -> None:
    held = elements_of(constant_in("time_mix_unit", "VECTOR"), [4, 64])
    expect_neighbours(held, *arguments_in("load_inputs"))
    assert (held[:, :, 0] == np.arange(NUM_THREADS)[:, None] // 32).all()
