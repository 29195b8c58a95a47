"""The sampler: merged and penalised logits [G, V] to one token id a request.

One uniform number u a token. The token is the lowest id whose cumulative probability, over the
kept tokens in the order of their ids and in fp64, is above u times their sum. So the draw does
not depend on how the kept set was found, and a vocabulary is sorted whole only for a request that
keeps nearly all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.sampling_params import SamplingParams

Array = NDArray[np.float64]
Ids = NDArray[np.int64]

# A nucleus rarely has more tokens, and finding 256 of 65,536 takes 96 us where 20 take 70.
_FIRST_CANDIDATES = 256
_MORE_CANDIDATES = 8
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
    size = num_top + 1
    values, ids = _largest(log_probs.unsqueeze(0), size)
    while not _in_sight(values, np.array([num_top]), -np.inf, log_probs.shape[0])[0]:
        size *= _MORE_CANDIDATES
        values, ids = _largest(log_probs.unsqueeze(0), size)
    order = np.lexsort((ids[0], -values[0]))[:num_top]
    best = zip(ids[0, order].tolist(), values[0, order].tolist(), strict=True)
    return tuple((i, value) for i, value in best if value > -np.inf)


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
    vocab_size = logits.shape[-1]
    chosen = np.zeros(len(params), dtype=np.int64)
    waiting = np.arange(len(params))
    size = max(_FIRST_CANDIDATES, *(p.top_k + 1 for p in params))
    while len(waiting):
        values, ids = _largest(probs if len(waiting) == len(params) else probs[waiting], size)
        num_kept = _count_kept(values, [params[g] for g in waiting.tolist()])
        known = _in_sight(values, num_kept, 0.0, vocab_size)
        done = waiting[known]
        weights = _keep(
            values[known], ids[known], num_kept[known], [params[g] for g in done.tolist()]
        )
        chosen[done] = _invert(*weights, draws[done])
        waiting = waiting[~known]
        size *= _MORE_CANDIDATES
    picked: list[int] = chosen.tolist()
    return picked


def _largest(scores: Tensor, size: int) -> tuple[Array, Ids]:
    """Return the `size` largest of each row of `scores` [R, V], descending, and their ids.

    Which of equal scores at the end are among them is left open (`_in_sight`).
    """
    if scores.device.type == "cpu":
        # Of 65,536 numpy partitions 256 off in 91 us, torch's topk in 183.
        every = scores.numpy()
        start = max(0, every.shape[1] - size)
        part = every.argpartition(start, axis=1)[:, start:] if start else None
        some = every if part is None else np.take_along_axis(every, part, 1)
        order = (-some).argsort(1)
        ids = order if part is None else np.take_along_axis(part, order, 1)
        values = np.take_along_axis(some, order, 1)
        return values.astype(np.float64), ids
    top = scores.topk(min(size, scores.shape[-1]))
    return top.values.double().cpu().numpy(), top.indices.cpu().numpy()


def _in_sight(
    values: Array, num_kept: NDArray[np.intp], nothing: float, vocab_size: int
) -> NDArray[np.bool_]:
    """Say for which rows the `num_kept` largest, and what equals the least of them, are known.

    Args:
        values: [R, M] the largest scores, descending.
        num_kept: [R] how many of them are kept, >= 1; above M if M are too few.
        nothing: the score of what is never kept.
        vocab_size: V; if M is V, everything is known.
    """
    num_values = values.shape[1]
    if num_values == vocab_size:
        return np.ones(len(values), dtype=np.bool_)
    edge = values[np.arange(len(values)), num_kept.clip(max=num_values) - 1]
    known: NDArray[np.bool_] = (edge > values[:, -1]) | (values[:, -1] == nothing)
    return known


def _count_kept(values: Array, params: Sequence[SamplingParams]) -> NDArray[np.intp]:
    """Count what top-k, top-p and min-p keep of the largest probabilities [R, M], descending.

    In OpenAI's order top-p looks at what top-k left, in RWKV's at everything. A count above M
    says that more probabilities are needed.
    """
    num_values = values.shape[1]
    cumulative = values.cumsum(1)
    top_k = np.array([p.top_k or num_values + 1 for p in params])
    of_top_k = cumulative[np.arange(len(params)), top_k.clip(max=num_values) - 1]
    limited = np.array([bool(p.top_k) and not _is_rwkv(p) for p in params])
    top_p = np.array([p.top_p for p in params], dtype=np.float64)
    target = top_p * np.where(limited, of_top_k, 1.0)
    nucleus = (cumulative < target[:, None]).sum(1) + 1
    min_p = np.array([p.min_p for p in params])
    likely = (values >= min_p[:, None] * values[:, :1]).sum(1)
    counts: NDArray[np.intp] = np.minimum(
        np.minimum(top_k, np.where(top_p < 1.0, nucleus, num_values + 1)),
        np.where(likely < num_values, likely, num_values + 1),
    )
    return counts


def _keep(
    values: Array, ids: Ids, num_kept: NDArray[np.intp], params: Sequence[SamplingParams]
) -> tuple[Array, Ids]:
    """Return weights [R, M] of the kept tokens, 0 for the others, and ids, in the order of ids.

    Args:
        values: [R, M] the largest probabilities that truncation looked at, descending.
        ids: [R, M] their tokens.
        num_kept: [R] how many are kept; among equals the lowest ids.
        params: R of them.
    """
    possible = (values > 0).sum(1)
    num_kept = np.minimum(num_kept, possible).clip(min=1)
    edge = values[np.arange(len(values)), num_kept - 1][:, None]
    power = np.array([1 / (p.temperature or 1.0) if _is_rwkv(p) else 1.0 for p in params])
    weights = (values / values[:, :1]) ** power[:, None]
    order = ids.argsort(1)
    values, ids, weights = (np.take_along_axis(a, order, 1) for a in (values, ids, weights))
    above, equal = values > edge, values == edge
    kept = above | (equal & (equal.cumsum(1) <= (num_kept - above.sum(1))[:, None]))
    return np.where(kept, weights, 0.0), ids


def _invert(weights: Array, ids: Ids, draws: Array) -> Ids:
    """Return the first id of each row whose cumulative weight is above its draw's share [R]."""
    cumulative = weights.cumsum(1)
    position = (cumulative <= (draws * cumulative[:, -1])[:, None]).sum(1)
    chosen: Ids = ids[np.arange(len(ids)), position.clip(max=ids.shape[1] - 1)]
    return chosen


def _truncation_temperature(sampling: SamplingParams) -> float:
    """Return the temperature of the distribution that truncation looks at."""
    return 1.0 if _is_rwkv(sampling) else sampling.temperature or 1.0


def _is_rwkv(sampling: SamplingParams) -> bool:
    return sampling.sampling_order == "rwkv"


def _column(values: Sequence[float | None], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
