"""RWKV-7 as a differentiable function of a flat dict of weights in the official names.

It reads the same tensors that the engine serves. Nothing here knows text or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mrss_provider.tune.wkv import Backend, wkv7

Weights = Mapping[str, Tensor]

LOG_DECAY_SCALE = -0.606530659712633
"""-exp(-0.5): the log decay is this times a sigmoid."""

EPS = 1e-5
GROUP_NORM_EPS = 64e-5


@dataclass(frozen=True)
class Shape:
    """L layers, C channels, H heads of N, V vocabulary rows."""

    num_layers: int
    hidden_size: int
    num_heads: int
    head_size: int
    vocab_size: int

    @classmethod
    def of(cls, weights: Weights) -> Shape:
        """Read the sizes from the tensors of an RWKV-7 checkpoint."""
        vocab_size, hidden_size = weights["emb.weight"].shape
        num_heads, head_size = weights["blocks.0.att.r_k"].shape
        layers = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
        return cls(len(layers), hidden_size, num_heads, head_size, vocab_size)

    @property
    def state_size(self) -> tuple[int, int, int, int]:
        """[L, H, N, N] of an initial state."""
        return self.num_layers, self.num_heads, self.head_size, self.head_size


@dataclass
class RowState:
    """What B rows carry from token to token.

    Attributes:
        wkv: one [B, H, N, N] fp32 a layer, [V, K].
        shift_att: one [B, C] a layer, the last output of ln1.
        shift_ffn: one [B, C] a layer, the last output of ln2.
    """

    wkv: list[Tensor]
    shift_att: list[Tensor]
    shift_ffn: list[Tensor]


def base_state(weights: Weights) -> Tensor:
    """Return where rows without a tuned state begin, [L, H, N, N] fp32: a new tensor.

    It is the weights' own `time_state` where they bring one, else zeros.
    """
    shape = Shape.of(weights)
    names = [f"blocks.{i}.att.time_state" for i in range(shape.num_layers)]
    if names[0] not in weights:
        return torch.zeros(shape.state_size, device=weights["emb.weight"].device)
    return torch.stack([weights[name].float() for name in names])


def start_state(shape: Shape, wkv: Tensor, dtype: torch.dtype) -> RowState:
    """Return the state of B rows that begin at `wkv` [B, L, H, N, N] with zero shifts."""
    zeros = wkv.new_zeros(wkv.shape[0], shape.hidden_size, dtype=dtype)
    layers = range(shape.num_layers)
    return RowState([wkv[:, i] for i in layers], [zeros for _ in layers], [zeros for _ in layers])


def forward(
    weights: Weights,
    token_ids: Tensor,
    state: RowState,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, RowState]:
    """Run B rows over T tokens.

    Args:
        weights: official names, all of one dtype: the dtype of the matrix products. The residual
            stream, the norms, the decay and the recurrence are fp32 whatever that is. ln0 may be
            absent; a `time_state` is not read here, see `base_state`.
        token_ids: [B, T] int64.
        state: where the rows start; not modified.
        backend: of the recurrence, see `wkv7`.

    Returns:
        hidden [B, T, C] (after ln_out, in the weights' dtype) and the state after the last token.
    """
    num_layers = len(state.wkv)
    after = RowState([], [], [])
    x = F.embedding(token_ids, weights["emb.weight"]).float()
    if "blocks.0.ln0.weight" in weights:
        x = _layer_norm(x, weights, "blocks.0.ln0").float()
    v_first: Tensor | None = None
    for i in range(num_layers):
        block = f"blocks.{i}."
        h = _layer_norm(x, weights, block + "ln1")
        out, v_first, wkv = _time_mix(
            weights, block + "att.", h, state.shift_att[i], v_first, state.wkv[i], backend
        )
        x = x + out
        after.wkv.append(wkv)
        after.shift_att.append(h[:, -1])
        h = _layer_norm(x, weights, block + "ln2")
        x = x + _channel_mix(weights, block + "ffn.", h, state.shift_ffn[i])
        after.shift_ffn.append(h[:, -1])
    return _layer_norm(x, weights, "ln_out"), after


def logits(weights: Weights, hidden: Tensor) -> Tensor:
    """Return fp32 logits [..., V] of hidden [..., C]."""
    return F.linear(hidden, weights["head.weight"]).float()


def _time_mix(
    weights: Weights,
    name: str,
    h: Tensor,
    shift: Tensor,
    v_first: Tensor | None,
    state: Tensor,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual update [B, T, C], the first layer's value and the wkv state."""

    def get(key: str) -> Tensor:
        return weights[name + key]

    num_heads, head_size = get("r_k").shape
    heads = (*h.shape[:2], num_heads, head_size)
    d = torch.cat([shift[:, None], h[:, :-1]], 1) - h
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
    # A group norm over heads: one layer norm a head, then the affine part over all channels.
    y = F.layer_norm(y.float(), (head_size,), eps=GROUP_NORM_EPS).flatten(2)
    y = (y * get("ln_x.weight").float() + get("ln_x.bias").float()).to(h.dtype)
    bonus = (r * k * get("r_k")).sum(-1, keepdim=True) * v_heads
    return F.linear((y + bonus.flatten(2)) * g, get("output.weight")), v_first, state


def _channel_mix(weights: Weights, name: str, h: Tensor, shift: Tensor) -> Tensor:
    d = torch.cat([shift[:, None], h[:, :-1]], 1) - h
    xk = torch.addcmul(h, d, weights[name + "x_k"].reshape(-1))
    k = torch.relu(F.linear(xk, weights[name + "key.weight"])) ** 2
    return F.linear(k, weights[name + "value.weight"])


def _layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    """LayerNorm of fp32 `x` with fp32 statistics; the result has the weights' dtype."""
    weight, bias = weights[name + ".weight"], weights[name + ".bias"]
    out = F.layer_norm(x, x.shape[-1:], weight.float(), bias.float(), EPS)
    return out.to(weight.dtype)
