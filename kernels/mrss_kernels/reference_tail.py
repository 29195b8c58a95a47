"""The tail of a step in plain torch and fp64, request after request: the oracle of its kernels.

Same arguments as `tail.launch_tail`, any device, with a sort and host synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mrss_kernels.tail_tensors import (
    GATES,
    ORDERS,
    RULES,
    SAMPLED,
    SEEN,
    TailInputs,
    TailOutputs,
)

LOG_PROB_FLOOR = -30.0
NOVELTY_TEMPERATURE = 0.3
MAX_DIVERGENCE = 8.0
MIN_DIVERGENCE = 1e-4
MIN_TEMPERATURE = 1e-30


def tail(logits: Tensor, inputs: TailInputs, outputs: TailOutputs) -> None:
    """Pick one token for each request; see `mrss_kernels.tail.launch_tail`.

    `outputs.merged` is written for every request.
    """
    outputs.ids.fill_(-1)
    for g in range(inputs.num_groups):
        if inputs.column("num_rows")[g] > 0:
            _pick(g, logits, inputs, outputs)


def merge(
    logits: Tensor, named: Tensor, rule: str, gate: str, cut: float, *, base_named: bool
) -> Tensor:
    """Merge rows [K, V] with the weights that the names say [K] into one [V].

    One row comes back as it is. The formulas are those of MRSS's merge rules and gates: each
    returns canonical logits, on the scale of the rows' weighted log-mass.
    """
    if len(logits) == 1:
        return logits[0]
    log_probs = logits.log_softmax(-1)
    log_mass = logits.logsumexp(-1)
    weights = named
    if gate == "novelty":
        weights = _novelty(log_probs, named, anchored=rule == "delta")
    return _MERGES[rule](logits, log_probs, log_mass, weights, cut, base_named)


def penalise(merged: Tensor, g: int, inputs: TailInputs) -> Tensor:
    """Return merged logits [V] after request g's penalties and bias; counts are *decayed*."""
    scores = merged.clone()
    count_row = int(inputs.column("count_row")[g])
    if count_row >= 0:
        marks, counts = inputs.marks[count_row], inputs.counts[count_row]
        factor = inputs.column("repetition")[g].to(scores.dtype)
        seen = marks != 0
        repeated = torch.where(scores > 0, scores / factor, scores * factor)
        scores = torch.where(seen, repeated, scores)
        scores = scores - inputs.column("presence")[g] * ((marks & SAMPLED) != 0)
        scores = scores - inputs.column("frequency")[g] * counts
        counts *= inputs.column("decay")[g]
    bias_row = int(inputs.column("bias_row")[g])
    if bias_row >= 0:
        bias = inputs.bias[bias_row]
        scores = scores + bias.masked_fill(bias == -torch.inf, 0.0)
    return scores


def token_weights(scores: Tensor, g: int, inputs: TailInputs) -> Tensor:
    """Return what request g draws from: weights [V], 0 where truncation drops a token."""
    temperature = float(inputs.column("temperature")[g])
    if temperature < MIN_TEMPERATURE:
        weights = torch.zeros_like(scores)
        weights[scores.argmax()] = 1.0
        return weights
    is_rwkv = ORDERS[int(inputs.column("order")[g])] == "rwkv"
    looked_at = 1.0 if is_rwkv else temperature
    ranked, order = (scores / looked_at).softmax(-1).sort(descending=True, stable=True)
    cumulative = ranked.cumsum(-1)
    before = torch.cat((cumulative.new_zeros(1), cumulative[:-1]))
    rank = torch.arange(len(scores), device=scores.device)
    kept = torch.ones_like(ranked, dtype=torch.bool)
    top_k, top_p = int(inputs.column("top_k")[g]), float(inputs.column("top_p")[g])
    whole = 1.0
    if top_k:
        kept &= rank < top_k
        if not is_rwkv:
            whole = float(ranked[kept].sum())
    if top_p < 1:
        kept &= before < top_p * whole
    min_p = float(inputs.column("min_p")[g])
    if min_p > 0:
        least = scores.amax() + math.log(min_p) * looked_at
        kept &= scores[order] >= least
    weights = ((scores - scores.amax()) / temperature).exp()
    return weights.index_fill(0, order[~kept], 0.0)


def uniform(seed: int, choice: int, position: int) -> float:
    """Return the number in [0, 1) of a draw, from one word of Philox4x32-10.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = position & mask, choice & mask, 0, 0
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & mask, (a >> 32) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    magnitude = c0 if c0 < 1 << 31 else c0 ^ mask
    # What `tl.uint_to_uniform_float` does, in fp32.
    return float(torch.tensor(magnitude, dtype=torch.float32) * 4.6566127342e-10)


def _pick(g: int, logits: Tensor, inputs: TailInputs, outputs: TailOutputs) -> None:
    column = inputs.column
    first, count = int(column("first_row")[g]), int(column("num_rows")[g])
    rows = slice(first, first + count)
    banned = inputs.banned != 0
    bias_row = int(column("bias_row")[g])
    if bias_row >= 0:
        banned = banned | (inputs.bias[bias_row] == -torch.inf)
    logits[rows] = logits[rows].masked_fill(banned, -torch.inf)
    merged = merge(
        logits[rows].double(),
        inputs.named[rows].double(),
        RULES[int(column("rule")[g])],
        GATES[int(column("gate")[g])],
        float(column("cut")[g]),
        base_named=bool(column("base_named")[g]),
    )
    outputs.merged[g] = merged
    scores = penalise(merged, g, inputs)
    token = 0
    if bool(merged.amax().isfinite()):
        weights = token_weights(scores, g, inputs).cumsum(-1)
        u = uniform(int(inputs.seeds[g]), int(column("choice")[g]), int(column("position")[g]))
        token = int((weights <= u * weights[-1]).sum().clamp_max(len(weights) - 1))
        outputs.ids[g] = token
        outputs.log_probs[g] = merged.log_softmax(-1)[token]
        column("position")[g] += 1
        count_row = int(column("count_row")[g])
        if count_row >= 0:
            inputs.counts[count_row, token] += 1
            inputs.marks[count_row, token] |= SEEN | SAMPLED
    next_row = int(column("next_row")[g])
    if next_row >= 0:
        outputs.token_ids[next_row : next_row + count] = token


def _novelty(log_probs: Tensor, named: Tensor, *, anchored: bool) -> Tensor:
    floored = log_probs.clamp_min(LOG_PROB_FLOOR)
    divergence = (log_probs.exp() * (floored - floored[:1])).sum(-1).clamp_min(0.0)
    if not anchored:
        clipped = divergence.clamp_max(MAX_DIVERGENCE)
        return (named.log() + clipped / NOVELTY_TEMPERATURE).softmax(-1)
    if divergence.amax() < MIN_DIVERGENCE:
        return named / named.sum()
    return named * divergence / divergence.amax()


Merge = Callable[[Tensor, Tensor, Tensor, Tensor, float, bool], Tensor]


def _linear(
    logits: Tensor, log_probs: Tensor, log_mass: Tensor, weights: Tensor, cut: float, based: bool
) -> Tensor:
    terms = log_probs + weights.log().unsqueeze(-1)
    return terms.logsumexp(0) + (weights * log_mass).sum()


def _geometric(
    logits: Tensor, log_probs: Tensor, log_mass: Tensor, weights: Tensor, cut: float, based: bool
) -> Tensor:
    # 0 * -inf is no number, and a row without weight has no veto.
    heard = torch.where(weights.unsqueeze(-1) > 0, logits, 0.0)
    return (weights.unsqueeze(-1) * heard).sum(0)


def _delta(
    logits: Tensor, log_probs: Tensor, log_mass: Tensor, weights: Tensor, cut: float, based: bool
) -> Tensor:
    shares = torch.cat((1.0 - weights[1:].sum(0, keepdim=True), weights[1:]))
    floored = log_probs.clamp_min(LOG_PROB_FLOOR)
    merged = (shares.unsqueeze(-1) * floored).sum(0) + (shares * log_mass).sum()
    best = log_probs[0 if based else 1 :].amax(0)
    least = best.amax() + (math.log(cut) if cut > 0 else -math.inf)
    return merged.masked_fill(~((best >= least) & (best > -torch.inf)), -torch.inf)


_MERGES: dict[str, Merge] = {"linear": _linear, "geometric": _geometric, "delta": _delta}
