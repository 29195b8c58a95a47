# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="assignment"
"""Norms of `persistent7_kernel`: a slice of a row, whose sums each program takes over all of it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mrss_kernels.caching import KEEP
from mrss_kernels.persistent7_await import await_words
from mrss_kernels.persistent7_parts import (
    LN_EPS,
    bits_at,
    blank,
    get_votes,
    put_votes,
    thread_barrier,
)


@gluon.jit
def norm_unit(
    unit,
    scratch,
    votes,
    more_votes,
    p_x,
    p_parts,
    p_sum,
    p_next_sum,
    p_norm,
    p_shift,
    p_slots,
    p_mix,
    p_out,
    p_next_out,
    B: gl.constexpr,
    C: gl.constexpr,
    PARTS: gl.constexpr,
    MIXES: gl.constexpr,
    SLICE: gl.constexpr,
):
    """Add parts to a row of the residual stream, normalise it, and write a slice of what follows.

    As `add_norm_mix`. What a step does not write is read before the parts are waited for. By then
    all have read what is marked here: this program has had inputs that depend on it.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [4, 1, 1], [2, 1, 0])
    OWN: gl.constexpr = gl.BlockedLayout([1, SLICE // 128], [1, 32], [1, 4], [1, 0])
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    i_b = unit // (C // SLICE)
    i_s = unit % (C // SLICE)
    # A quarter of a row a warp, four columns at a time.
    o_c = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None] * (C // 4)
    o_c += gl.arange(0, C // 16, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None] * 4
    o_c += gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    o_s = i_s * SLICE + gl.arange(0, SLICE, gl.SliceLayout(0, OWN))[None, :]
    weight = gl.load(p_norm + o_s)
    bias = gl.load(p_norm + C + o_s)
    slot = gl.load(p_slots + i_b)
    live = (o_s * 0 + slot) >= 0
    previous = gl.load(p_shift + slot * C + o_s, mask=live, other=0.0)
    mixes = ()
    for i in gl.static_range(MIXES):
        mixes = mixes + (gl.load(p_mix + i * C + o_s),)  # noqa: RUF005 (no * in Gluon)
    gl.store(p_next_sum + i_b * C + o_s, blank(p_sum), eviction_policy=KEEP)
    for i in gl.static_range(MIXES):
        at = (i * B + i_b) * C + o_s
        gl.store(p_next_out + at, blank(p_out), eviction_policy=KEEP)
    ps = (bits_at(p_x + i_b * C + o_c),)
    for i in gl.static_range(PARTS):
        ps = ps + (bits_at(p_parts + (i * B + i_b) * C + o_c),)  # noqa: RUF005
    words = await_words(ps, 4, SAMPLED=True)
    x = words[0].to(gl.float32, bitcast=True)
    for i in gl.static_range(PARTS):
        x += words[1 + i].to(gl.float32, bitcast=True)
    total, squares = _statistics(x, scratch, votes, more_votes)
    thread_barrier()
    x_all = x
    x = scratch._reinterpret(gl.float32, [C // SLICE, 1, SLICE], LINEAR).index(i_s).load(OWN)
    mean = total / C
    variance = squares / C - mean * mean
    if mean * mean > variance:
        # The difference would lose bits.
        rest = x_all - mean
        mean += gl.sum(gl.sum(gl.sum(rest, 2), 1), 0) / C
        variance = gl.sum(gl.sum(gl.sum(rest * rest, 2), 1), 0) / C
    h = (x - mean) / gl.sqrt(variance + LN_EPS) * weight + bias
    for i in gl.static_range(MIXES):
        mixed = h + (previous - h) * mixes[i]
        at = (i * B + i_b) * C + o_s
        gl.store(p_out + at, mixed.to(p_out.dtype.element_ty), eviction_policy=KEEP)
    gl.store(p_sum + i_b * C + o_s, x, eviction_policy=KEEP)
    gl.store(p_shift + slot * C + o_s, h, mask=live)
    thread_barrier()


@gluon.jit
def _statistics(x, scratch, votes, more_votes):
    """Put a row [4, n, 4] into shared memory; return the sum of it, and of its squares."""
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    scratch._reinterpret(gl.float32, x.shape, LINEAR).store(x)
    totals = put_votes(gl.sum(gl.sum(x, 2), 1), votes)
    squares = put_votes(gl.sum(gl.sum(x * x, 2), 1), more_votes)
    return gl.sum(get_votes(totals), 0), gl.sum(get_votes(squares), 0)
