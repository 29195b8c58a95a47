"""What a token of the data costs: the state alone, the state inside a mixture, or its likeness.

A `TokenLoss` is differentiable in the state's own logits. The other rows of a mixture are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mrss_provider.engine.gates import Gate
from mrss_provider.engine.merges import MergeRule, Rows
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.errors import InvalidRequestError
from mrss_provider.model import TunedState
from mrss_provider.tune.examples import Batch
from mrss_provider.tune.network import (
    Shape,
    Weights,
    base_state,
    forward,
    logits,
    read_rows,
    start_state,
)


class TokenLoss(Protocol):
    """What the tokens of a batch cost."""

    def __call__(self, own: Tensor, batch: Batch, mask: Tensor) -> Tensor:
        """Return nats [M] of the true elements of `mask` [B, T].

        Args:
            own: [M, V] fp32 logits of the state that is learnt, there.
            batch: that they are of.
            mask: which of its targets are learnt.
        """
        ...


def nll(own: Tensor, batch: Batch, mask: Tensor) -> Tensor:
    """Return the negative log-likelihood of the targets: the state speaks alone."""
    return F.cross_entropy(own, batch.targets[mask], reduction="none")


class FrozenRows:
    """Rows of a mixture that are not learnt: given states, or the base (None)."""

    def __init__(self, weights: Weights, states: Sequence[TunedState | None]) -> None:
        self._weights = {name: tensor.detach() for name, tensor in weights.items()}
        self._states = states
        self._shape = Shape.of(weights)

    @torch.no_grad()
    def logits(self, batch: Batch, mask: Tensor) -> Tensor:
        """Return [M, K, V] fp32 of the true elements of `mask`, of which every row has read all."""
        rows = mask.any(1)
        inputs, inner = batch.inputs[rows], mask[rows]
        lengths = [n for n, read in zip(batch.lengths, rows.tolist(), strict=True) if read]
        read = [self._read(state, inputs, lengths)[inner] for state in self._states]
        return torch.stack([logits(self._weights, hidden) for hidden in read], 1)

    def _read(self, state: TunedState | None, inputs: Tensor, lengths: Sequence[int]) -> Tensor:
        count, device = len(inputs), inputs.device
        wkv = base_state(self._weights) if state is None else state.wkv.to(device)
        wkv = wkv.expand(count, *wkv.shape)
        offsets = None
        if state is not None and state.time_offset is not None:
            offsets = state.time_offset.to(device).expand(count, -1, -1)
        if state is None or _begins_with_wkv(state):
            return read_rows(self._weights, inputs, lengths, wkv, offsets=offsets)
        start = start_state(self._shape, wkv, self._weights["emb.weight"].dtype)
        for name in ("shift_att", "shift_ffn"):
            shift = getattr(state, name)
            if shift is not None:
                after = shift.to(device, start.shift_att[0].dtype)
                setattr(start, name, [one.expand(count, -1) for one in after])
        if state.metadata.bos:
            zeros = torch.zeros_like(inputs[:, :1])
            _, start = forward(self._weights, zeros, start, offsets=offsets)
        hidden, _ = forward(self._weights, inputs, start, offsets=offsets)
        return hidden


def _begins_with_wkv(state: TunedState) -> bool:
    """Tell whether a row of `state` begins with zero token shifts and no token before the text."""
    return state.shift_att is None and state.shift_ffn is None and not state.metadata.bos


class Beside:
    """The likelihood of a mixture of frozen rows and the state that is learnt, its last row."""

    def __init__(
        self, frozen: FrozenRows, merge: MergeRule, gate: Gate, named: Sequence[float]
    ) -> None:
        """Keep what the mixture is of.

        Args:
            frozen: all rows but the last, the base first where the rule or gate needs one.
            merge: of all rows; no cut, as a token that is cut off teaches nothing.
            gate: that needs no evidence.
            named: the weights of all rows, as `MergeRule.scale` gives them.
        """
        refuse_priors(gate)
        self._frozen = frozen
        self._merge, self._gate = merge, gate
        self._named = named

    def __call__(self, own: Tensor, batch: Batch, mask: Tensor) -> Tensor:
        """Return the merge's negative log-likelihood of the targets."""
        others = self._frozen.logits(batch, mask)
        rows_logits = torch.cat((others, own[:, None]), 1)
        named = own.new_tensor(self._named).expand(len(own), -1)
        rows = Rows(rows_logits, named, own.new_zeros(len(own)))
        weights = self._gate.weights(rows, sums_to_one=self._merge.sums_to_one)
        return F.cross_entropy(
            self._merge.merge(rows, weights), batch.targets[mask], reduction="none"
        )


class Imitation:
    """`KL(mixture || state)`: the state learns to say what a mixture says."""

    def __init__(
        self, weights: Weights, mixture: ResolvedMixture, merge: MergeRule, gate: Gate
    ) -> None:
        refuse_priors(gate)
        self._frozen = FrozenRows(weights, mixture.states)
        self._mixture = mixture
        self._merge, self._gate = merge, gate

    def __call__(self, own: Tensor, batch: Batch, mask: Tensor) -> Tensor:
        """Return the divergence of each token's distribution from the mixture's."""
        return divergence(self.merged(batch, mask), own)

    @torch.no_grad()
    def merged(self, batch: Batch, mask: Tensor) -> Tensor:
        """Return the mixture's log-probabilities [M, V]; -inf where its cut removes a token."""
        logits_of_rows = self._frozen.logits(batch, mask)
        count = len(logits_of_rows)
        named = logits_of_rows.new_tensor(self._mixture.weights).expand(count, -1)
        cut = logits_of_rows.new_full((count,), self._mixture.cut)
        rows = Rows(logits_of_rows, named, cut, base_named=self._mixture.base_named)
        weights = self._gate.weights(rows, sums_to_one=self._merge.sums_to_one)
        return self._merge.merge(rows, weights).log_softmax(-1)


def divergence(merged: Tensor, own: Tensor) -> Tensor:
    """Return `KL(mixture || state)` in nats [M].

    Args:
        merged: [M, V] log-probabilities of the mixture, -inf where its cut removes a token.
        own: [M, V] logits of the state.
    """
    gap = merged.clamp_min(torch.finfo(merged.dtype).min) - own.log_softmax(-1)
    return (merged.exp() * gap).sum(-1)


def refuse_priors(gate: Gate) -> None:
    """Refuse a gate whose weights depend on who wrote what, which tuning does not tell it.

    Raises:
        InvalidRequestError: names the gate.
    """
    if type(gate).prior is not Gate.prior:
        raise InvalidRequestError(
            f"states are not tuned under the gate {gate.name!r}, whose weights depend on what the "
            "user wrote or on the position; choose fixed, novelty or confidence",
            param="gate",
        )
