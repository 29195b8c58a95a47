"""The tail of a step in plain torch and fp64, request after request: the oracle of its kernels.

Same arguments as `tail.launch_tail`, any device, with a sort and host synchronisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mrss_kernels.reference_merge import Mixing, merge
from mrss_kernels.tail_tensors import (
    GATES,
    MAX_ENDS,
    ORDERS,
    RULES,
    SAMPLED,
    SEEN,
    TailInputs,
    TailOutputs,
)

MIN_TEMPERATURE = 1e-30


def tail(logits: Tensor, inputs: TailInputs, outputs: TailOutputs) -> None:
    """Pick one token for each request; see `mrss_kernels.tail.launch_tail`.

    `outputs.merged` is written for every request.
    """
    outputs.ids.fill_(-1)
    taken = [g for g in range(inputs.num_groups) if inputs.column("num_rows")[g] > 0]
    for g in taken:
        if inputs.column("allowed_row")[g] >= 0:
            _allow(g, logits, inputs)
    for g in taken:
        _pick(g, logits, inputs, outputs)


def mixing_of(g: int, inputs: TailInputs) -> Mixing:
    """Return how request g's rows become one."""

    def number(name: str) -> float:
        return float(inputs.column(name)[g])

    gate = GATES[int(inputs.column("gate")[g])]
    return Mixing(
        rule=RULES[int(inputs.column("rule")[g])],
        gate=gate,
        cut=number("cut"),
        base_named=bool(inputs.column("base_named")[g]),
        exponent=number("exponent"),
        tau=number("tau"),
        sharpness=number("sharpness"),
        network=inputs.gates[int(inputs.column("gate_row")[g])] if gate == "learned" else None,
    )


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


def _allow(g: int, logits: Tensor, inputs: TailInputs) -> None:
    """Leave request g's rows of `logits` the tokens that its mask does."""
    first, count = (int(inputs.column(name)[g]) for name in ("first_row", "num_rows"))
    rows, vocab = slice(first, first + count), logits.shape[1]
    own = inputs.allowed[int(inputs.column("allowed_row")[g])]
    words, ends = own[:-MAX_ENDS], own[-MAX_ENDS:]
    ends = ends[ends >= 0].long()
    if len(ends):
        moved = torch.cat((ends.new_zeros(1), ends))
        logits[rows, 0] = logits[rows][:, moved].double().logsumexp(-1).to(logits.dtype)
        logits[rows] = logits[rows].index_fill(1, ends, -torch.inf)
    bits = torch.arange(32, device=logits.device)
    is_out = (words[:, None] >> bits & 1).flatten()[:vocab] == 0
    logits[rows] = logits[rows].masked_fill(is_out, -torch.inf)


def _pick(g: int, logits: Tensor, inputs: TailInputs, outputs: TailOutputs) -> None:
    column = inputs.column
    first, count = int(column("first_row")[g]), int(column("num_rows")[g])
    rows = slice(first, first + count)
    banned = inputs.banned != 0
    bias_row = int(column("bias_row")[g])
    if bias_row >= 0:
        banned = banned | (inputs.bias[bias_row] == -torch.inf)
    logits[rows] = logits[rows].masked_fill(banned, -torch.inf)
    named = inputs.named[rows].double()
    merged = merge(logits[rows].double(), named, mixing_of(g, inputs))
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
