# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Products of `persistent7_kernel`: 64 outputs of all rows, from weights that come by the ring.

Inputs are put into shared memory once they are there, all at once or some blocks at a time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mrss_kernels.caching import KEEP
from mrss_kernels.persistent7_parts import (
    BLANK,
    BLOCK_LEN,
    NUM_OUTPUTS,
    SIGNS,
    bits_at,
    blank,
    count,
    either,
    get_votes,
    load_missing,
    put_votes,
    thread_barrier,
)


@gluon.jit
def product(
    ring, full, empty, inputs, votes, p_x, x_stride, first, num_blocks, block, p_y, p_next, stride,
    B: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr,
    POSITIVE: gl.constexpr = False, SQUARED: gl.constexpr = False, is_staged=False,
):  # fmt: skip
    """Store the product of the next blocks of weights and of inputs; return the block behind them.

    Inputs are num_blocks blocks of p_x, from `first` on. Of K columns all are waited for and put
    into shared memory, unless they are there; or CHUNK blocks at a time, if it is not 0.
    """
    if CHUNK > 0:
        p_x += first * BLOCK_LEN
        acc, block = multiply_chunks(
            ring, full, empty, inputs, votes, p_x, x_stride, num_blocks, block, B, CHUNK, STAGES,
            POSITIVE,
        )  # fmt: skip
        mark(p_next, stride, B, inputs.shape[1])
    else:
        if is_staged ^ True:
            stage_rows(inputs, votes, p_x, x_stride, B, K, POSITIVE)
        mark(p_next, stride, B, inputs.shape[1])
        acc, block = multiply(ring, full, empty, inputs, first, num_blocks, block, STAGES)
    if SQUARED:
        acc = gl.maximum(acc, 0.0)
        acc = acc * acc
    put(p_y, acc, stride, B)
    return block


@gluon.jit
def mark(p_next, stride, B: gl.constexpr, ROWS: gl.constexpr):
    """Mark a unit's outputs [64, B] of the next layer as not written.

    Before this layer's are stored: who has seen these may look for the next ones at once.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    o_b = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
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
def multiply(ring, full, empty, inputs, first, num_blocks, block, STAGES: gl.constexpr):
    """Return the product of the next blocks of weights and of inputs, and the block behind them.

    The product is [64, 8, 16 or 32] fp32; inputs are those from block `first` on. A block's slot is
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
        words = load_missing(p_words, words, mask, POSITIVE)
        missing = not _are_there(words, votes, POSITIVE)
    words = gl.reshape(words, [ROWS, K // 2])
    inputs._reinterpret(gl.int32, [ROWS, K // 2], WORDS).store(words)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _are_there(words, votes, POSITIVE: gl.constexpr):
    """Return whether all words [rows, n, m] have been written, the same in all threads."""
    if POSITIVE:
        seen = gl.reduce(gl.reduce(words, 2, either), 0, either)
        seen = gl.reshape(seen, [seen.shape[0] // 128, 4, 32])
        seen = gl.reduce(gl.reduce(seen, 2, either), 0, either)
        return gl.reduce(get_votes(put_votes(seen, votes)), 0, either) & SIGNS == 0
    else:  # noqa: RET505 (Gluon compiles what follows a return)
        seen = gl.max(gl.max(words.to(gl.uint32, bitcast=True), 2), 0)
        seen = gl.reshape(seen, [seen.shape[0] // 128, 4, 32])
        seen = gl.max(gl.max(seen, 2), 0)
        return gl.max(get_votes(put_votes(seen, votes)), 0) != BLANK


@gluon.jit
def multiply_chunks(
    ring, full, empty, inputs, votes, p_x, stride, num_blocks, block,
    B: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, POSITIVE: gl.constexpr,
):  # fmt: skip
    """As `stage_rows` and `multiply`, with CHUNK blocks of the inputs at a time in shared memory.

    While a chunk is multiplied the next one is on its way into registers.
    """
    ROWS: gl.constexpr = inputs.shape[1]
    NUM_WORDS: gl.constexpr = CHUNK * BLOCK_LEN // 2
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [4, 1, 1], [2, 1, 0])
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    o_b = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    o_k = gl.arange(0, NUM_WORDS // 4, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    o_w = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    p_words = bits_at(p_x) + o_b * (stride // 2) + o_k * 4 + o_w
    # Blocks that words belong to, past any block in rows that are none.
    of_block = gl.where(o_b < B, o_k // (BLOCK_LEN // 8), 1 << 20) + o_w * 0
    places = inputs._reinterpret(gl.int32, [2, ROWS, NUM_WORDS], WORDS)
    acc = gl.zeros([NUM_OUTPUTS, ROWS], gl.float32, ACC)
    mask = of_block < num_blocks
    words = gl.load(p_words, mask=mask, other=0, volatile=True)
    gl.assume(num_blocks > 0)
    for k in range(num_blocks):
        if k % CHUNK == 0:
            mask = of_block < num_blocks - k
            _stage_chunk(places.index(k // CHUNK % 2), votes, words, p_words, mask, POSITIVE)
            p_words += NUM_WORDS
            mask = of_block < num_blocks - k - CHUNK
            words = gl.load(p_words, mask=mask, other=0, volatile=True)
        slot = block % STAGES
        mbarrier.wait(full.index(slot), (block // STAGES) & 1)
        columns = inputs.index(k % (2 * CHUNK)).permute((1, 0))
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
def _stage_chunk(place, votes, words, p_words, mask, POSITIVE: gl.constexpr):
    """Put words [rows, n, 4], read before, into shared memory; read them again till all are there.

    Stored before they are looked at, so that one barrier serves both.
    """
    missing = gl.to_tensor(True)
    polls = gl.to_tensor(0)
    while missing:
        place.store(gl.reshape(words, place.shape))
        fence_async_shared()
        missing = not _chunk_is_there(words, votes, POSITIVE)
        if missing:
            polls = count(polls)
            words = load_missing(p_words, words, mask, POSITIVE)


@gluon.jit
def _chunk_is_there(words, votes, POSITIVE: gl.constexpr):
    """As `_are_there`, of words [rows, n, 4], every fourth row the same warp's."""
    ROWS: gl.constexpr = words.shape[0]
    if POSITIVE:
        seen = gl.reshape(gl.reduce(gl.reduce(words, 2, either), 1, either), [ROWS // 4, 4])
        seen = gl.reduce(seen, 0, either)
        return gl.reduce(get_votes(put_votes(seen, votes)), 0, either) & SIGNS == 0
    else:  # noqa: RET505 (Gluon compiles what follows a return)
        seen = gl.max(gl.max(words.to(gl.uint32, bitcast=True), 2), 1)
        seen = gl.max(gl.reshape(seen, [ROWS // 4, 4]), 0)
        return gl.max(get_votes(put_votes(seen, votes)), 0) != BLANK
