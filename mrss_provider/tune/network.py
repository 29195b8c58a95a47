"""RWKV-7 and RWKV-6 as a differentiable function of a flat dict of weights in official names.

It reads the same tensors that the engine serves. Nothing here knows text or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mrss_provider.tune import rwkv6, rwkv7
from mrss_provider.tune.packing import Packing
from mrss_provider.tune.rwkv7 import embed, layer_norm
from mrss_provider.tune.wkv import Backend

Weights = Mapping[str, Tensor]


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
        """Read the sizes from the tensors of a checkpoint."""
        vocab_size, hidden_size = weights["emb.weight"].shape
        bonus = "time_faaaa" if version(weights) == 6 else "r_k"
        num_heads, head_size = weights[f"blocks.0.att.{bonus}"].shape
        layers = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
        return cls(len(layers), hidden_size, num_heads, head_size, vocab_size)

    @property
    def state_size(self) -> tuple[int, int, int, int]:
        """[L, H, N, N] of an initial state."""
        return self.num_layers, self.num_heads, self.head_size, self.head_size


def version(weights: Weights) -> int:
    """Return 6 or 7, by the names of the tensors."""
    return 6 if "blocks.0.att.time_faaaa" in weights else 7


@dataclass
class RowState:
    """What B rows carry from token to token.

    Attributes:
        wkv: one [B, H, N, N] fp32 a layer, [V, K] for RWKV-7 and [K, V] for RWKV-6.
        shift_att: one [B, C] a layer, the last output of ln1.
        shift_ffn: one [B, C] a layer, the last output of ln2.
    """

    wkv: list[Tensor]
    shift_att: list[Tensor]
    shift_ffn: list[Tensor]


def base_state(weights: Weights) -> Tensor:
    """Return where rows without a tuned state begin, [L, H, N, N] fp32: a new tensor.

    It is the weights' own `time_state` where they bring one, else zeros, as the model computes
    with it: [V, K] for RWKV-7, [K, V] for RWKV-6.
    """
    shape = Shape.of(weights)
    names = [f"blocks.{i}.att.time_state" for i in range(shape.num_layers)]
    if names[0] not in weights:
        return torch.zeros(shape.state_size, device=weights["emb.weight"].device)
    states = torch.stack([weights[name].float() for name in names])
    return states.mT.contiguous() if version(weights) == 6 else states


def start_state(shape: Shape, wkv: Tensor, dtype: torch.dtype) -> RowState:
    """Return the state of B rows that begin at `wkv` [B, L, H, N, N] with zero shifts."""
    zeros = wkv.new_zeros(wkv.shape[0], shape.hidden_size, dtype=dtype)
    layers = range(shape.num_layers)
    return RowState(list(wkv.unbind(1)), [zeros for _ in layers], [zeros for _ in layers])


def forward(
    weights: Weights,
    token_ids: Tensor,
    state: RowState,
    *,
    offsets: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, RowState]:
    """Run B rows over T tokens.

    Args:
        weights: official names, all of one dtype: the dtype of the matrix products. The residual
            stream, the norms, the decay and the recurrence are fp32 whatever that is. ln0 may be
            absent; a `time_state` is not read here, see `base_state`.
        token_ids: [B, T] int64.
        state: where the rows start; not modified.
        offsets: [B, L, C] fp32, each row's `time_offset`; None is zeros.
        backend: of the recurrence, see `wkv7`.

    Returns:
        hidden [B, T, C] (after ln_out, in the weights' dtype) and the state after the last token.
    """
    num_layers = len(state.wkv)
    layer = rwkv6 if version(weights) == 6 else rwkv7
    by_layer = [None] * num_layers if offsets is None else offsets.unbind(1)
    after = RowState([], [], [])
    x = embed(weights, token_ids)
    v_first: Tensor | None = None
    for i in range(num_layers):
        block = f"blocks.{i}."
        h = layer_norm(x, weights, block + "ln1")
        shift, wkv, offset = state.shift_att[i], state.wkv[i], by_layer[i]
        out, v_first, wkv = layer.time_mix(
            weights, block + "att.", h, shift, v_first, wkv, offset, backend
        )
        x = x + out
        after.wkv.append(wkv)
        after.shift_att.append(h[:, -1])
        h = layer_norm(x, weights, block + "ln2")
        x = x + layer.channel_mix(weights, block + "ffn.", h, state.shift_ffn[i])
        after.shift_ffn.append(h[:, -1])
    return layer_norm(x, weights, "ln_out"), after


def read_rows(
    weights: Weights,
    token_ids: Tensor,
    lengths: Sequence[int],
    wkv: Tensor,
    *,
    offsets: Tensor | None = None,
) -> Tensor:
    """Run B padded rows from the beginning, with frozen weights.

    RWKV-7 in 16 bits on CUDA packs the rows, so that padding costs nothing, and runs fused kernels;
    the others are `forward`.

    Args:
        weights: as `forward` takes them; they get no gradient.
        token_ids: [B, T] int64.
        lengths: tokens of each row; padding follows them.
        wkv: where each row begins, [B, L, H, N, N] fp32; the token shifts are zeros.
        offsets: as `forward` takes them.

    Returns:
        hidden [B, T, C]; on the padding it means nothing.
    """
    if packs_rows(weights):
        # Its kernels need Triton, which the other forms do without.
        from mrss_provider.tune.packed7 import forward_packed

        packing = Packing.of(lengths, token_ids.shape[1], token_ids.device)
        hidden = forward_packed(weights, packing.pack(token_ids), packing, wkv, offsets=offsets)
        return packing.unpack(hidden, token_ids.shape[1])
    start = start_state(Shape.of(weights), wkv, weights["emb.weight"].dtype)
    hidden, _ = forward(weights, token_ids, start, offsets=offsets)
    return hidden


def packs_rows(weights: Weights) -> bool:
    """Tell whether `read_rows` packs its rows for these weights."""
    emb = weights["emb.weight"]
    if not emb.is_cuda or emb.dtype == torch.float32 or version(weights) != 7:
        return False
    head_size = Shape.of(weights).head_size
    # What the kernels are built for.
    return 16 <= head_size <= 256 and head_size.bit_count() == 1


def logits(weights: Weights, hidden: Tensor) -> Tensor:
    """Return fp32 logits [..., V] of hidden [..., C]."""
    return F.linear(hidden, weights["head.weight"]).float()
