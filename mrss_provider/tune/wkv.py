"""The RWKV-7 recurrence in forms that have a gradient, for training and state tuning.

Per head, S [V, K]: `S_t = S_{t-1} (diag(w_t) - kk_t (kk_t a_t)^T) + v_t k_t^T`, `y_t = S_t r_t`.
`wkv7` and `wkv7_packed` pick fla's chunk kernels on CUDA (training only) and the chunked torch
form elsewhere.
"""

from __future__ import annotations

import sys
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from mrss_provider.tune.packing import Packing

CHUNK_LEN = 16
"""Tokens a chunk: the decay is at least exp(-0.6065) a token, so its inverse stays below 2e4."""

Backend = Literal["auto", "fla", "torch"]

FLA_CHUNK_LEN = 64
"""Tokens a chunk of packed sequences: the fastest of 16 and 64 on an H100, and no less exact."""

FLA_WARPS = (1, 4, 8)
"""Warps a program that are tried."""

_FLA_MODULES = (
    "fla.ops.generalized_delta_rule.dplr",
    "fla.ops.rwkv6.chunk",
    "fla.ops.common.chunk_h",
    "fla.ops.gla.chunk",
)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    state: Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T tokens from `state`.

    Args:
        r: [B, T, H, N], any floating dtype, as k, v, kk, a.
        w: [B, T, H, N] fp32, the log decay, in [-0.6066, 0).
        k: the key after `k * (1 + (a-1) * k_a)`.
        v: the value after the value residual.
        kk: the normalised removal key.
        a: the in-context learning rate, in (0, 1).
        state: [B, H, N, N] fp32, [V, K]; not modified.
        backend: `fla` needs CUDA; `auto` is fla there for T > 1 and 16-bit inputs, else torch.

    Returns:
        y [B, T, H, N] in r's dtype and the state after the last token, [B, H, N, N] fp32.
    """
    fits_fla = r.is_cuda and r.shape[1] > 1 and r.dtype != torch.float32
    if backend == "fla" or (backend == "auto" and fits_fla):
        y, last = _fla(
            r, w, k, v, -kk, kk * a, state, chunk_size=CHUNK_LEN, output_final_state=True
        )
        return y, last.transpose(-1, -2)
    if r.shape[1] == 1:
        return _wkv7_step(r, w, k, v, kk, a, state)
    return _wkv7_chunked(r, w, k, v, -kk.float(), kk.float() * a.float(), state)


def wkv7_packed(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    removal: Tensor,
    added: Tensor,
    state: Tensor,
    packing: Packing,
    *,
    keep: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Run the recurrence over N packed tokens of n sequences, each from its own state.

    Args:
        r: [N, H, N'], any floating dtype, as k, v, removal, added.
        w: [N, H, N'] fp32, the log decay, in [-0.6066, 0).
        k: the key, as `wkv7` takes it.
        v: the value, likewise.
        removal: -kk.
        added: kk a.
        state: [n, H, N', N'] fp32, [V, K]; not modified.
        packing: of the tokens.
        keep: whether fla keeps what it would compute again for the gradient, 34 bytes an element.
        backend: `fla` needs CUDA; `auto` is fla there for 16-bit inputs, else torch.

    Returns:
        y [N, H, N'] in r's dtype.
    """
    rows = [x[None] for x in (r, w, k, v, removal, added)]
    if backend == "fla" or (backend == "auto" and r.is_cuda and r.dtype != torch.float32):
        y, _ = _fla(
            *rows,
            state,
            chunk_size=FLA_CHUNK_LEN,
            disable_recompute=keep,
            cu_seqlens=packing.cu_seqlens,
            cu_seqlens_cpu=packing.cu_seqlens_cpu,
        )
        return y[0]
    outputs = []
    for i, (start, end) in enumerate(pairwise(packing.bounds)):
        inputs = [x[:, start:end] for x in rows] + [state[i : i + 1]]
        outputs.append(_wkv7_chunked(*inputs)[0][0])
    return torch.cat(outputs)


def _fla(*rows: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """Run fla's op on r, w, k, v, -kk, kk a and the state; its state is [K, V], so it is turned.

    The log decay is bounded, so that products may divide the decays out: `safe_gate`.
    """
    from fla.ops.rwkv7 import chunk_rwkv7

    *vectors, state = rows
    trim_fla(state.shape[-1])
    initial = state.transpose(-1, -2).contiguous()
    y, last = chunk_rwkv7(*vectors, scale=1.0, initial_state=initial, safe_gate=True, **options)
    return y, last


@cache
def trim_fla(head_size: int) -> None:
    """Leave the kernels of fla's RWKV ops a few candidates each; `fla.ops` must be imported.

    fla tries 6 to 60 configurations a kernel, some 300 compilations before the first step. What is
    left are the largest blocks that a head fills, with the fewest stages.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith(_FLA_MODULES)]
    for kernel in [value for module in modules for value in vars(module).values()]:
        tuner = kernel
        while tuner is not None and not hasattr(tuner, "configs"):
            tuner = vars(tuner).get("fn") if hasattr(tuner, "__dict__") else None
        if tuner is not None:
            tuner.configs = _few(tuner.configs, head_size)


def _few(configs: list[Any], head_size: int) -> list[Any]:
    filled = [config for config in configs if max(config.kwargs.values(), default=0) <= head_size]
    filled = filled or configs
    largest = max(sum(config.kwargs.values()) for config in filled)
    wide = [config for config in filled if sum(config.kwargs.values()) == largest]
    stages = min(config.num_stages for config in wide)
    wide = [config for config in wide if config.num_stages == stages]
    return [config for config in wide if config.num_warps in FLA_WARPS] or wide[:1]


def _wkv7_step(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, written as the definition: also what the chunked form is tested against."""
    r1, w1, k1, v1, kk1, a1 = (x[:, 0].float() for x in (r, w, k, v, kk, a))
    removed = torch.einsum("bhvk,bhk->bhv", state, kk1)
    state = (
        state * w1.exp()[:, :, None, :]
        - removed[..., None] * (kk1 * a1)[:, :, None, :]
        + v1[..., None] * k1[:, :, None, :]
    )
    return torch.einsum("bhvk,bhk->bhv", state, r1)[:, None].to(r.dtype), state


def _wkv7_chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, removal: Tensor, added: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The WY form: everything inside a chunk in parallel, one small product from chunk to chunk.

    With W_t the decay from the chunk's start, b = kk a, every vector is moved to the start:
    `x' = x W_t` for r, `x' = -kk W_{t-1}` for the removal key, `x / W_t` for k and b. Then
    `U = (I - tril(A' B'^T, -1))^{-1} (A' S0^T + tril(A' K'^T, -1) V)` are the rows removed.
    """
    num_tokens = r.shape[1]
    padded = -num_tokens % CHUNK_LEN
    rf, wf, kf, vf, af, bf = (to_chunks(x, padded) for x in (r, w, k, v, removal, added))
    log_decay = wf.cumsum(-2)
    grow = (-log_decay).exp()
    r_in = rf * log_decay.exp()
    a_in = af * (log_decay - wf).exp()
    k_in, b_in = kf * grow, bf * grow

    eye = torch.eye(CHUNK_LEN, dtype=torch.float32, device=r.device)
    solved = torch.linalg.solve_triangular(
        eye - (a_in @ b_in.mT).tril(-1), eye.expand(*a_in.shape[:-2], -1, -1), upper=False
    )
    from_state = solved @ a_in
    from_values = solved @ ((a_in @ k_in.mT).tril(-1) @ vf)
    more = vf.mT @ k_in
    end_decay = log_decay[..., -1:, :].exp()

    states, removed = [], []
    # Unbound once: the gradient of an index is as large as what was indexed.
    chunks = (x.unbind(2) for x in (from_state, from_values, b_in, more, end_decay))
    for through, own, b, gain, decay in zip(*chunks, strict=True):
        states.append(state)
        u = through @ state.mT + own
        removed.append(u)
        state = (state + u.mT @ b + gain) * decay
    start, u = torch.stack(states, 2), torch.stack(removed, 2)
    y = r_in @ start.mT + (r_in @ b_in.mT).tril() @ u + (r_in @ k_in.mT).tril() @ vf
    y = y.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2)
    return y.to(r.dtype), state


def to_chunks(x: Tensor, padded: int) -> Tensor:
    """[B, T, H, N] -> fp32 [B, H, chunks, CHUNK_LEN, N], zeros after the end.

    Zero is neutral everywhere: log decay 0 keeps the state, zero keys add and remove nothing.
    """
    x = torch.nn.functional.pad(x.float().transpose(1, 2), (0, 0, 0, padded))
    return x.reshape(*x.shape[:2], -1, CHUNK_LEN, x.shape[-1])
