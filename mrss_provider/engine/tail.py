"""The tail of a step: logits of rows [B, V] to one token a request, in the one fixed order.

Allowed set, gate, merge (with its cut), penalties and bias, temperature and truncation, one draw.
Log-probabilities are reported of the merge, before penalties. A request whose numbers are not
finite gets an error of its own; the others are untouched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_provider.engine.gates import GATES
from mrss_provider.engine.logits_processors import (
    Bias,
    Occurrences,
    apply_bias,
    apply_penalties,
    ban,
)
from mrss_provider.engine.merge import MERGE_RULES, Rows
from mrss_provider.engine.philox import uniform
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.sampler import sample, top_tokens
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
    """

    rows: Sequence[int]
    mixture: ResolvedMixture
    sampling: SamplingParams
    bias: Bias
    occurrences: Occurrences | None
    choice: int
    position: int


@dataclass(frozen=True)
class Picked:
    """A token, or None where the numbers were not finite."""

    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def pick_tokens(logits: Tensor, picks: Sequence[Pick], banned_ids: Tensor) -> list[Picked]:
    """Pick one token for each of `picks`.

    Args:
        logits: [B, V] fp32, *modified*.
        picks: G of them; a row may serve several.
        banned_ids: [M] int64, ids that no request may get.
    """
    logits.index_fill_(1, banned_ids, -torch.inf)
    ban(logits, [pick.rows for pick in picks], [pick.bias for pick in picks])
    merged = merge_rows(logits, [(pick.rows, pick.mixture) for pick in picks])
    usable = merged.amax(-1).isfinite().tolist()
    wanted = [g for g, pick in enumerate(picks) if pick.sampling.logprobs and usable[g]]
    log_probs = merged[wanted].log_softmax(-1) if wanted else merged[:0]

    params = [pick.sampling for pick in picks]
    apply_penalties(merged, params, [pick.occurrences for pick in picks])
    apply_bias(merged, [pick.bias for pick in picks])
    draws = [_draw(pick) for pick in picks]
    ids = sample(merged, params, draws)

    picked = [Picked(i if ok else None) for i, ok in zip(ids, usable, strict=True)]
    for g, row in zip(wanted, log_probs, strict=True):
        picked[g] = _with_log_probs(ids[g], row, picks[g].sampling.top_logprobs)
    return picked


def merge_rows(logits: Tensor, parts: Sequence[tuple[Sequence[int], ResolvedMixture]]) -> Tensor:
    """Merge each part's rows of `logits` [B, V] into one row of the result [G, V].

    The result shares no memory with `logits`. One row alone is copied bit for bit.
    """
    groups: dict[tuple[str, str, int, bool], list[int]] = defaultdict(list)
    for g, (rows, mixture) in enumerate(parts):
        base_named = mixture.base_row is not None and mixture.weights[0] > 0
        groups[mixture.merge, mixture.gate, len(rows), base_named].append(g)
    merged = torch.empty(len(parts), logits.shape[-1], device=logits.device)
    for (merge, gate, num_rows, base_named), members in groups.items():
        size = len(members)
        if logits.device.type == "cpu":
            size = max(1, _CPU_CHUNK // (num_rows * logits.shape[-1]))
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            rows = [row for g in chunk for row in parts[g][0]]
            taken = logits[_where(rows, logits.device)]
            if num_rows > 1:
                mixtures = [parts[g][1] for g in chunk]
                taken = _merge_group(taken, mixtures, merge, gate, base_named=base_named)
            merged[_where(chunk, merged.device)] = taken
    return merged


def _merge_group(
    logits: Tensor,
    mixtures: Sequence[ResolvedMixture],
    merge: str,
    gate: str,
    *,
    base_named: bool,
) -> Tensor:
    rows = Rows(
        logits.view(len(mixtures), -1, logits.shape[-1]),
        torch.tensor([mixture.weights for mixture in mixtures], device=logits.device),
        torch.tensor([mixture.cut for mixture in mixtures], device=logits.device),
        base_named=base_named,
    )
    rule = MERGE_RULES[merge]
    return rule.merge(rows, GATES[gate].weights(rows, anchored=rule.anchored))


def _draw(pick: Pick) -> float:
    assert pick.sampling.seed is not None
    return uniform(pick.sampling.seed, pick.choice, pick.position)


def _where(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """Return an index of the given rows: a slice, which copies nothing, if they are neighbours."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def _with_log_probs(token_id: int, log_probs: Tensor, num_top: int) -> Picked:
    top = top_tokens(log_probs, num_top) if num_top else ()
    return Picked(token_id, float(log_probs[token_id]), top)
