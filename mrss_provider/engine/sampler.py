"""The sampler: merged and penalised logits [G, V] to one token id a request.

One uniform number u a token. The token is the lowest id whose cumulative probability, over the
kept tokens in the order of their ids and in fp64, is above u times their sum. So the draw does
not depend on how the kept set was found, and a vocabulary is sorted whole only for a request that
keeps nearly all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.sampling_params import SamplingParams

Array = NDArray[np.float64]
Ids = NDArray[np.int64]

# Candidates are tokens of at least this share of the likeliest one's probability; a row whose kept
# set is larger looks further down, and at last at everything.
_FIRST_REACH = 1e-3
_FURTHER = 1e-2
_LAST_REACH = 1e-7
_LEAST_PROB = torch.finfo(torch.float32).tiny
_ALL = np.iinfo(np.int64).max
# Below it a quotient of logits could leave fp32; any two different logits are then worlds apart.
_MIN_TEMPERATURE = 1e-30


def sample(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Pick one token id a row.

    Args:
        logits: [G, V] fp32, -inf where impossible, at least one finite in each row.
        params: one a row, with temperature and top_p set.
        draws: one a row, in [0, 1).
    """
    ids = [0] * len(params)
    kinds = [_kind(sampling) for sampling in params]
    for pick in dict.fromkeys(kinds):
        chosen = [g for g, kind in enumerate(kinds) if kind is pick]
        own = logits if len(chosen) == len(params) else logits[chosen]
        picked = pick(own, [params[g] for g in chosen], np.array([draws[g] for g in chosen]))
        for g, token_id in zip(chosen, picked, strict=True):
            ids[g] = token_id
    return ids


def top_tokens(log_probs: Tensor, num_top: int) -> tuple[tuple[int, float], ...]:
    """Return the (id, value) of the `num_top` largest of `log_probs` [V], best first.

    Among equals the lowest id is first. Tokens of -inf are left out.
    """
    num_top = min(num_top, log_probs.shape[0])
    # Everything that is not below the last of them, so that no equal is missed.
    least = log_probs.topk(num_top).values[-1]
    ids = (log_probs >= least).nonzero().squeeze(1)
    values, order = log_probs[ids].sort(descending=True, stable=True)
    best = zip(ids[order].tolist(), values.tolist(), strict=True)
    return tuple((i, value) for i, value in best if value > -torch.inf)[:num_top]


def rank_tokens(log_probs: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """Return values and ids [G, M] of the `num_top` largest of `log_probs` [G, V], best first.

    As `top_tokens`, for several rows and without asking the device; -inf is not left out.
    """
    values, ids = log_probs.sort(descending=True, stable=True)
    return values[:, :num_top], ids[:, :num_top]


Picker = Callable[[Tensor, Sequence[SamplingParams], Array], list[int]]


def _kind(sampling: SamplingParams) -> Picker:
    assert sampling.temperature is not None
    assert sampling.top_p is not None
    if sampling.temperature < _MIN_TEMPERATURE:
        return _pick_greedy
    if sampling.top_k or sampling.top_p < 1.0:
        return _draw_from_likeliest
    return _draw_from_all


def _pick_greedy(logits: Tensor, params: Sequence[SamplingParams], draws: Array) -> list[int]:
    # The first of equal maxima, as torch documents it.
    ids: list[int] = logits.argmax(-1).tolist()
    return ids


def _draw_from_all(logits: Tensor, params: Sequence[SamplingParams], draws: Array) -> list[int]:
    weights = (logits / _column([p.temperature for p in params], logits)).softmax(-1)
    if any(p.min_p > 0 for p in params):
        # probability >= min_p * largest probability, said of the logits.
        span = _column([_truncation_temperature(p) for p in params], logits)
        reach = _column([p.min_p for p in params], logits).log() * span
        weights = torch.where(logits >= logits.amax(-1, keepdim=True) + reach, weights, 0.0)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = torch.from_numpy(draws).to(logits.device).unsqueeze(1) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    ids: list[int] = chosen.clamp_max(logits.shape[-1] - 1).tolist()
    return ids


def _draw_from_likeliest(
    logits: Tensor, params: Sequence[SamplingParams], draws: Array
) -> list[int]:
    looked_at = _column([_truncation_temperature(p) for p in params], logits)
    probs = (logits / looked_at).softmax(-1)
    chosen = np.zeros(len(params), dtype=np.int64)
    waiting = np.arange(len(params))
    reach = _FIRST_REACH
    while len(waiting):
        own = [params[g] for g in waiting.tolist()]
        found = _likeliest(probs if len(own) == len(params) else probs[waiting], reach)
        num_kept = _count_kept(found, own)
        known = num_kept <= found.counts if reach > 0 else np.ones(len(own), dtype=np.bool_)
        ids = found.draw(num_kept, _powers(own), draws[waiting])
        chosen[waiting[known]] = ids[known]
        waiting = waiting[~known]
        reach = reach * _FURTHER if reach > _LAST_REACH else 0.0
    picked: list[int] = chosen.tolist()
    return picked


@dataclass(frozen=True)
class _Candidates:
    """The likeliest tokens of R rows: everything above a threshold, so no equal is missing.

    Attributes:
        probs: [R, M] in the order of ids, then zeros.
        ids: [R, M] ascending.
        counts: [R] how many of M are a row's.
        order: [R, M] positions, likeliest first, lowest id first among equals.
    """

    probs: Array
    ids: Ids
    counts: Ids
    order: Ids

    @property
    def ranked(self) -> Array:
        """The probabilities [R, M], descending."""
        return np.take_along_axis(self.probs, self.order, 1)

    def draw(self, num_kept: Ids, powers: Array | None, draws: Array) -> Ids:
        """Return an id a row: of the `num_kept` likeliest, weighted by probability ** power."""
        rank = np.empty_like(self.order)
        np.put_along_axis(rank, self.order, np.arange(self.order.shape[1])[None], 1)
        weights = np.where(rank < num_kept[:, None], self.probs, 0.0)
        if powers is not None:
            largest = weights.max(1, keepdims=True).clip(min=_LEAST_PROB)
            raised = (weights / largest) ** powers[:, None]
            # A neighbour's order of sampling must not touch the last bits of the others.
            weights = np.where(powers[:, None] == 1.0, weights, raised)
        cumulative = weights.cumsum(1)
        position = (cumulative <= (draws * cumulative[:, -1])[:, None]).sum(1)
        chosen: Ids = self.ids[np.arange(len(draws)), position.clip(max=self.ids.shape[1] - 1)]
        return chosen


def _likeliest(probs: Tensor, reach: float) -> _Candidates:
    """Find what has at least `reach` times the largest of its row of `probs` [R, V]."""
    least = (probs.amax(-1, keepdim=True) * reach).clamp_min(_LEAST_PROB)
    if probs.device.type == "cpu":
        # torch's nonzero takes four times as long.
        rows, ids = np.divmod(np.flatnonzero(probs.numpy() >= least.numpy()), probs.shape[1])
        values = probs.numpy()[rows, ids]
    else:
        at = (probs >= least).nonzero(as_tuple=True)
        values = probs[at].cpu().numpy()
        rows, ids = (index.cpu().numpy() for index in at)
    counts = np.bincount(rows, minlength=len(probs))
    column = np.arange(len(rows)) - (counts.cumsum() - counts)[rows]
    padded = np.zeros((len(probs), max(1, counts.max())))
    padded_ids = np.zeros(padded.shape, dtype=np.int64)
    padded[rows, column], padded_ids[rows, column] = values, ids
    return _Candidates(padded, padded_ids, counts, (-padded).argsort(1, kind="stable"))


def _count_kept(found: _Candidates, params: Sequence[SamplingParams]) -> Ids:
    """Count what top-k, top-p and min-p keep of the likeliest tokens [R].

    In OpenAI's order top-p looks at what top-k left, in RWKV's at everything. A count above
    the row's says that more candidates are needed.
    """
    ranked = found.ranked
    num_values = ranked.shape[1]
    cumulative = ranked.cumsum(1)
    top_k = np.array([p.top_k or _ALL for p in params])
    of_top_k = cumulative[np.arange(len(params)), top_k.clip(max=num_values) - 1]
    limited = np.array([bool(p.top_k) and not _is_rwkv(p) for p in params])
    top_p = np.array([p.top_p for p in params], dtype=np.float64)
    target = top_p * np.where(limited, of_top_k, 1.0)
    nucleus = (cumulative < target[:, None]).sum(1) + 1
    kept = np.minimum(top_k, np.where(top_p < 1.0, nucleus, _ALL))
    min_p = np.array([p.min_p for p in params])
    if min_p.any():
        likely = (ranked >= min_p[:, None] * ranked[:, :1]).sum(1)
        kept = np.minimum(kept, np.where(likely < found.counts, likely, _ALL))
    counts: Ids = kept
    return counts


def _powers(params: Sequence[SamplingParams]) -> Array | None:
    """Return what RWKV's order raises the kept probabilities to; None if all are 1."""
    if not any(_is_rwkv(p) for p in params):
        return None
    return np.array([1 / (p.temperature or 1.0) if _is_rwkv(p) else 1.0 for p in params])


def _truncation_temperature(sampling: SamplingParams) -> float:
    """Return the temperature of the distribution that truncation looks at."""
    return 1.0 if _is_rwkv(sampling) else sampling.temperature or 1.0


def _is_rwkv(sampling: SamplingParams) -> bool:
    return sampling.sampling_order == "rwkv"


def _column(values: Sequence[float | None], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
