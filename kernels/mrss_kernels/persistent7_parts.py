# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="assignment, misc"
"""What `persistent7_kernel` is made of: waiting for numbers, the ring of weights, products, norms.

Gluon, as Triton has no way to say how much of a weight is asked for and when. A number that is not
there yet is BLANK, all bits 1: a NaN that no instruction makes. Whoever needs it reads it until it
is something else, so that a number is one store and one load away from the program that wants it.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mrss_kernels.caching import KEEP

BLANK = gl.constexpr(0xFFFFFFFF)
"""The bits of a number in fp32, or of a pair of 16 bits, that has not been written."""

SIGNS = gl.constexpr(-2147450880)
"""The signs of two halves of 16 bits."""

NUM_OUTPUTS = gl.constexpr(64)
"""Outputs of a unit of work: the rows of a tile that `wgmma` takes."""

BLOCK_LEN = gl.constexpr(256)
"""Columns of a block of weights."""

MAX_POLLS = gl.constexpr(1 << 22)
"""Reads of a number that is not there, some seconds, after which the kernel traps."""

LN_EPS = gl.constexpr(1e-5)

gdc_wait = tl.extra.cuda.gdc_wait
# Triton 3.7 renamed it.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def bits(x):
    """Return the bits of x fp32: the largest of all numbers, BLANK, where one is not written."""
    return x.to(gl.uint32, bitcast=True)


@gluon.jit
def bits_at(p):
    """Return pointers to the bits of numbers in fp32 or of pairs of 16 bits."""
    return p.to(gl.pointer_type(gl.int32), bitcast=True)


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def put_votes(x, votes):
    """Store x [4], an element a warp, and return the place of all four, [4].

    What each thread reads there and reduces is a reduction over all threads with fewer barriers.
    """
    votes = votes._reinterpret(x.dtype, [4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    votes.store(x)
    return votes


@gluon.jit
def get_votes(votes):
    """Return what all warps have put [4]."""
    return votes.load(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def _load_missing(p, words, mask, POSITIVE: gl.constexpr):
    """Return words int32 [..., n], those groups of n loaded once more where one is not there.

    Groups that have come are not read again: reads stand behind reads. A word is a number in fp32
    or two of 16 bits that are written at once; if POSITIVE, two that are written apart and whose
    sign bits are never set.
    """
    if POSITIVE:
        missing = gl.expand_dims(gl.reduce(words, 2, _either), 2) & SIGNS != 0
    else:
        missing = gl.max(words.to(gl.uint32, bitcast=True), 2, keep_dims=True) == BLANK
    return gl.load(p, mask=mask & missing, other=words, volatile=True)


@gluon.jit
def _are_there(words, votes, POSITIVE: gl.constexpr):
    """Return whether all words [rows, n, m] have been written, the same in all threads."""
    if POSITIVE:
        seen = gl.reduce(gl.reduce(words, 2, _either), 0, _either)
        seen = gl.reshape(seen, [seen.shape[0] // 128, 4, 32])
        seen = gl.reduce(gl.reduce(seen, 2, _either), 0, _either)
        return gl.reduce(get_votes(put_votes(seen, votes)), 0, _either) & SIGNS == 0
    else:  # noqa: RET505 (Gluon compiles what follows a return)
        seen = gl.max(gl.max(words.to(gl.uint32, bitcast=True), 2), 0)
        seen = gl.reshape(seen, [seen.shape[0] // 128, 4, 32])
        seen = gl.max(gl.max(seen, 2), 0)
        return gl.max(get_votes(put_votes(seen, votes)), 0) != BLANK


@gluon.jit
def blank(p):
    """Return what marks an element that p points to as not written."""
    dtype: gl.constexpr = p.dtype.element_ty
    if dtype == gl.float32:
        return gl.to_tensor(-1).to(gl.float32, bitcast=True)
    else:  # noqa: RET505 (Gluon compiles what follows a return)
        return gl.to_tensor(-1).to(gl.int16).to(dtype, bitcast=True)


@gluon.jit
def count(polls):
    """Return polls + 1; at MAX_POLLS trap: what never comes is an error, and no endless wait."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ge.s32 p, $1, $2; @p trap; mov.u32 $0, 0; }",
        "=r,r,r",
        [polls, gl.to_tensor(MAX_POLLS)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    return polls + 1


@gluon.jit
def await_word(p):
    """Wait until the number in fp32, or the pair of 16 bits, that p points to is there."""
    polls = gl.to_tensor(0)
    word = gl.load(bits_at(p), volatile=True)
    while word == -1:
        polls = count(polls)
        word = gl.load(bits_at(p), volatile=True)


@gluon.jit
def fence():
    """Let all programs see what this one has written before what it will write."""
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.u32 $0, 0;",
        "=r,r",
        [gl.to_tensor(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def push(weight, ring, full, empty, block, row, column, STAGES: gl.constexpr, ahead):
    """Ask for a block of weights as soon as its slot is empty and the one `ahead` before it here.

    More under way would delay what all programs wait for, as it stands behind it in the L2.
    """
    slot = block % STAGES
    mbarrier.wait(empty.index(slot), ((block // STAGES) & 1) ^ 1)
    before = gl.maximum(block - ahead, 0)
    mbarrier.wait(full.index(before % STAGES), (before // STAGES) & 1, pred=block >= ahead)
    mbarrier.expect(full.index(slot), NUM_OUTPUTS * BLOCK_LEN * 2)
    tma.async_copy_global_to_shared(weight, [row, column], full.index(slot), ring.index(slot))
    return block + 1


@gluon.jit
def multiply(ring, full, empty, inputs, first, num_blocks, block, STAGES: gl.constexpr):
    """Return the product of the next blocks of weights and of inputs, and the block behind them.

    The product is [64, 8 or 16] fp32; inputs are those from block `first` on. A block's slot is
    given back when the product of the next one is under way.
    """
    ROWS: gl.constexpr = inputs.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    acc = gl.zeros([NUM_OUTPUTS, ROWS], gl.float32, LAYOUT)
    gl.assume(num_blocks > 0)
    for k in range(num_blocks):
        slot = block % STAGES
        mbarrier.wait(full.index(slot), (block // STAGES) & 1)
        columns = inputs.index(first + k).permute((1, 0))
        acc = warpgroup_mma(ring.index(slot), columns, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        # All warps have read it.
        thread_barrier()
        mbarrier.arrive(empty.index((block + STAGES - 1) % STAGES), count=1, pred=k > 0)
        block += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    thread_barrier()
    mbarrier.arrive(empty.index((block + STAGES - 1) % STAGES), count=1)
    return acc, block


@gluon.jit
def stage_rows(
    inputs,
    votes,
    p_x,
    stride,
    B: gl.constexpr,
    K: gl.constexpr,
    POSITIVE: gl.constexpr = False,
):
    """Put B rows of K columns of 16 bits into shared memory, once they are there."""
    # Rows lie in registers, so that those from B on cost no instructions.
    WIDE: gl.constexpr = 4 if K >= 1024 else K // 256
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, WIDE], [1, 32, 1], [1, 4, 1], [2, 1, 0])
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    ROWS: gl.constexpr = inputs.shape[1]
    o_b = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    o_k = gl.arange(0, K // 2 // WIDE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    o_w = gl.arange(0, WIDE, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    at = o_b * (stride // 2) + o_k[None, :, None] * WIDE + o_w
    p_words = bits_at(p_x) + at
    mask = (o_b < B) & (o_k >= 0)[None, :, None] & (o_w >= 0)
    words = gl.where(mask, -1, 0)
    missing = gl.to_tensor(True)
    polls = gl.to_tensor(0)
    while missing:
        polls = count(polls)
        words = _load_missing(p_words, words, mask, POSITIVE)
        missing = not _are_there(words, votes, POSITIVE)
    words = gl.reshape(words, [ROWS, K // 2])
    inputs._reinterpret(gl.int32, [ROWS, K // 2], WORDS).store(words)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def mark(p_next, stride, B: gl.constexpr):
    """Mark a unit's outputs [64, B] of the next layer as not written.

    Before this layer's are stored: who has seen these may look for the next ones at once.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    o_b = gl.arange(0, 8 if B <= 8 else 16, gl.SliceLayout(1, LAYOUT))
    o_n = gl.arange(0, NUM_OUTPUTS, gl.SliceLayout(0, LAYOUT))
    at = (o_b * stride)[:, None] + o_n[None, :]
    mask = (o_b < B)[:, None] & (o_n >= 0)[None, :]
    gl.store(p_next + at, blank(p_next), mask=mask, eviction_policy=KEEP)


@gluon.jit
def put(p_y, acc, stride, B: gl.constexpr):
    """Store a unit's outputs [64, B] to p_y."""
    LAYOUT: gl.constexpr = acc.type.layout
    o_n = gl.arange(0, NUM_OUTPUTS, gl.SliceLayout(1, LAYOUT))
    o_b = gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    at = (o_b * stride)[None, :] + o_n[:, None]
    mask = (o_b < B)[None, :] & (o_n >= 0)[:, None]
    gl.store(p_y + at, acc.to(p_y.dtype.element_ty), mask=mask, eviction_policy=KEEP)


@gluon.jit
def _is_missing(x, parts, votes, PARTS: gl.constexpr):
    """Return whether one of the numbers is not there, the same in all threads."""
    seen = x.to(gl.uint32, bitcast=True)
    for i in gl.static_range(PARTS):
        seen = gl.maximum(seen, parts[i].to(gl.uint32, bitcast=True))
    return gl.max(get_votes(put_votes(gl.max(gl.max(seen, 2), 1), votes)), 0) == BLANK


@gluon.jit
def _statistics(x, scratch, votes, more_votes):
    """Put a row [4, n, 4] into shared memory; return the sum of it, and of its squares."""
    LINEAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    scratch._reinterpret(gl.float32, x.shape, LINEAR).store(x)
    totals = put_votes(gl.sum(gl.sum(x, 2), 1), votes)
    squares = put_votes(gl.sum(gl.sum(x * x, 2), 1), more_votes)
    return gl.sum(get_votes(totals), 0), gl.sum(get_votes(squares), 0)


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
    row = o_c * 0 - 1
    parts = ()
    for _ in gl.static_range(PARTS):
        parts = parts + (row,)  # noqa: RUF005
    x = row.to(gl.float32)
    total = gl.to_tensor(0.0)
    squares = gl.to_tensor(0.0)
    missing = gl.to_tensor(True)
    polls = gl.to_tensor(0)
    while missing:
        polls = count(polls)
        row = _load_missing(bits_at(p_x + i_b * C + o_c), row, o_c >= 0, False)
        x = row.to(gl.float32, bitcast=True)
        again = ()
        for i in gl.static_range(PARTS):
            p_part = bits_at(p_parts + (i * B + i_b) * C + o_c)
            part = _load_missing(p_part, parts[i], o_c >= 0, False)
            x += part.to(gl.float32, bitcast=True)
            again = again + (part,)  # noqa: RUF005
        parts = again
        total, squares = _statistics(x, scratch, votes, more_votes)
        # A number that is not there is a NaN, but not every NaN is one.
        missing = total != total
        if missing:
            missing = _is_missing(row, parts, votes, PARTS)
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
