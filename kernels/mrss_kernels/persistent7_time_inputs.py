# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="assignment, misc"
"""What time mixing of `persistent7_kernel` waits for: r, k, v of a head, first halves of LoRAs."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from mrss_kernels.persistent7_await import await_words
from mrss_kernels.persistent7_parts import BLOCK_LEN, NUM_OUTPUTS, bits_at, thread_barrier


@gluon.jit
def sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def _activate(z, o_r, RW: gl.constexpr, RA: gl.constexpr, RG: gl.constexpr):
    """Return tanh(z) at the ranks of w, sigmoid(z) at those of g, z at the others'."""
    slope = gl.where(o_r < RW, 2.0, 1.0)
    bent = slope * sigmoid(slope * z) - (slope - 1.0)
    return gl.where((o_r < RW) | ((o_r >= RW + RA) & (o_r < RW + RA + RG)), bent, z)


@gluon.jit
def _with_part(ps, asked, p, column, mask, ROWS_LEN: gl.constexpr, HELPED: gl.constexpr):
    """Append where a number of the first product and its second part are, and which to read.

    From unit HELPED on it is a sum of two parts. mask: [4, 64].
    """
    part_mask = mask & (column >= HELPED * NUM_OUTPUTS)
    ps = ps + (bits_at(p), bits_at(p + ROWS_LEN))  # noqa: RUF005 (no * in Gluon)
    asked = asked + (gl.where(mask, -1, 0), gl.where(part_mask, -1, 0))  # noqa: RUF005
    return ps, asked


@gluon.jit
def load_inputs(
    p_rows,
    i_b,
    o_c,
    o_r,
    B: gl.constexpr,
    C: gl.constexpr,
    G: gl.constexpr,
    R: gl.constexpr,
    RW: gl.constexpr,
    RA: gl.constexpr,
    RG: gl.constexpr,
    RV: gl.constexpr,
    LOW_A: gl.constexpr,
    LOW_G: gl.constexpr,
    LOW_V: gl.constexpr,
    HELPED: gl.constexpr,
):
    """Return r, k, v of a head and first halves of LoRAs, once they are there.

    r, k, v are tuples, four rows [4, 64] each; first halves too, 256 ranks of a row each, in the
    order of `up`'s columns.
    """
    SUM: gl.constexpr = RW + RA + RG + RV
    FOURS: gl.constexpr = (G + 3) // 4
    VECTOR: gl.constexpr = o_c.type.layout
    o_j = gl.arange(0, 4, gl.SliceLayout(1, VECTOR))[:, None]
    ps = ()
    asked = ()
    for i in gl.static_range(FOURS):
        here = are_rows(i_b, o_j, o_c, i, B, G)
        for j in gl.static_range(3):
            column = j * C + o_c
            p = p_rows + (i_b + 4 * i + o_j) * R + column
            ps, asked = _with_part(ps, asked, p, column, here, B * R, HELPED)
    # As many rows' first halves at once as registers hold.
    AT_ONCE: gl.constexpr = G if G * SUM <= 4096 else 4
    sums = ()
    for first in gl.static_range(0, G, AT_ONCE):
        for j in gl.static_range(first, min(first + AT_ONCE, G)):
            for rank in gl.static_range(0, SUM, BLOCK_LEN):
                at = gl.reshape(rank + o_r, [4, 64])
                at = gl.convert_layout(at, VECTOR, assert_trivial=True)
                # A LoRA's first halves are filled up to tiles of 64, its columns of `up` are not.
                skip = gl.where(at < RW, 0, gl.where(at < RW + RA, LOW_A - RW, LOW_G - RW - RA))
                skip = gl.where(at < RW + RA + RG, skip, LOW_V - RW - RA - RG)
                column = 3 * C + at + skip
                mask = (at < SUM) & (i_b + j < B)
                p = p_rows + (i_b + j) * R + column
                ps, asked = _with_part(ps, asked, p, column, mask, B * R, HELPED)
        words = await_words(ps, 2, given=asked, SAMPLED=B <= 8)
        for i in gl.static_range(len(words) // 2):
            x = words[2 * i].to(gl.float32, bitcast=True)
            sums = sums + (x + words[2 * i + 1].to(gl.float32, bitcast=True),)  # noqa: RUF005
        ps = ()
        asked = ()
    rs = ()
    ks = ()
    vs = ()
    for i in gl.static_range(FOURS):
        rs = rs + (sums[3 * i],)  # noqa: RUF005
        ks = ks + (sums[3 * i + 1],)  # noqa: RUF005
        vs = vs + (sums[3 * i + 2],)  # noqa: RUF005
    lows = ()
    for i in gl.static_range(3 * FOURS, len(sums)):
        low = gl.reshape(sums[i], [BLOCK_LEN])
        lows = lows + (gl.convert_layout(low, o_r.type.layout, assert_trivial=True),)  # noqa: RUF005
    return rs, ks, vs, lows


@gluon.jit
def are_rows(i_b, o_j, o_c, four, B: gl.constexpr, G: gl.constexpr):
    """Return which of a unit's rows from `4 * four` on are rows [4, 64]."""
    o_j = 4 * four + o_j
    return (o_j < G) & (i_b + o_j < B) & (o_c >= 0)


@gluon.jit
def stage_low(
    columns,
    lows,
    o_r,
    G: gl.constexpr,
    RW: gl.constexpr,
    RA: gl.constexpr,
    RG: gl.constexpr,
    RV: gl.constexpr,
):
    """Put activated first halves into shared memory: a LoRA and row a column, rows innermost."""
    LAYOUT: gl.constexpr = o_r.type.layout.parent
    NUM_COLUMNS: gl.constexpr = columns.shape[1]
    BLOCKS: gl.constexpr = (RW + RA + RG + RV + BLOCK_LEN - 1) // BLOCK_LEN
    # Columns lie in registers, so that to choose among them costs no more than what is stored.
    o_n = gl.arange(0, NUM_COLUMNS, gl.SliceLayout(1, LAYOUT))[:, None]
    for i in gl.static_range(BLOCKS):
        at = i * BLOCK_LEN + o_r
        lora = gl.where(at < RW, 0, gl.where(at < RW + RA, 1, 2))
        lora = gl.where(at < RW + RA + RG, lora, 3) * (NUM_COLUMNS // 4)
        tile = gl.zeros([NUM_COLUMNS, BLOCK_LEN], columns.dtype, LAYOUT)
        for j in gl.static_range(G):
            z = _activate(lows[j * BLOCKS + i], at, RW, RA, RG).to(columns.dtype)
            tile = gl.where(o_n == (lora + j)[None, :], z[None, :], tile)
        columns.index(i).store(tile)
    fence_async_shared()
    thread_barrier()
