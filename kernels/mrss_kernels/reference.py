"""The recurrences in plain torch, on any device: the oracle of their kernels, and the CPU path.

Shapes: B rows, T tokens, H heads, N head size, S slots. A pool holds one layer's recurrent states
`[S, H, N, N]`, laid out [V, K] (value, key) for RWKV-7 and [K, V] for RWKV-6. Arithmetic is in
fp32, or in fp64 if the pool is. Derivations: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mrss_kernels._checks import expect_dtype, expect_lengths, expect_shape

CHUNK_LEN = 16
"""Tokens a chunk. RWKV-7's log decay is at least -0.6065 a token, so the inverse of a chunk's
decay stays under exp(16 * 0.6065) = 1.7e4 and fp32 keeps its precision."""

_POOL_DTYPES = (torch.float32, torch.float16, torch.float64)

_Decode = Callable[[Tensor, list[Tensor]], Tensor]
_Chunked = Callable[..., tuple[Tensor, Tensor]]


def wkv7_decode(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, pool: Tensor, slots: Tensor
) -> Tensor:
    """Advance RWKV-7 rows by one token.

    `S = S * exp(w) - (S @ kk) (kk * a)^T + v k^T; y = S @ r`, S being [V, K].

    Args:
        r: receptance [B, H, N], any float dtype, as `k`, `v`, `kk` and `a`.
        w: LOG decay [B, H, N], `-0.6065306597 * sigmoid(..)`.
        k: key [B, H, N].
        v: value [B, H, N].
        kk: removal key [B, H, N], of unit norm a head.
        a: in-context learning rate [B, H, N].
        pool: states [S, H, V, K] fp32, fp16 or fp64, *modified*.
        slots: int64 [B], no slot twice; -1 is a padding row: nothing is written, its y is 0.

    Returns:
        y [B, H, N] fp32 (fp64 with an fp64 pool).
    """
    _check_rows([("r", r), ("w", w), ("k", k), ("v", v), ("kk", kk), ("a", a)], pool, slots)
    return _decode(_step7, [r, w, k, v, kk, a], pool, slots)


def wkv7_prefill(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
) -> Tensor:
    """Read several sequences into RWKV-7 states: `wkv7_decode` token by token, but chunked.

    Args:
        r: receptance, packed [T, H, N], as `w`, `k`, `v`, `kk` and `a` (see `wkv7_decode`).
        w: LOG decay, in [-0.6065306597, 0].
        k: key.
        v: value.
        kk: removal key.
        a: in-context learning rate.
        pool: states [S, H, V, K] fp32, fp16 or fp64, *modified*.
        slots: int64 [n], one a sequence, no slot twice; none negative, but in a call with a tensor
            of offsets: there -1 is a padding sequence.
        cu_seqlens: n + 1 offsets into T, growing from 0 to T; or a tensor of them, int32 or int64,
            that may also repeat an offset and end before T. The y of padding sequences, and of
            tokens behind the last one, is not written.

    Returns:
        y [T, H, N] fp32 (fp64 with an fp64 pool).
    """
    _check_rows([("r", r), ("w", w), ("k", k), ("v", v), ("kk", kk), ("a", a)], pool, None)
    return _prefill(wkv7_chunked, [r, w, k, v, kk, a], pool, slots, cu_seqlens)


def wkv6_decode(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, pool: Tensor, slots: Tensor
) -> Tensor:
    """Advance RWKV-6 rows by one token.

    `y = r @ (S + u * k v^T); S = exp(w) * S + k v^T`, S being [K, V]: y reads the old state.

    Args:
        r: receptance [B, H, N], any float dtype, as `k` and `v`.
        w: LOG decay [B, H, N], `-exp(..)`; may be as low as -inf.
        k: key [B, H, N].
        v: value [B, H, N].
        u: bonus of the current token [H, N].
        pool: states [S, H, K, V] fp32, fp16 or fp64, *modified*.
        slots: int64 [B], no slot twice; -1 is a padding row: nothing is written, its y is 0.

    Returns:
        y [B, H, N] fp32 (fp64 with an fp64 pool).
    """
    _check_rows([("r", r), ("w", w), ("k", k), ("v", v)], pool, slots)
    expect_shape("u", u, r.shape[1:])
    return _decode(lambda s, x: _step6(s, x, u.to(s.dtype)), [r, w, k, v], pool, slots)


def wkv6_prefill(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
) -> Tensor:
    """Read several sequences into RWKV-6 states: `wkv6_decode` token by token, but chunked.

    Exact for any decay: only decays between two tokens are formed, never their inverses.

    Args:
        r: receptance, packed [T, H, N], as `w`, `k` and `v` (see `wkv6_decode`).
        w: LOG decay; may be as low as -inf.
        k: key.
        v: value.
        u: bonus of the current token [H, N].
        pool: states [S, H, K, V] fp32, fp16 or fp64, *modified*.
        slots: int64 [n]; see `wkv7_prefill`.
        cu_seqlens: n + 1 offsets into T; see `wkv7_prefill`.

    Returns:
        y [T, H, N] fp32 (fp64 with an fp64 pool).
    """
    _check_rows([("r", r), ("w", w), ("k", k), ("v", v)], pool, None)
    expect_shape("u", u, r.shape[1:])
    return _prefill(
        lambda r, w, k, v, s: wkv6_chunked(r, w, k, v, u.to(s.dtype), s),
        [r, w, k, v],
        pool,
        slots,
        cu_seqlens,
    )


def wkv7_chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Read B sequences of T tokens; modifies nothing, and autograd goes through it.

    In a chunk the removals form a unit lower triangular system (the WY form of a product of
    `diag(w) - kk b^T`); solving it for all chunks at once leaves two small products a chunk.

    Args:
        r: receptance [B, T, H, N], as `w`, `k`, `v`, `kk` and `a` (see `wkv7_decode`).
        w: LOG decay, in [-0.6065306597, 0].
        k: key.
        v: value.
        kk: removal key.
        a: in-context learning rate.
        state: [B, H, V, K] fp32 or fp64.

    Returns:
        y [B, T, H, N] and the new state [B, H, V, K], both in the state's dtype.
    """
    seq_len = r.shape[1]
    r, w, k, v, kk, a = (_to_chunks(x, state.dtype) for x in (r, w, k, v, kk, a))
    log_decay = w.cumsum(-2)
    decay = log_decay.exp()
    before = (log_decay - w).exp()
    inverse = (-log_decay).exp()
    # Each hatted key is as seen from the chunk's first token, each tilded query from its own.
    kk_q, r_q = kk * before, r * decay
    b_k, k_k = kk * a * inverse, k * inverse
    lower = torch.tril(kk_q @ b_k.mT, -1)
    unit = lower + torch.eye(CHUNK_LEN, dtype=lower.dtype, device=lower.device)
    rhs = torch.cat((kk_q, torch.tril(kk_q @ k_k.mT, -1) @ v), -1)
    solved = torch.linalg.solve_triangular(unit, rhs, upper=False, unitriangular=True)
    from_state, from_value = solved.split(r.shape[-1], -1)
    read_b = torch.tril(r_q @ b_k.mT)
    query = r_q - read_b @ from_state
    y_local = torch.tril(r_q @ k_k.mT) @ v - read_b @ from_value
    last = decay[..., -1:, :]
    b_k, k_k = b_k * last, k_k * last
    carry = torch.diag_embed(last.squeeze(-2)) - from_state.mT @ b_k
    added = v.mT @ k_k - from_value.mT @ b_k
    ys = []
    for i in range(r.shape[0]):
        ys.append(y_local[i] + query[i] @ state.mT)
        state = added[i] + state @ carry[i]
    return _from_chunks(torch.stack(ys), seq_len), state


def wkv6_chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Read B sequences of T tokens; modifies nothing, and autograd goes through it.

    Args:
        r: receptance [B, T, H, N], as `w`, `k` and `v` (see `wkv6_decode`).
        w: LOG decay; may be as low as -inf.
        k: key.
        v: value.
        u: bonus of the current token [H, N].
        state: [B, H, K, V] fp32 or fp64.

    Returns:
        y [B, T, H, N] and the new state [B, H, K, V], both in the state's dtype.
    """
    seq_len = r.shape[1]
    chunks = [_to_chunks(x, state.dtype) for x in (r, w, k, v)]
    # [C, C, 1]: whether the decay of token j lies between the write of s and the read of t.
    at = torch.arange(CHUNK_LEN, device=r.device)
    after = (at[:, None] > at[None, :])[..., None]
    ys = []
    for r_c, w_c, k_c, v_c in zip(*chunks, strict=True):
        until = F.pad(w_c.cumsum(-2), (0, 0, 1, -1)).exp()
        rest = F.pad(w_c.flip(-2).cumsum(-2).flip(-2), (0, 0, -1, 1)).exp()
        # between[t, s] = sum of w over s < j < t, added up from 0 so that no large sums cancel.
        steps = torch.where(after, w_c[..., :, None, :], w_c.new_zeros(()))
        between = F.pad(steps.cumsum(-3), (0, 0, 0, 0, 1, -1)).exp()
        pairs = (r_c[..., :, None, :] * k_c[..., None, :, :] * between).sum(-1)
        scores = torch.tril(pairs, -1) + torch.diag_embed((r_c * u[:, None, :] * k_c).sum(-1))
        ys.append(scores @ v_c + (r_c * until) @ state)
        whole = w_c.sum(-2).exp()[..., None]
        state = whole * state + (k_c * rest).mT @ v_c
    return _from_chunks(torch.stack(ys), seq_len), state


def _step7(state: Tensor, inputs: list[Tensor]) -> Tensor:
    """Advance `state` [B, H, V, K] in place without large temporaries; return y [B, H, N]."""
    rows, heads, size = inputs[0].shape
    r, w, k, v, kk, a = (_as(x, state.dtype).reshape(rows * heads, 1, size) for x in inputs)
    flat = state.view(rows * heads, size, size)
    removed = torch.bmm(flat, kk.mT).neg_()
    flat.mul_(w.exp())
    flat.baddbmm_(torch.cat((v.mT, removed), 2), torch.cat((k, kk * a), 1))
    return torch.bmm(flat, r.mT).view(rows, heads, size)


def _step6(state: Tensor, inputs: list[Tensor], u: Tensor) -> Tensor:
    """Advance `state` [B, H, K, V] in place without large temporaries; return y [B, H, N]."""
    rows, heads, size = inputs[0].shape
    r, w, k, v = (_as(x, state.dtype) for x in inputs)
    flat = state.view(rows * heads, size, size)
    y = torch.bmm(r.reshape(-1, 1, size), flat).view(rows, heads, size)
    y += (r * u * k).sum(-1, keepdim=True) * v
    flat.mul_(w.exp().reshape(-1, size, 1))
    flat.baddbmm_(k.reshape(-1, size, 1), v.reshape(-1, 1, size))
    return y


def _decode(step: _Decode, inputs: list[Tensor], pool: Tensor, slots: Tensor) -> Tensor:
    """Apply `step` to the states at `slots`: a view where they are a run, else gather, scatter."""
    ids = slots.tolist()
    num_live = len(ids)
    while num_live and ids[num_live - 1] < 0:
        num_live -= 1
    if any(slot < 0 for slot in ids[:num_live]):
        live = slots >= 0
        y = _decode(step, [x[live] for x in inputs], pool, slots[live])
        return y.new_zeros(inputs[0].shape).masked_scatter_(live[:, None, None], y)
    if num_live < len(ids):
        y = inputs[0].new_zeros(inputs[0].shape, dtype=_compute_dtype(pool))
        if num_live:
            y[:num_live] = _decode(step, [x[:num_live] for x in inputs], pool, slots[:num_live])
        return y
    first = ids[0]
    if ids == list(range(first, first + num_live)) and pool.dtype == _compute_dtype(pool):
        return step(pool[first : first + num_live], inputs)
    state = pool[slots].to(_compute_dtype(pool))
    y = step(state, inputs)
    pool[slots] = state.to(pool.dtype)
    return y


def _prefill(
    chunked: _Chunked,
    inputs: list[Tensor],
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
) -> Tensor:
    """Apply `chunked` to each group of sequences of one length."""
    num_seqs = slots.numel()
    expect_shape("slots", slots, (num_seqs,))
    expect_dtype("slots", slots, (torch.int64,))
    if isinstance(cu_seqlens, Tensor):
        expect_shape("cu_seqlens", cu_seqlens, (num_seqs + 1,))
        cu_seqlens = cu_seqlens.tolist()
        live = [slot >= 0 for slot in slots.tolist()]
    else:
        expect_lengths(cu_seqlens, inputs[0].shape[0], num_seqs)
        live = [True] * num_seqs
    by_len: dict[int, list[int]] = {}
    for i in range(num_seqs):
        if live[i] and cu_seqlens[i + 1] > cu_seqlens[i]:
            by_len.setdefault(cu_seqlens[i + 1] - cu_seqlens[i], []).append(i)
    y = inputs[0].new_empty(inputs[0].shape, dtype=_compute_dtype(pool))
    for seq_len, seqs in by_len.items():
        starts = torch.tensor([cu_seqlens[i] for i in seqs], device=y.device)
        tokens = starts[:, None] + torch.arange(seq_len, device=y.device)
        rows = slots[torch.tensor(seqs, device=slots.device)]
        y_group, state = chunked(*(x[tokens] for x in inputs), pool[rows].to(y.dtype))
        y[tokens] = y_group
        pool[rows] = state.to(pool.dtype)
    return y


def _to_chunks(x: Tensor, to: torch.dtype) -> Tensor:
    """[B, T, H, N] -> [T/CHUNK_LEN, B, H, CHUNK_LEN, N], padded with tokens that change nothing."""
    rows, seq_len, heads, size = x.shape
    padded = F.pad(x.to(to), (0, 0, 0, 0, 0, -seq_len % CHUNK_LEN))
    chunks = padded.reshape(rows, -1, CHUNK_LEN, heads, size)
    return chunks.permute(1, 0, 3, 2, 4).contiguous()


def _from_chunks(x: Tensor, seq_len: int) -> Tensor:
    """[T/CHUNK_LEN, B, H, CHUNK_LEN, N] -> [B, T, H, N], without the padding."""
    _, rows, heads, _, size = x.shape
    return x.permute(1, 0, 3, 2, 4).reshape(rows, -1, heads, size)[:, :seq_len]


def _as(x: Tensor, to: torch.dtype) -> Tensor:
    """Convert; asks first, as even a conversion to the same dtype costs half a microsecond."""
    return x if x.dtype is to else x.to(to)


def _compute_dtype(pool: Tensor) -> torch.dtype:
    return torch.float64 if pool.dtype == torch.float64 else torch.float32


def _check_rows(named: list[tuple[str, Tensor]], pool: Tensor, slots: Tensor | None) -> None:
    shape = named[0][1].shape
    if len(shape) != 3:
        raise ValueError(f"{named[0][0]} must have 3 dimensions, got shape {list(shape)}")
    for name, tensor in named:
        expect_shape(name, tensor, shape)
    expect_shape("pool", pool, (pool.shape[0], shape[1], shape[2], shape[2]))
    expect_dtype("pool", pool, _POOL_DTYPES)
    if slots is not None:
        expect_shape("slots", slots, shape[:1])
        expect_dtype("slots", slots, (torch.int64,))
