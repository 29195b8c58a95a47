"""One layer of RWKV-6 as a differentiable function of weights in the official names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mrss_provider.tune.rwkv7 import head_norm, token_shift
from mrss_provider.tune.wkv import Backend
from mrss_provider.tune.wkv6 import wkv6


def time_mix(
    weights: Mapping[str, Tensor],
    name: str,
    h: Tensor,
    shift: Tensor,
    v_first: Tensor | None,
    state: Tensor,
    offset: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the residual update [B, T, C], `v_first` as it came, and the wkv state.

    The arguments are those of `rwkv7.time_mix`, the state [K, V].
    """

    def get(key: str) -> Tensor:
        return weights[name + key]

    heads = (*h.shape[:2], *get("time_faaaa").shape)
    d = token_shift(h, shift)
    codes = torch.tanh(torch.addcmul(h, d, get("time_maa_x").reshape(-1)) @ get("time_maa_w1"))
    codes = torch.stack(codes.chunk(5, -1)).flatten(1, 2)
    moved = (codes @ get("time_maa_w2")).view(5, *h.shape)
    xw, xk, xv, xr, xg = (
        torch.addcmul(h, d, get("time_maa_" + c).reshape(-1) + moved[i])
        for i, c in enumerate("wkvrg")
    )
    decay = (torch.tanh(xw @ get("time_decay_w1")) @ get("time_decay_w2")).float()
    log_decay = -torch.exp(get("time_decay").float().reshape(-1) + decay)
    r, k, v = (
        F.linear(x, get(key + ".weight")).view(heads)
        for x, key in ((xr, "receptance"), (xk, "key"), (xv, "value"))
    )
    bonus = get("time_faaaa").float()
    y, state = wkv6(r, log_decay.view(heads), k, v, bonus, state, backend=backend)
    g = F.silu(F.linear(xg, get("gate.weight")))
    y = head_norm(weights, name, y, offset).to(h.dtype)
    return F.linear(y * g, get("output.weight")), v_first, state


def channel_mix(weights: Mapping[str, Tensor], name: str, h: Tensor, shift: Tensor) -> Tensor:
    """Return the residual update [B, T, C] of `h` [B, T, C], after ln2."""
    d = token_shift(h, shift)
    xk = torch.addcmul(h, d, weights[name + "time_maa_k"].reshape(-1))
    xr = torch.addcmul(h, d, weights[name + "time_maa_r"].reshape(-1))
    k = torch.relu(F.linear(xk, weights[name + "key.weight"])) ** 2
    gate = torch.sigmoid(F.linear(xr, weights[name + "receptance.weight"]))
    return gate * F.linear(k, weights[name + "value.weight"])
