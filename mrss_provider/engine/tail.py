"""The tail of a step: logits of rows [B, V] to one token a request, in the one fixed order.

Allowed set, gate, merge (with its cut), penalties and bias, temperature and truncation, one draw.
Log-probabilities are reported of the merge, before penalties. A request whose numbers are not
finite gets an error of its own; the others are untouched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.engine.constraint import AllowedTokens, constrain
from mrss_provider.engine.gates import Gate, gate_of
from mrss_provider.engine.logits_processors import (
    Bias,
    Occurrences,
    apply_bias,
    apply_penalties,
    ban,
)
from mrss_provider.engine.merges import MergeRule, Rows, make_merge
from mrss_provider.engine.philox import uniform
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.sampler import sample, top_tokens
from mrss_provider.engine.trace import RowsTrace, trace_token
from mrss_provider.errors import MRSSError
from mrss_provider.sampling_params import SamplingParams

# Rows of requests that are merged at once on a CPU, in numbers: 1 MB, so that the half dozen
# passes over them stay in a core's cache. A GPU takes a group whole.
_CPU_CHUNK = 1 << 18


@dataclass(frozen=True)
class Pick:
    """One token to pick.

    Attributes:
        rows: which rows of the step's logits are the mixture's, in its order.
        choice: which of the request's answers.
        position: how many tokens of the answer came before.
        occurrences: what its penalties look at; None if it has none.
        trace: whether to tell what each row had to do with the token.
        forced: the token, where the answer is given; nothing is drawn then.
        probe: whether to tell which row weighs most.
        allowed: what a grammar leaves, already looked for; None is everything.
    """

    rows: Sequence[int]
    mixture: ResolvedMixture
    sampling: SamplingParams
    bias: Bias
    occurrences: Occurrences | None
    choice: int
    position: int
    trace: bool = False
    forced: int | None = None
    probe: bool = False
    allowed: AllowedTokens | None = None


class Picked(NamedTuple):
    """A token, or None where the numbers were not finite or a grammar left nothing.

    Attributes:
        row_log_probs: what each row gives the token, float32 [K], for a gate that reads answers.
        loudest: the row that weighs most, if the pick was a probe.
        error: why a grammar left nothing.
    """

    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    trace: RowsTrace | None = None
    row_log_probs: NDArray[np.float32] | None = None
    loudest: int | None = None
    error: MRSSError | None = None


def pick_tokens(logits: Tensor, picks: Sequence[Pick], banned_ids: Tensor) -> list[Picked]:
    """Pick one token for each of `picks`.

    Args:
        logits: [B, V] fp32, *modified*.
        picks: G of them; a row may serve several.
        banned_ids: [M] int64, ids that no request may get.
    """
    logits.index_fill_(1, banned_ids, -torch.inf)
    row_lists = [pick.rows for pick in picks]
    ban(logits, row_lists, [pick.bias for pick in picks])
    constrain(logits, row_lists, [pick.allowed for pick in picks])
    merged = merge_rows(logits, [(pick.rows, pick.mixture) for pick in picks])
    usable = merged.amax(-1).isfinite().tolist()
    wanted = [g for g, pick in enumerate(picks) if _is_reported(pick) and usable[g]]
    log_probs = merged[wanted].log_softmax(-1) if wanted else merged[:0]

    params = [pick.sampling for pick in picks]
    apply_penalties(merged, params, [pick.occurrences for pick in picks])
    apply_bias(merged, [pick.bias for pick in picks])
    draws = [_draw(pick) for pick in picks]
    ids = sample(merged, params, draws)
    ids = [i if pick.forced is None else pick.forced for i, pick in zip(ids, picks, strict=True)]

    picked = [Picked(i if ok else None) for i, ok in zip(ids, usable, strict=True)]
    for g, row in zip(wanted, log_probs, strict=True):
        picked[g] = _report(logits, picks[g], row, ids[g])
    for g, pick in enumerate(picks):
        if usable[g] and (pick.probe or gate_of(pick.mixture).reads_answer):
            picked[g] = _listen(logits, pick, picked[g])
        if pick.allowed is not None and pick.allowed.error is not None:
            picked[g] = Picked(None, error=pick.allowed.error)
    return picked


def merge_rows(logits: Tensor, parts: Sequence[tuple[Sequence[int], ResolvedMixture]]) -> Tensor:
    """Merge each part's rows of `logits` [B, V] into one row of the result [G, V].

    The result shares no memory with `logits`. One row alone is copied bit for bit.
    """
    groups: dict[tuple[MergeRule, Gate, int, bool], list[int]] = defaultdict(list)
    for g, (rows, mixture) in enumerate(parts):
        rule, gate = make_merge(mixture.merge), gate_of(mixture)
        groups[rule, gate, len(rows), mixture.base_named].append(g)
    merged = torch.empty(len(parts), logits.shape[-1], device=logits.device)
    for (rule, gate, num_rows, _), members in groups.items():
        size = len(members)
        if logits.device.type == "cpu":
            size = max(1, _CPU_CHUNK // (num_rows * logits.shape[-1]))
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            rows = [row for g in chunk for row in parts[g][0]]
            taken = logits[_where(rows, logits.device)]
            if num_rows > 1:
                mixtures = [parts[g][1] for g in chunk]
                taken = _merge_group(taken, mixtures, rule, gate)
            merged[_where(chunk, merged.device)] = taken
    return merged


def _merge_group(
    logits: Tensor,
    mixtures: Sequence[ResolvedMixture],
    rule: MergeRule,
    gate: Gate,
) -> Tensor:
    rows = _rows_of(logits, mixtures)
    return rule.merge(rows, gate.weights(rows, sums_to_one=rule.sums_to_one))


def _rows_of(logits: Tensor, mixtures: Sequence[ResolvedMixture]) -> Rows:
    """Return `logits` [G * K, V] as the rows of G mixtures that are alike."""
    return Rows(
        logits.view(len(mixtures), -1, logits.shape[-1]),
        torch.tensor([mixture.weights for mixture in mixtures], device=logits.device),
        torch.tensor([mixture.cut for mixture in mixtures], device=logits.device),
        base_named=mixtures[0].base_named,
    )


def _draw(pick: Pick) -> float:
    assert pick.sampling.seed is not None
    return uniform(pick.sampling.seed, pick.choice, pick.position)


def _where(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """Return an index of the given rows: a slice, which copies nothing, if they are neighbours."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def _is_reported(pick: Pick) -> bool:
    return pick.sampling.logprobs or pick.trace


def _report(logits: Tensor, pick: Pick, log_probs: Tensor, token_id: int) -> Picked:
    """Return the token with all that its request wants to know of it.

    `log_probs` [V] are the merge's, before penalties.
    """
    sampling = pick.sampling
    top = top_tokens(log_probs, sampling.top_logprobs) if sampling.top_logprobs else ()
    return Picked(
        token_id,
        float(log_probs[token_id]) if sampling.logprobs else None,
        top,
        _trace(logits, pick, log_probs, token_id) if pick.trace else None,
    )


def _listen(logits: Tensor, pick: Pick, picked: Picked) -> Picked:
    """Return `picked` with what the next tokens' gate wants to know of this one's rows."""
    mixture = pick.mixture
    rows = _rows_of(logits[_where(pick.rows, logits.device)], [mixture])
    if pick.probe:
        sums_to_one = make_merge(mixture.merge).sums_to_one
        weights = gate_of(mixture).weights(rows, sums_to_one=sums_to_one)
        return picked._replace(loudest=int(weights[0].argmax()))
    row_log_probs = rows.log_probs[0, :, picked.token_id].cpu().numpy()
    return picked._replace(row_log_probs=row_log_probs)


def _trace(logits: Tensor, pick: Pick, log_probs: Tensor, token_id: int) -> RowsTrace:
    mixture = pick.mixture
    rows = _rows_of(logits[_where(pick.rows, logits.device)], [mixture])
    rule = make_merge(mixture.merge)
    weights = gate_of(mixture).weights(rows, sums_to_one=rule.sums_to_one)
    return trace_token(
        rows,
        weights,
        rule,
        log_probs,
        token_id,
        names=mixture.names,
        ratios=mixture.ratios,
        has_base=mixture.base_row is not None,
    )
