"""GatingLayer: a small network that says, from how rows differ, what each weighs at this token.

For every row with a weight, in fp32: five features `f_k`, and `u_k = MLP([f_k, mean_j f_j])` with
the same 10-16-1 network for all rows, so that any number of states fits and their order is nothing.

    f_k = [entropy of p_k,
           largest log-probability,
           margin: largest minus second largest log-probability, at most 8,
           KL(p_k || p_0) to the base row, in [0, 8],
           KL(p_k || m) to the plain mean m of the rows that have a weight, in [0, 8]]
    h   = relu(W [f_k, mean_j f_j] + b)        W [16, 10], b [16]; the mean over rows with a weight
    u_k = s . h                                s [16]
    g_k = softmax_k(log w_k + u_k)             where weights sum to 1
    g_k = w_k exp(u_k - max_j u_j)             where they are strengths; over rows with a weight

`w` are the named weights. The logarithms of probabilities are floored at -30, as everywhere. A bias
of `u` would cancel in both forms, so there is none; features are normalised by constants of
the file, which are folded into `W` and `b`. With `s = 0` the gate is the named weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_provider.engine.merges import LOG_PROB_FLOOR, Rows

FEATURES = ("entropy", "top_log_prob", "top_margin", "kl_to_base", "kl_to_mean")
"""What the layer sees of a row, in this order."""

HIDDEN = 16
"""Units of the network."""

MAX_NATS = 8.0
"""Margins and divergences beyond it are as good as any."""


@dataclass(frozen=True, eq=False)
class GatingLayer:
    """The network's numbers, on the CPU in fp32, with the features' normalisation folded in.

    Attributes:
        hidden: W [16, 10].
        bias: b [16].
        score: s [16].
    """

    hidden: Tensor
    bias: Tensor
    score: Tensor

    @functools.cached_property
    def table(self) -> Tensor:
        """W by rows, then b, then s: [192] fp32, what a device's table of gates holds."""
        return torch.cat((self.hidden.flatten(), self.bias, self.score))

    def weights(self, rows: Rows, *, sums_to_one: bool) -> Tensor:
        """Return the gated weights [G, K]; row 0 of `rows` is the base.

        Args:
            rows: of this token.
            sums_to_one: whether the merge rule's weights do; else they are strengths.
        """
        hidden, bias, score = _on(self, rows.logits.device)
        heard = rows.named != 0
        u = scores(row_features(rows), heard, hidden, bias, score)
        if sums_to_one:
            return (rows.named.log() + u).softmax(-1)
        largest = u.masked_fill(~heard, -torch.inf).amax(-1, keepdim=True)
        return torch.where(heard, rows.named * (u - largest).exp(), 0.0)


def fold(mean: Tensor, scale: Tensor, hidden: Tensor, bias: Tensor, score: Tensor) -> GatingLayer:
    """Return the layer that normalises features as `(f - mean) / scale` before its network.

    Args:
        mean: [5] of the features.
        scale: [5], above 0.
        hidden: [16, 10], of normalised features.
        bias: [16].
        score: [16].
    """
    folded = hidden.double() / scale.double().repeat(2)
    shifted = bias.double() - (folded * mean.double().repeat(2)).sum(-1)
    return GatingLayer(folded.float(), shifted.float(), score.float().clone())


def row_features(rows: Rows) -> Tensor:
    """Return the features [G, K, 5] of every row, the base's own (row 0) among them."""
    probs, floored = rows.probs, rows.floored
    best = rows.logits.topk(min(2, rows.logits.shape[-1])).values
    # A vocabulary of one token has no second.
    margin = (best[..., 0] - best[..., -1]) if best.shape[-1] == 2 else rows.log_mass + torch.inf
    share = _shares(rows.named != 0)
    mean = (probs * share.unsqueeze(-1)).sum(1, keepdim=True)
    from_mean = floored - mean.log().clamp_min(LOG_PROB_FLOOR)
    return torch.stack(
        (
            -(probs * floored).sum(-1),
            best[..., 0] - rows.log_mass,
            margin.clamp_max(MAX_NATS),
            rows.divergence_from_base().clamp_max(MAX_NATS),
            (probs * from_mean).sum(-1).clamp(0.0, MAX_NATS),
        ),
        dim=-1,
    )


def scores(features: Tensor, heard: Tensor, hidden: Tensor, bias: Tensor, score: Tensor) -> Tensor:
    """Return `u` [G, K] of every row, differentiable in the network's numbers.

    Args:
        features: [G, K, 5].
        heard: [G, K] bool, rows that have a weight; at least one a request.
        hidden: [16, 10].
        bias: [16].
        score: [16].
    """
    mean = (features * _shares(heard).unsqueeze(-1)).sum(1, keepdim=True).expand_as(features)
    seen = torch.cat((features, mean), dim=-1)
    # Plain sums: a request's weights must not depend on what shares its step, see `Rows`.
    units = ((seen.unsqueeze(-2) * hidden).sum(-1) + bias).relu()
    return (units * score).sum(-1)


def _shares(heard: Tensor) -> Tensor:
    """Return weights [G, K] of a plain mean over the rows that are heard."""
    return heard.float() / heard.sum(-1, keepdim=True)


@functools.lru_cache(maxsize=64)
def _on(layer: GatingLayer, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return layer.hidden.to(device), layer.bias.to(device), layer.score.to(device)
