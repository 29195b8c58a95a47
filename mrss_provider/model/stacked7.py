"""Weights of RWKV-7's layers one below the other, as the persistent decode step reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from mrss_kernels.persistent7 import StackedLayers7
from mrss_kernels.persistent7_choice import persistent_obstacle
from mrss_kernels.persistent7_cuts import FFN_FACTOR
from torch import Tensor
from torch.nn import functional as F

from mrss_provider.model.linear import PlainLinear
from mrss_provider.model.products import tensor_of
from mrss_provider.model.rwkv7 import Layer7

if TYPE_CHECKING:
    from mrss_provider.model.rwkv7_cuda import PackedLayer


def stacking_obstacle(layers: Sequence[PackedLayer], head_size: int) -> str | None:
    """Return why a model's layers cannot, or should not, run in one launch, else None."""
    last = layers[-1]
    weights = [(each.project, each.output, each.ffn_key, each.ffn_value) for each in layers]
    if not all(isinstance(weight, Tensor) for each in weights for weight in each):
        return "its weights are quantised"
    project = cast(Tensor, last.project)
    channels = project.shape[1]
    if any(each.ranks[:3] != last.ranks[:3] for each in layers) or any(
        each.ranks != last.ranks for each in layers[1:]
    ):
        return "its layers have LoRAs of different ranks"
    if cast(Tensor, last.ffn_key).shape[0] != FFN_FACTOR * channels:
        return f"its FFN is not {FFN_FACTOR} times as wide as its layers"
    return persistent_obstacle(project.device, len(layers), channels, head_size, last.ranks)


def stack_layers(
    layers: Sequence[Layer7], packed: list[PackedLayer]
) -> tuple[list[PackedLayer], StackedLayers7]:
    """Stack packed layers' weights; a weight is held twice only while its kind is stacked.

    Args:
        layers: whose linears' weights are views of the packed ones; *modified* to views of the
            stack.
        packed: of layers that `stacking_obstacle` has nothing against; *modified* likewise, as
            whoever kept the old ones would hold all weights twice.

    Returns:
        `packed`, and the stack.
    """
    project = _stack(packed, "project")
    for i, layer in enumerate(layers):
        old = cast(Tensor, packed[i].project)
        packed[i] = replace(packed[i], project=project[i][: len(old)])
        downs = [layer.w1, layer.a1, layer.g1] + ([layer.v1] if layer.index else [])
        for linear in (layer.receptance, layer.key, layer.value, *downs):
            _move(cast(PlainLinear, linear), old, project[i])
    stacks: dict[str, Tensor] = {}
    for name in ("output", "ffn_key", "ffn_value"):
        # Many pieces that are free are no room for a stack.
        torch.cuda.empty_cache()
        stack = stacks[name] = _stack(packed, name)
        for i, layer in enumerate(layers):
            cast(PlainLinear, getattr(layer, name)).weight = stack[i]
            change: dict[str, Any] = {name: stack[i]}
            packed[i] = replace(packed[i], **change)
    last = packed[-1]
    up_ranks = ranks_of_up(last.ranks, _true_ranks(layers))
    if up_ranks == last.ranks:
        up = _stack(packed, "up", dim=1)
        # Layer 0's rows are shorter than the stack's.
        packed[1:] = [replace(each, up=new) for each, new in zip(packed[1:], up[1:], strict=True)]
    else:
        up = torch.stack([_without_filling(each, up_ranks) for each in packed])
    torch.cuda.empty_cache()
    stacked = StackedLayers7(
        project=project.flatten(0, 1),
        up=up.flatten(0, 1),
        output=stacks["output"].flatten(0, 1),
        ffn_key=stacks["ffn_key"].flatten(0, 1),
        ffn_value=stacks["ffn_value"].flatten(0, 1),
        groups=last.groups,
        norm1=torch.stack([torch.stack(each.ln1) for each in packed]).float(),
        norm2=torch.stack([torch.stack(each.ln2) for each in packed]).float(),
        mix=torch.stack([each.mix for each in packed]).float(),
        ffn_mix=torch.cat([each.ffn_mix for each in packed]).float(),
        vectors=torch.stack([each.vectors for each in packed]),
        ranks=last.ranks,
        up_ranks=up_ranks,
    )
    return packed, stacked


def ranks_of_up(ranks: Sequence[int], true_ranks: Sequence[int]) -> tuple[int, int, int, int]:
    """Return the ranks of LoRAs in `StackedLayers7.up`: `ranks`, or less where that saves a block.

    A block is 256 columns. If none is saved, the stack is the layers' own weights.

    Args:
        ranks: multiples of 64, to which the LoRAs of w, a, g, v are filled up with zeros.
        true_ranks: without these.
    """
    least = [min(-(-rank // 8) * 8, most) for rank, most in zip(true_ranks, ranks, strict=True)]
    saves = -(-sum(least) // 256) < -(-sum(ranks) // 256)
    rank_w, rank_a, rank_g, rank_v = least if saves else ranks
    return rank_w, rank_a, rank_g, rank_v


def _true_ranks(layers: Sequence[Layer7]) -> list[int]:
    """Return the largest ranks of the LoRAs of w, a, g, v in any layer; layer 0 has none of v."""
    columns = [[each.w1 for each in layers], [each.a1 for each in layers]]
    columns += [[each.g1 for each in layers], [each.v1 for each in layers[1:]]]
    return [max(len(tensor_of(linear)) for linear in column) for column in columns]


def _without_filling(layer: PackedLayer, up_ranks: Sequence[int]) -> Tensor:
    """Return a layer's `up` with fewer columns [C, sum(up_ranks)], zeros for what it has not."""
    halves = []
    for half, rank in zip(torch.split(layer.up, list(layer.ranks), 1), up_ranks, strict=True):
        halves.append(F.pad(half[:, :rank], (0, max(rank - half.shape[1], 0))))
    return torch.cat(halves, 1)


def _stack(packed: Sequence[PackedLayer], name: str, *, dim: int = 0) -> Tensor:
    """Return a weight of all layers [L, R, K], filled up with zeros along `dim` in layer 0."""
    weights: list[Tensor] = [getattr(each, name) for each in packed]
    stack = weights[-1].new_zeros((len(weights), *weights[-1].shape))
    for target, weight in zip(stack, weights, strict=True):
        target.narrow(dim, 0, weight.shape[dim]).copy_(weight)
    return stack


def _move(linear: PlainLinear, old: Tensor, new: Tensor) -> None:
    """Let a linear whose weight is rows of `old` have the same rows of `new`."""
    first = (linear.weight.data_ptr() - old.data_ptr()) // (old.stride(0) * old.element_size())
    linear.weight = new[first : first + len(linear.weight)]
