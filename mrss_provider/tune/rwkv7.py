"""One layer of RWKV-7 as a differentiable function of weights in the official names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mrss_provider.tune.wkv import Backend, wkv7

LOG_DECAY_SCALE = -0.606530659712633
"""-exp(-0.5): the log decay is this times a sigmoid."""

LN_EPS = 1e-5
GROUP_NORM_EPS = 64e-5


def embed(weights: Mapping[str, Tensor], token_ids: Tensor) -> Tensor:
    """Return the residual stream [..., C] fp32 at the beginning; ln0 may be absent."""
    x = F.embedding(token_ids, weights["emb.weight"]).float()
    if "blocks.0.ln0.weight" in weights:
        x = layer_norm(x, weights, "blocks.0.ln0").float()
    return x


def layer_norm(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Return LayerNorm of fp32 `x` with fp32 statistics, in the weights' dtype."""
    weight, bias = weights[name + ".weight"], weights[name + ".bias"]
    out = F.layer_norm(x, x.shape[-1:], weight.float(), bias.float(), LN_EPS)
    return out.to(weight.dtype)


def time_mix(
    weights: Mapping[str, Tensor],
    name: str,
    h: Tensor,
    shift: Tensor,
    v_first: Tensor | None,
    state: Tensor,
    offset: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual update [B, T, C], the first layer's value and the wkv state.

    Args:
        weights: of the whole model.
        name: what the names of this layer's begin with.
        h: [B, T, C], after ln1.
        shift: [B, C], the token before.
        v_first: the first layer's value; None in that layer.
        state: [B, H, N, N] fp32, [V, K].
        offset: [B, C] fp32, `y * (1 + offset)` right after the recurrence; or None.
        backend: of the recurrence.
    """

    def get(key: str) -> Tensor:
        return weights[name + key]

    num_heads, head_size = get("r_k").shape
    heads = (*h.shape[:2], num_heads, head_size)
    d = token_shift(h, shift)
    xr, xw, xk, xv, xa, xg = (torch.addcmul(h, d, get("x_" + c).reshape(-1)) for c in "rwkvag")
    r = F.linear(xr, get("receptance.weight"))
    k = F.linear(xk, get("key.weight"))
    v = F.linear(xv, get("value.weight"))
    decay = get("w0").float().reshape(-1) + (torch.tanh(xw @ get("w1")) @ get("w2")).float()
    log_decay = LOG_DECAY_SCALE * torch.sigmoid(decay)
    if v_first is None:
        v_first = v
    else:
        v = torch.lerp(
            v, v_first, torch.sigmoid(get("v0").reshape(-1) + (xv @ get("v1")) @ get("v2"))
        )
    a = torch.sigmoid(get("a0").reshape(-1) + (xa @ get("a1")) @ get("a2"))
    g = torch.sigmoid(xg @ get("g1")) @ get("g2")
    kk = F.normalize((k * get("k_k").reshape(-1)).view(heads).float(), dim=-1).to(k.dtype)
    k = k * (1 + (a - 1) * get("k_a").reshape(-1))
    r, k, v_heads, a = r.view(heads), k.view(heads), v.view(heads), a.view(heads)
    y, state = wkv7(r, log_decay.view(heads), k, v_heads, kk, a, state, backend=backend)
    y = head_norm(weights, name, y, offset).to(h.dtype)
    bonus = (r * k * get("r_k")).sum(-1, keepdim=True) * v_heads
    return F.linear((y + bonus.flatten(2)) * g, get("output.weight")), v_first, state


def channel_mix(weights: Mapping[str, Tensor], name: str, h: Tensor, shift: Tensor) -> Tensor:
    """Return the residual update [B, T, C] of `h` [B, T, C], after ln2."""
    d = token_shift(h, shift)
    xk = torch.addcmul(h, d, weights[name + "x_k"].reshape(-1))
    k = torch.relu(F.linear(xk, weights[name + "key.weight"])) ** 2
    return F.linear(k, weights[name + "value.weight"])


def token_shift(h: Tensor, shift: Tensor) -> Tensor:
    """Return the token before minus the token itself [B, T, C]; `shift` [B, C] is before all."""
    return torch.cat([shift[:, None], h[:, :-1]], 1) - h


def head_norm(weights: Mapping[str, Tensor], name: str, y: Tensor, offset: Tensor | None) -> Tensor:
    """Return ln_x of the recurrence's output [B, T, H, N], after the offset: [B, T, C] fp32."""
    y = y.float()
    if offset is not None:
        y = y * (1 + offset.view(-1, 1, *y.shape[2:]))
    # A group norm over heads: one layer norm a head, then the affine part over all channels.
    y = F.layer_norm(y, y.shape[-1:], eps=GROUP_NORM_EPS).flatten(2)
    return y * weights[name + "ln_x.weight"].float() + weights[name + "ln_x.bias"].float()
