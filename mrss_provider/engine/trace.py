"""The trace of a token: what each row of a mixture had to do with it, in numbers.

Computed after the token is known, for traced answers only, from the same rows and gated weights
that merged it. Nothing here changes what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_provider.engine.merges import MergeRule, Rows
from mrss_provider.engine.merges.product import exponents

AGREED_BELOW = 0.05
"""Nats of disagreement; a token with no more of it is one that all rows would have said."""

MAX_LOG_PROB = 9999.0
"""JSON has no infinity: log-probabilities and their differences stay within this."""

# The merged probability is the weighted sum of the rows': who said the token has an exact answer.
_MIXES = frozenset({"linear", "route"})
# The merged log-probability is a weighted sum of the rows', up to log Z.
_LOG_LINEAR = frozenset({"geometric", "product"})


@dataclass(frozen=True)
class RowsTrace:
    """One token, row by row. Tuples have an entry for each row of the mixture, in its order.

    All logarithms are natural. None stands for what does not exist; values are finite.

    Attributes:
        names: of the rows.
        token_id: the token.
        weights: the gated weights that merged it.
        log_probs: the token's log-probability under each row alone.
        merged_log_prob: under the merge, before penalties, temperature and truncation.
        responsibilities: `s_k p_k(x) / sum_j s_j p_j(x)`, where s are `weights` read as shares of a
            linear mixture: >= 0, sum 1, and under an anchored rule the base has what the strengths
            leave. They sum to 1. If `is_exact`, the probability that this row said the token.
        is_exact: whether the merge is that linear mixture.
        additive: terms of a log-linear rule; their sum minus `log_z` is `merged_log_prob`.
        log_z: what normalises them; None also where the cut has removed the token.
        leave_one_out: `merged_log_prob` minus what it is without the row: with the base in its
            place under an anchored rule, else with its gated weight at 0. None for the base of an
            anchored rule, and where no other row has weight.
        divergences: `KL(row || merge)` over the tokens that the cut left, nats.
        from_base: `KL(row || base)`, nats; None without a base row.
        entropies: nats.
        merged_entropy: nats.
        disagreement: of the named rows, in [0, log K]: entropy of their mixture minus their mean
            entropy, both by the ratios of the mixture's name and not by the gate, which would
            call it agreement when it hears one row only; nats.
        would_say: each row's likeliest token.
        who: the row that spoke.
    """

    names: tuple[str, ...]
    token_id: int
    weights: tuple[float, ...]
    log_probs: tuple[float, ...]
    merged_log_prob: float
    responsibilities: tuple[float, ...]
    is_exact: bool
    additive: tuple[float, ...] | None
    log_z: float | None
    leave_one_out: tuple[float | None, ...]
    divergences: tuple[float | None, ...]
    from_base: tuple[float, ...] | None
    entropies: tuple[float, ...]
    merged_entropy: float
    disagreement: float
    would_say: tuple[int, ...]
    who: int

    @property
    def agreed(self) -> bool:
        """Whether the rows agree so far that `who` says nothing."""
        return self.disagreement <= AGREED_BELOW


def trace_token(
    rows: Rows,
    weights: Tensor,
    rule: MergeRule,
    merged: Tensor,
    token_id: int,
    *,
    names: tuple[str, ...],
    ratios: Sequence[float],
    has_base: bool,
) -> RowsTrace:
    """Trace one token of one request.

    Args:
        rows: of this token, G = 1.
        weights: [1, K] fp32 as the gate gave them.
        rule: what merged the rows.
        merged: [V] fp32 log-probabilities of the merge, -inf where impossible.
        token_id: the token that was picked.
        names: of the rows, in their order.
        ratios: of the rows as the mixture's name has them, before gate and rule.
        has_base: whether row 0 is the base.
    """
    log_probs = rows.log_probs[0, :, token_id]
    merged_log_prob = float(merged[token_id])
    shares = _shares(weights[0], rule)
    entropies = _entropy(rows.probs[0])
    additive = _additive_terms(rows, weights[0], rule, token_id)
    numbers = [
        weights[0],
        log_probs,
        _responsibilities(shares, log_probs),
        _leave_one_out(rows, weights, rule, merged[token_id], token_id),
        _divergences(rows, merged),
        entropies,
        rows.divergence_from_base()[0] if has_base else torch.zeros_like(shares),
        torch.zeros_like(shares) if additive is None else additive,
    ]
    # One copy from the device for all rows' numbers.
    weight, log_prob, part, influence, kl, entropy, from_base, terms = (
        tuple(row) for row in torch.stack(numbers).tolist()
    )
    is_exact = rule.name in _MIXES
    leave_one_out = tuple(map(_known, influence))
    return RowsTrace(
        names=names,
        token_id=token_id,
        weights=weight,
        log_probs=_finite(log_prob),
        merged_log_prob=max(merged_log_prob, -MAX_LOG_PROB),
        responsibilities=part,
        is_exact=is_exact,
        additive=None if additive is None else _finite(terms),
        log_z=None if additive is None else _log_z(terms, merged_log_prob),
        leave_one_out=leave_one_out,
        divergences=tuple(map(_known, kl)),
        from_base=from_base if has_base else None,
        entropies=entropy,
        merged_entropy=float(_entropy(merged.exp())),
        disagreement=_disagreement(rows.probs[0], entropies, ratios),
        would_say=tuple(rows.logits[0].argmax(-1).tolist()),
        who=_speaker(part if is_exact else leave_one_out, part, anchored=rule.anchored),
    )


def _speaker(
    influence: Sequence[float | None], responsibilities: Sequence[float], *, anchored: bool
) -> int:
    """Return the row with the largest influence; the first of equals.

    Under an anchored rule a token that no state made likelier is the base's.
    """
    known = [(value, -k) for k, value in enumerate(influence) if value is not None]
    if not known:
        return max(range(len(responsibilities)), key=responsibilities.__getitem__)
    largest, minus_k = max(known)
    return 0 if anchored and largest <= 0 else -minus_k


def _shares(weights: Tensor, rule: MergeRule) -> Tensor:
    """Read gated weights [K] as shares of a linear mixture: >= 0, sum 1."""
    if rule.name == "route":
        return torch.zeros_like(weights).index_fill_(0, weights.argmax(), 1.0)
    shares = weights.clamp_min(0.0)
    if rule.anchored:
        base = (1.0 - weights[1:].sum(0, keepdim=True)).clamp_min(0.0)
        shares = torch.cat((base, shares[1:]))
    total = shares.sum()
    return torch.where(total > 0, shares / total, 1.0 / len(shares))


def _responsibilities(shares: Tensor, log_probs: Tensor) -> Tensor:
    """Return each row's part in the linear mixture's probability of the token [K].

    Where every row bans the token they are the shares.
    """
    return (shares.log() + log_probs.clamp_min(-MAX_LOG_PROB)).softmax(-1)


def _additive_terms(rows: Rows, weights: Tensor, rule: MergeRule, token_id: int) -> Tensor | None:
    """Return the terms of a log-linear rule [K], the base's own log-probability first."""
    if rule.anchored:
        floored = rows.floored[0, :, token_id]
        return torch.cat((floored[:1], weights[1:] * (floored[1:] - floored[0])))
    if rule.name in _LOG_LINEAR:
        if rule.name == "product":
            weights = exponents(weights)
        # 0 * -inf is no number, and a row without weight has no say.
        return torch.where(weights != 0, weights * rows.log_probs[0, :, token_id], 0.0)
    return None


def _log_z(terms: Sequence[float], merged_log_prob: float) -> float | None:
    if not math.isfinite(merged_log_prob):
        return None
    return _known(sum(terms) - merged_log_prob)


def _leave_one_out(
    rows: Rows, weights: Tensor, rule: MergeRule, merged_at: Tensor, token_id: int
) -> Tensor:
    """Return how much likelier each row made the token [K]; NaN where that has no meaning."""
    leave = _without_change if rule.anchored else _without_weight
    influence = []
    for k in range(weights.shape[1]):
        if rule.anchored and k == 0:
            influence.append(torch.full_like(merged_at, torch.nan))
        else:
            without = leave(rows, weights, rule, k)[0].log_softmax(-1)
            influence.append(merged_at - without[token_id])
    return torch.stack(influence)


def _without_change(rows: Rows, weights: Tensor, rule: MergeRule, k: int) -> Tensor:
    """Merge with the base in the place of row k: nothing is changed, nor kept from the cut."""
    order = list(range(weights.shape[1]))
    order[k] = 0
    others = Rows(rows.logits[:, order], rows.named, rows.cut, base_named=rows.base_named)
    return rule.merge(others, weights)


def _without_weight(rows: Rows, weights: Tensor, rule: MergeRule, k: int) -> Tensor:
    """Merge with the gated weight of row k at 0; NaN where no other row has weight."""
    left = weights.clone()
    left[:, k] = 0.0
    total = left.sum(-1, keepdim=True)
    merged = rule.merge(rows, left / total if rule.sums_to_one else left)
    return torch.where(total > 0, merged, torch.nan)


def _divergences(rows: Rows, merged: Tensor) -> Tensor:
    """Return `KL(row || merge)` [K] over the tokens that the merge left; NaN if none are."""
    kept = merged.isfinite() & (rows.probs[0] > 0)
    probs = torch.where(kept, rows.probs[0], 0.0)
    gains = torch.where(kept, probs * (rows.log_probs[0] - merged), 0.0)
    mass = probs.sum(-1)
    return (gains.sum(-1) / mass - mass.log()).clamp_min(0.0)


def _disagreement(probs: Tensor, entropies: Tensor, ratios: Sequence[float]) -> float:
    """Return `sum_k w_k KL(row_k || sum_j w_j row_j)`, the Jensen-Shannon divergence of [K, V]."""
    sizes = torch.tensor(ratios, device=probs.device).abs()
    named = sizes / sizes.sum()
    mixed = (named.unsqueeze(1) * probs).sum(0)
    return max(0.0, float(_entropy(mixed) - (named * entropies).sum()))


def _entropy(probs: Tensor) -> Tensor:
    """Return the entropy of the last dimension, nats."""
    entropies: Tensor = torch.special.entr(probs).sum(-1)
    return entropies


def _known(value: float) -> float | None:
    """Return `value` within bounds; None if it is no number."""
    return None if math.isnan(value) else max(-MAX_LOG_PROB, min(MAX_LOG_PROB, value))


def _finite(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(max(-MAX_LOG_PROB, value) for value in values)
