"""The RWKV-6 recurrence in forms that have a gradient, for state tuning.

Per head, S [K, V], `kv_t = k_t v_t^T`: `y_t = r_t (S_{t-1} + diag(u) kv_t)`, and then
`S_t = diag(w_t) S_{t-1} + kv_t`.
`wkv6` picks fla's chunk kernels on CUDA and the chunked torch form elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mrss_provider.tune.wkv import CHUNK_LEN, Backend, to_chunks, trim_fla


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T tokens from `state`.

    Args:
        r: [B, T, H, N], any floating dtype, as k and v.
        w: [B, T, H, N] fp32, the log decay, at most 0.
        k: the key.
        v: the value.
        u: [H, N] fp32, the bonus of the token itself.
        state: [B, H, N, N] fp32, [K, V]; not modified.
        backend: `fla` needs CUDA; `auto` is fla there for T > 1 and 16-bit inputs, else torch.

    Returns:
        y [B, T, H, N] in r's dtype and the state after the last token, [B, H, N, N] fp32.
    """
    fits_fla = r.is_cuda and r.shape[1] > 1 and r.dtype != torch.float32
    if backend == "fla" or (backend == "auto" and fits_fla):
        from fla.ops.rwkv6 import chunk_rwkv6

        trim_fla(state.shape[-1])
        y, last = chunk_rwkv6(
            r, k, v, w, u, scale=1.0, initial_state=state, output_final_state=True
        )
        return y, last
    return _wkv6_chunked(r, w, k, v, u, state)


def _wkv6_chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Everything inside a chunk in parallel, one small product from chunk to chunk.

    A decay may be as strong as it likes, so no inverse of it is taken: the decay between two
    tokens of a chunk is the exponential of a difference that is never above 0.
    """
    num_tokens = r.shape[1]
    rf, wf, kf, vf = (to_chunks(x, -num_tokens % CHUNK_LEN) for x in (r, w, k, v))
    exact = wf.double().cumsum(-2)
    # A difference of two large sums keeps the bits of their fractions only if the whole parts are
    # taken from each other by themselves.
    whole = exact.detach().round()
    steps, fraction = whole.float(), (exact - whole).float()
    earlier_steps, earlier = (F.pad(x[..., :-1, :], (0, 0, 1, 0)) for x in (steps, fraction))
    apart = earlier_steps[..., :, None, :] - steps[..., None, :, :]
    apart = apart + (earlier[..., :, None, :] - fraction[..., None, :, :])
    left = (steps[..., -1:, :] - steps) + (fraction[..., -1:, :] - fraction)
    later = torch.ones(CHUNK_LEN, CHUNK_LEN, dtype=torch.bool, device=r.device).tril(-1)
    decay = apart.masked_fill(~later[:, :, None], -torch.inf).exp()
    inner = torch.einsum("...tc,...sc,...tsc->...ts", rf, kf, decay)
    own = (rf * u[:, None, None, :] * kf).sum(-1)
    inner = inner + torch.diag_embed(own)
    added = (kf * left.exp()).mT @ vf
    kept = exact.float()[..., -1, :, None].exp()

    states = []
    for more, factor in zip(added.unbind(2), kept.unbind(2), strict=True):
        states.append(state)
        state = state * factor + more
    y = inner @ vf + (rf * (earlier_steps + earlier).exp()) @ torch.stack(states, 2)
    y = y.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2)
    return y.to(r.dtype), state
