"""The sampler: merged and penalised logits [G, V] to one token id a request.

One uniform number u a token. The token is the lowest id whose cumulative probability, over the
kept tokens in the order of their ids and in fp64, is above u times their sum. So the draw does
not depend on how the kept set was found, and a vocabulary is sorted whole only for a request that
keeps nearly all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mrss_provider.sampling_params import SamplingParams

# A nucleus rarely has more tokens, and finding 256 of 65,536 takes 96 us where 20 take 70.
_FIRST_CANDIDATES = 256
_MORE_CANDIDATES = 8
# Below it a quotient of logits could leave fp32; any two different logits are then worlds apart.
_MIN_TEMPERATURE = 1e-30


def sample(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> Tensor:
    """Pick one token id a row: [G] int64.

    Args:
        logits: [G, V] fp32, -inf where impossible, at least one finite in each row.
        params: one a row, with temperature and top_p set.
        draws: one a row, in [0, 1).
    """
    kinds = [_kind(sampling) for sampling in params]
    ids = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for pick in (_pick_greedy, _draw_from_all, _draw_from_likeliest):
        chosen = [g for g, kind in enumerate(kinds) if kind is pick]
        if len(chosen) == len(params):
            return pick(logits, params, draws)
        if chosen:
            index = torch.tensor(chosen, device=logits.device)
            ids[index] = pick(
                logits[index], [params[g] for g in chosen], [draws[g] for g in chosen]
            )
    return ids


def top_tokens(log_probs: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """Return the `num_top` largest of `log_probs` [G, V]: values and ids [G, num_top].

    Best first; among equals the lowest id is first.
    """
    values, ids, _ = _largest(
        log_probs,
        lambda values: torch.full_like(values[:, 0], num_top, dtype=torch.int64),
        nothing=-torch.inf,
        size=num_top + 1,
    )
    return values[:, :num_top], ids[:, :num_top]


Picker = Callable[[Tensor, Sequence[SamplingParams], Sequence[float]], Tensor]


def _kind(sampling: SamplingParams) -> Picker:
    assert sampling.temperature is not None
    assert sampling.top_p is not None
    if sampling.temperature < _MIN_TEMPERATURE:
        return _pick_greedy
    if sampling.top_k or sampling.top_p < 1.0:
        return _draw_from_likeliest
    return _draw_from_all


def _pick_greedy(
    logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]
) -> Tensor:
    # The first of equal maxima, as torch documents it.
    return logits.argmax(-1)


def _draw_from_all(
    logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]
) -> Tensor:
    temperature = _column([p.temperature for p in params], logits)
    weights = (logits / temperature).softmax(-1)
    if any(p.min_p > 0 for p in params):
        # probability >= min_p * largest probability, said of the logits.
        span = _column([1.0 if _is_rwkv(p) else p.temperature for p in params], logits)
        reach = _column([p.min_p for p in params], logits).log() * span
        weights = torch.where(logits >= logits.amax(-1, keepdim=True) + reach, weights, 0.0)
    return _invert(weights.double(), draws)


def _draw_from_likeliest(
    logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]
) -> Tensor:
    temperature = _column([p.temperature for p in params], logits)
    looked_at = _column([1.0 if _is_rwkv(p) else p.temperature for p in params], logits)
    probs = (logits / looked_at).softmax(-1)
    size = max(_FIRST_CANDIDATES, *(p.top_k + 1 for p in params))
    _, ids, num_kept = _largest(
        probs, lambda values: _count_kept(values, params), nothing=0.0, size=size
    )
    kept = torch.arange(ids.shape[1], device=ids.device) < num_kept
    ids, order = ids.sort()
    logits = logits.gather(1, ids)
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    chosen = _invert(weights.double() * kept.gather(1, order), draws)
    return ids.gather(1, chosen.unsqueeze(1)).squeeze(1)


def _count_kept(values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Count what top-k, top-p and min-p keep of the largest probabilities [G, M], descending.

    In OpenAI's order top-p looks at what top-k left, in RWKV's at everything. A count above M
    says that more probabilities are needed.
    """
    num_values = values.shape[1]
    top_k = _column([p.top_k or num_values + 1 for p in params], values, torch.int64)
    cumulative = values.cumsum(-1, dtype=torch.float64)
    of_top_k = cumulative.gather(1, top_k.clamp_max(num_values) - 1)
    limited = _column([bool(p.top_k) and not _is_rwkv(p) for p in params], values, torch.bool)
    top_p = _column([p.top_p for p in params], values, torch.float64)
    target = torch.where(limited, of_top_k, 1.0) * top_p
    nucleus = (cumulative < target).sum(-1, keepdim=True) + 1
    nucleus = torch.where(top_p < 1.0, nucleus, num_values + 1)
    min_p = _column([p.min_p for p in params], values)
    likely = (values >= min_p * values[:, :1]).sum(-1, keepdim=True)
    likely = torch.where(likely < num_values, likely, num_values + 1)
    return torch.minimum(torch.minimum(top_k, nucleus), likely).squeeze(1)


def _largest(
    scores: Tensor, count: Callable[[Tensor], Tensor], *, nothing: float, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the largest scores of each row, as many as `count` asks for, without a full sort.

    Args:
        scores: [G, V].
        count: how many of the given largest scores [G, M] are kept [G]; above M means more.
        nothing: a score that is never kept (an impossible token).
        size: how many to look at first.

    Returns:
        scores [G, M] descending, lowest id first among equals; their ids; the kept count [G, 1].
    """
    while True:
        size = min(size, scores.shape[-1])
        if size == scores.shape[-1]:
            values, ids = scores.sort(descending=True, stable=True)
        else:
            values, ids = scores.topk(size)
            ids, order = ids.sort()
            values, order = values.gather(1, order).sort(descending=True, stable=True)
            ids = ids.gather(1, order)
        possible = (values > nothing).sum(-1)
        kept = torch.minimum(count(values), possible).clamp_min(1).unsqueeze(1)
        # The set is known only if what equals the last kept score is in sight.
        if size == scores.shape[-1] or bool((values.gather(1, kept - 1) > values[:, -1:]).all()):
            return values, ids, kept
        size *= _MORE_CANDIDATES


def _invert(weights: Tensor, draws: Sequence[float]) -> Tensor:
    """Return the first position whose cumulative weight is above its draw's share: [G]."""
    cumulative = weights.cumsum(-1)
    target = _column(draws, weights) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True)
    return chosen.clamp_max(weights.shape[1] - 1).squeeze(1)


def _is_rwkv(sampling: SamplingParams) -> bool:
    return sampling.sampling_order == "rwkv"


def _column(
    values: Sequence[float | None], like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device).unsqueeze(1)
