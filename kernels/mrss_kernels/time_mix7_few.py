# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""RWKV-7's time mixing by programs of several rows, with the second halves of its LoRAs.

A program holds a head of G rows: it reads the head's LoRA weights once, multiplies them by all its
rows on the tensor cores, and updates the rows' states side by side. Weights and states lie in
registers before the kernel waits for its inputs; what warps hand to each other goes through shared
memory by gathers, each of which stores a vector once whatever is read of it. kernels/README.md
says why.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.caching import KEEP
from mrss_kernels.lora_up7 import sum_parts


@triton.jit
def _pair(a, b):
    """Return two fp32 numbers as one word of 64 bits, so that one gather moves both."""
    low = a.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return low | b.to(tl.int32, bitcast=True).to(tl.int64) << 32


@triton.jit
def _both(word):
    """Return what `_pair` was given."""
    a = word.to(tl.int32).to(tl.float32, bitcast=True)
    return a, (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(x):
    """Return the sigmoid: a square of an inverse square root is cheaper than a division."""
    root = tl.rsqrt(1 + tl.exp(-x))
    return root * root


@triton.jit
def _load_operand(
    p_up, SUM: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, HALVES: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Return a head's weights [HALVES 4, N / 4, BR / HALVES], each warp's part of the product.

    A thread loads 16 bytes, eight columns of a row, and keeps them: the product's K is so permuted
    that these are what the thread's lane holds of a tensor core's operand (`_fragments` permutes
    the other factor likewise), and nothing passes through shared memory.
    """
    BLOCKS: tl.constexpr = BR // 32
    # Two dimensions, so that the layout follows from the shape: bits of x from the lowest are
    # 8 rows (lanes), 4 x 8 rows (warps), HALVES (warps), blocks of columns, N / 32.
    x = tl.arange(0, N * BLOCKS)
    o_row = x // (32 * BLOCKS) * 32 + x % 32
    o_col = (x // 32 % BLOCKS * 32)[:, None] + tl.arange(0, 32)[None, :]
    p_tile = p_up + (o_row * SUM)[:, None] + o_col
    w = tl.load(p_tile) if RANK == BR else tl.load(p_tile, mask=o_col < RANK, other=0.0)
    w = tl.reshape(w, [N // 32, BLOCKS // HALVES, HALVES, 4, 8, 4, 2, 4])
    w = tl.permute(w, 2, 3, 0, 4, 1, 6, 5, 7)
    return tl.reshape(w, [HALVES * 4, N // 4, BR // HALVES])


@triton.jit
def _load_low(
    p_z, i_g, B, R, stride, RANK: tl.constexpr, BR: tl.constexpr, G: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Return even and odd columns of a LoRA's first half, G rows one after another [G BR / 2]."""
    o = tl.arange(0, G * BR // 2)
    o_b = i_g * G + o // (BR // 2)
    o_d = o % (BR // 2) * 2
    mask = (o_b < B) & (o_d < RANK)
    p = p_z + o_b * R + o_d
    return sum_parts(p, mask, stride, PARTS), sum_parts(p + 1, mask, stride, PARTS)


@triton.jit
def _words(even, odd, dtype: tl.constexpr):
    """Return neighbours as one word of 32 bits, in a dtype of 16."""
    low = even.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | odd.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def _fragments(words, BR: tl.constexpr, HALVES: tl.constexpr, G: tl.constexpr):
    """Return words [G BR / 2] as warps multiply by them: [HALVES 4, BR / HALVES / 2, 8].

    The order of K is that of `_load_operand`. Column c is row c % G: a product has eight.
    """
    PAIRS: tl.constexpr = BR // HALVES // 2
    i = tl.arange(0, PAIRS)[None, :, None]
    half = tl.arange(0, HALVES * 4)[:, None, None] // 4
    at = (i // 16 * HALVES + half) * 16 + i // 2 % 4 * 4 + i // 8 % 2 * 2 + i % 2
    at += tl.arange(0, 8)[None, None, :] % G * (BR // 2)
    words = tl.gather(words, tl.reshape(at, [HALVES * 4 * PAIRS * 8]), 0)
    return tl.reshape(words, [HALVES * 4, PAIRS, 8])


@triton.jit
def _times(up, words):
    """Return up @ z^T for all columns of z: [HALVES 4, N / 4, 8] fp32, a part of K each half."""
    even = words.to(tl.int16).to(up.dtype, bitcast=True)
    odd = (words >> 16).to(tl.int16).to(up.dtype, bitcast=True)
    z = tl.permute(tl.join(even, odd), 0, 1, 3, 2)
    return tl.dot(up, tl.reshape(z, [up.shape[0], up.shape[2], 8]), input_precision="ieee")


@triton.jit
def _outputs(u, v, HALVES: tl.constexpr, G: tl.constexpr, WARPS: tl.constexpr, N: tl.constexpr):
    """Return two products' outputs, halves added up, [WARPS, N]: WARPS / G copies of a row."""
    # Rows of outputs side by side, so that lanes that read them meet in no bank.
    both = tl.permute(tl.reshape(_pair(u, v), [HALVES, 4, N // 4, 8]), 0, 3, 1, 2)
    both = tl.reshape(both, [HALVES * 8 * N])
    o_n = tl.arange(0, N)
    # Output n = 32 i + 8 j + l stands at [half, column, j, i, l].
    at = ((o_n // 8 % 4 * (N // 32) + o_n // 32) * 8 + o_n % 8)[None, :]
    at += (tl.arange(0, WARPS) // (WARPS // G))[:, None] * N
    at = at[:, :, None] + tl.arange(0, 2)[None, None, :] * (N * 8)
    both = tl.gather(both, tl.reshape(at, [WARPS * N * 2]), 0)
    first, second = tl.split(tl.reshape(both, [WARPS, N, 2]))
    u, v = _both(first)
    more_u, more_v = _both(second)
    return u + more_u, v + more_v


@triton.jit
def time_mix7_few_kernel(
    p_in,
    p_low,
    p_up,
    p_vectors,
    p_first,
    p_pool,
    p_slots,
    p_offset,
    p_out,
    B,
    eps,
    H: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    RW: tl.constexpr,
    RA: tl.constexpr,
    RG: tl.constexpr,
    RV: tl.constexpr,
    BRW: tl.constexpr,
    BRA: tl.constexpr,
    BRG: tl.constexpr,
    BRV: tl.constexpr,
    PARTS: tl.constexpr,
    STACKED: tl.constexpr,
    OFFSET: tl.constexpr,
    G: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (H, B / G). RV == 0 marks layer 0, which keeps its v for the others instead of mixing.

    STACKED: r, k, v are [3, B, C] and not the first 3C columns of rows of R. WARPS is 8.
    """
    # Warps are 4 x HALVES: a quarter of the outputs and a part of the LoRAs' K each.
    HALVES: tl.constexpr = WARPS // 4
    # Rows of a state that the program's threads hold at once, four columns a thread.
    WIDE: tl.constexpr = WARPS * 128 // N
    REPS: tl.constexpr = N // WIDE
    # Warps that share a row's vectors: each has all of them.
    SHARE: tl.constexpr = WARPS // G
    C: tl.constexpr = H * N
    SUM: tl.constexpr = RW + RA + RG + RV
    i_h = tl.program_id(0)
    i_g = tl.program_id(1)
    o_n = tl.arange(0, N)
    # All of this is older than the kernel in front of us, so it is read before waiting for it.
    o_v = tl.arange(0, G * N)
    b_v = i_g * G + o_v // N
    slot_v = tl.load(p_slots + b_v, mask=b_v < B, other=-1).to(tl.int64)
    at_v = ((slot_v * H + i_h) * N + o_v % N)[:, None] * N + o_n[None, :]
    # Four columns a thread whatever the dtype, as vectors are handed to them.
    p_s = p_pool + tl.max_contiguous(at_v, [1, 4])
    m_s = (slot_v >= 0)[:, None]
    state = tl.load(p_s, mask=m_s, other=0.0)
    p_up += i_h * N * SUM
    up_w = _load_operand(p_up, SUM, RW, BRW, HALVES, N)
    up_a = _load_operand(p_up + RW, SUM, RA, BRA, HALVES, N)
    up_g = _load_operand(p_up + RW + RA, SUM, RG, BRG, HALVES, N)
    o_w = tl.arange(0, WARPS)
    b_w = i_g * G + o_w // SHARE
    m_w = (b_w < B)[:, None]
    slot_w = tl.load(p_slots + b_w, mask=b_w < B, other=-1).to(tl.int64)
    o_c = (i_h * N + o_n)[None, :] + (o_w * 0)[:, None]
    w0 = tl.load(p_vectors + o_c)
    a0 = tl.load(p_vectors + C + o_c)
    k_k = tl.load(p_vectors + 3 * C + o_c)
    k_a = tl.load(p_vectors + 4 * C + o_c)
    r_k = tl.load(p_vectors + 5 * C + o_c)
    gn_w = tl.load(p_vectors + 6 * C + o_c)
    gn_b = tl.load(p_vectors + 7 * C + o_c)
    if RV > 0:
        up_v = _load_operand(p_up + RW + RA + RG, SUM, RV, BRV, HALVES, N)
        v0 = tl.load(p_vectors + 2 * C + o_c)
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now, so that the next layer's kernel of this kind may read the state early as well.
        if G < 4:
            tl.extra.cuda.gdc_launch_dependents()
    stride = B * R
    even_w, odd_w = _load_low(p_low, i_g, B, R, stride, RW, BRW, G, PARTS)
    even_a, odd_a = _load_low(p_low + RW, i_g, B, R, stride, RA, BRA, G, PARTS)
    even_g, odd_g = _load_low(p_low + RW + RA, i_g, B, R, stride, RG, BRG, G, PARTS)
    if RV > 0:
        even_v, odd_v = _load_low(p_low + RW + RA + RG, i_g, B, R, stride, RV, BRV, G, PARTS)
    at = b_w[:, None] * C + o_c
    if STACKED:
        r = tl.load(p_in + at, mask=m_w, other=0.0).to(tl.float32)
        k = tl.load(p_in + B * C + at, mask=m_w, other=0.0).to(tl.float32)
        v = tl.load(p_in + 2 * B * C + at, mask=m_w, other=0.0).to(tl.float32)
    else:
        p_row = p_in + b_w[:, None] * R + o_c
        r = sum_parts(p_row, m_w, stride, PARTS)
        k = sum_parts(p_row + C, m_w, stride, PARTS)
        v = sum_parts(p_row + 2 * C, m_w, stride, PARTS)
    m_one = m_w & (o_w % SHARE == 0)[:, None]
    if RV > 0:
        first = tl.load(p_first + at, mask=m_w, other=0.0, eviction_policy=KEEP)
    else:
        tl.store(p_first + at, v, mask=m_one, eviction_policy=KEEP)
    dtype: tl.constexpr = p_up.dtype.element_ty
    z_w = _words(2 * _sigmoid(2 * even_w) - 1, 2 * _sigmoid(2 * odd_w) - 1, dtype)
    z_a = _words(even_a, odd_a, dtype)
    z_g = _words(_sigmoid(even_g), _sigmoid(odd_g), dtype)
    if RV > 0:
        z_v = _words(even_v, odd_v, dtype)
    if BRW == BRA:
        z_wa = z_w.to(tl.int64) & 0xFFFFFFFF | z_a.to(tl.int64) << 32
        z_wa = _fragments(z_wa, BRW, HALVES, G)
        u_w = _times(up_w, z_wa.to(tl.int32))
        u_a = _times(up_a, (z_wa >> 32).to(tl.int32))
    else:
        u_w = _times(up_w, _fragments(z_w, BRW, HALVES, G))
        u_a = _times(up_a, _fragments(z_a, BRA, HALVES, G))
    if PDL and G == 4:
        # Four states a program are late as it is: the successor's weights come behind them.
        tl.extra.cuda.gdc_launch_dependents()
    kk = k * k_k
    kk = kk / tl.maximum(tl.sqrt(tl.sum(kk * kk, 1)), 1e-12)[:, None]
    u_g = _times(up_g, _fragments(z_g, BRG, HALVES, G))
    u_v = u_a
    if RV > 0:
        u_v = _times(up_v, _fragments(z_v, BRV, HALVES, G))
    # r once more, as the states lie; not earlier, for want of registers.
    b_s = (i_g * G + tl.arange(0, G * WIDE) // WIDE)[:, None]
    if STACKED:
        r_s = tl.load(p_in + b_s * C + i_h * N + o_n[None, :], mask=b_s < B, other=0.0)
        r_s = r_s.to(tl.float32)
    else:
        r_s = sum_parts(p_in + b_s * R + i_h * N + o_n[None, :], b_s < B, stride, PARTS)
    r_s = tl.reshape(r_s, [G, 1, WIDE, N])
    w, a = _outputs(u_w, u_a, HALVES, G, WARPS, N)
    decay = tl.exp(-0.6065306597126334 * _sigmoid(w0 + w))
    a = _sigmoid(a0 + a)
    k = k * (1 + (a - 1) * k_a)
    kka = kk * a
    at_s = tl.arange(0, G)[:, None, None] * (SHARE * N) + o_n[None, None, :]
    at_s = tl.reshape(at_s + tl.arange(0, WIDE)[None, :, None] * 0, [G * WIDE * N])
    word = tl.gather(tl.reshape(_pair(kk, decay), [WARPS * N]), at_s, 0)
    kk_s, decay_s = _both(tl.reshape(word, [G, 1, WIDE, N]))
    word = tl.gather(tl.reshape(_pair(k, kka), [WARPS * N]), at_s, 0)
    k_s, kka_s = _both(tl.reshape(word, [G, 1, WIDE, N]))
    g, gate = _outputs(u_g, u_v, HALVES, G, WARPS, N)
    if RV > 0:
        v += (first - v) * _sigmoid(v0 + gate)
    v_s = tl.gather(tl.reshape(v, [WARPS * N]), o_v // N * (SHARE * N) + o_v % N, 0)
    v_s = tl.reshape(v_s, [G, REPS, WIDE, 1])
    s = tl.reshape(state.to(tl.float32), [G, REPS, WIDE, N])
    # With S' = S D - (S kk) kka^T + v k^T, S' r takes two sums over the old state, none over S'.
    removed = tl.sum(s * kk_s, 3)
    kept = tl.sum(s * (decay_s * r_s), 3)
    word = tl.reshape(_pair(kept, removed), [G * N])
    at_y = (o_w // SHARE)[:, None] * N + o_n[None, :]
    y, removed_w = _both(tl.reshape(tl.gather(word, tl.reshape(at_y, [WARPS * N]), 0), [WARPS, N]))
    s = s * decay_s - removed[:, :, :, None] * kka_s + v_s * k_s
    tl.store(p_s, tl.reshape(s, [G * N, N]).to(p_pool.dtype.element_ty), mask=m_s)
    y += tl.sum(k * r, 1)[:, None] * v - tl.sum(kka * r, 1)[:, None] * removed_w
    live = (slot_w >= 0)[:, None]
    if OFFSET:
        p_o = p_offset + slot_w[:, None] * C + o_c
        y *= 1 + tl.load(p_o, mask=live, other=0.0).to(tl.float32)
    y -= (tl.sum(y, 1) / N)[:, None]
    y = y / tl.sqrt(tl.sum(y * y, 1) / N + eps)[:, None] * gn_w + gn_b
    y = (y + tl.sum(r * k * r_k, 1)[:, None] * v) * g
    y = tl.where(live, y, 0.0).to(p_out.dtype.element_ty)
    tl.store(p_out + at, y, mask=m_one, eviction_policy=KEEP)
