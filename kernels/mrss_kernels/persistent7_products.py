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
from mrss_kernels.persistent7_await import await_words
from mrss_kernels.persistent7_parts import (
    BLOCK_LEN,
    NUM_OUTPUTS,
    bits_at,
    blank,
    thread_barrier,
)


@gluon.jit
def product(
    ring, full, empty, inputs, p_x, x_stride, first, num_blocks, block, p_y, p_next, stride,
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
            ring, full, empty, inputs, p_x, x_stride, num_blocks, block, B, CHUNK, STAGES,
            POSITIVE,
        )  # fmt: skip
        mark(p_next, stride, B, inputs.shape[1])
    else:
        if is_staged ^ True:
            stage_rows(inputs, p_x, x_stride, B, K, POSITIVE)
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
def stage_rows(inputs, p_x, stride, B: gl.constexpr, K: gl.constexpr, POSITIVE: gl.constexpr):
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
    words = await_words((bits_at(p_x) + at,), WIDE, B * (K // 256 // WIDE), POSITIVE, SAMPLED=True)[
        0
    ]
    words = gl.reshape(words, [ROWS, K // 2])
    inputs._reinterpret(gl.int32, [ROWS, K // 2], WORDS).store(words)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def multiply_chunks(
    ring, full, empty, inputs, p_x, stride, num_blocks, block,
    B: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, POSITIVE: gl.constexpr,
):  # fmt: skip
    """As `stage_rows` and `multiply`, with CHUNK blocks of the inputs at a time in shared memory.

    While a chunk is multiplied the next one or two are on their way into registers.
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
    # Chunks on their way into registers, as many as these hold.
    DEEP: gl.constexpr = ROWS * CHUNK <= 32
    words = gl.load(p_words, mask=of_block < num_blocks, other=0, volatile=True)
    next_words = words
    if DEEP:
        mask = of_block < num_blocks - CHUNK
        next_words = gl.load(p_words + NUM_WORDS, mask=mask, other=0, volatile=True)
    gl.assume(num_blocks > 0)
    for k in range(num_blocks):
        if k % CHUNK == 0:
            _stage_chunk(places.index(k // CHUNK % 2), words, p_words, POSITIVE)
            p_words += NUM_WORDS
            if DEEP:
                words = next_words
                mask = of_block < num_blocks - k - 2 * CHUNK
                next_words = gl.load(p_words + NUM_WORDS, mask=mask, other=0, volatile=True)
            else:
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
def _stage_chunk(place, words, p_words, POSITIVE: gl.constexpr):
    """Put words [rows, n, 4], read before, into shared memory, once they are there."""
    words = await_words((p_words,), 4, POSITIVE=POSITIVE, given=(words,))[0]
    place.store(gl.reshape(words, place.shape))
    fence_async_shared()
    thread_barrier()
