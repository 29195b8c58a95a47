"""What changes the merged logits before sampling: bans, penalties, bias.

Each function takes all requests of a step at once and *modifies* the logits. Only the tokens that
a request names or has seen are touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.sampling_params import SamplingParams

BAN = -100.0
"""A `logit_bias` that bans its token outright."""

_START_CAPACITY = 64


class Bias:
    """A request's `logit_bias`: `banned` ids, and `ids` [M] with what `values` [M] adds to them."""

    def __init__(self, sampling: SamplingParams) -> None:
        biases = sorted(sampling.logit_bias.items())
        self.banned = [token_id for token_id, bias in biases if bias <= BAN]
        added = [(token_id, bias) for token_id, bias in biases if bias > BAN]
        self.ids = np.array([token_id for token_id, _ in added], dtype=np.int64)
        self.values = np.array([bias for _, bias in added], dtype=np.float32)

    @property
    def is_used(self) -> bool:
        """Whether there is anything to ban or add."""
        return bool(self.banned) or len(self.ids) > 0


class Occurrences:
    """The tokens that one answer has seen, for its penalties.

    Prompt tokens count for the repetition penalty only. Memory is one entry a distinct token.
    """

    def __init__(self, prompt: Iterable[int], sampling: SamplingParams) -> None:
        self._decay = np.float32(sampling.penalty_decay)
        seen = sorted(set(prompt)) if sampling.repetition_penalty != 1.0 else []
        capacity = max(_START_CAPACITY, 2 * len(seen))
        self._entry = {token_id: i for i, token_id in enumerate(seen)}
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._ids[: len(seen)] = seen
        self._counts = np.zeros(capacity, dtype=np.float32)
        self._sampled = np.zeros(capacity, dtype=np.float32)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The distinct tokens [M]."""
        return self._ids[: len(self._entry)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each occurred in the answer [M], decayed by `penalty_decay` each step."""
        return self._counts[: len(self._entry)]

    @property
    def sampled(self) -> NDArray[np.float32]:
        """1 for the tokens that occurred in the answer [M], 0 for those of the prompt alone."""
        return self._sampled[: len(self._entry)]

    def push(self, token_id: int) -> None:
        """Count a sampled token, after decaying what was counted before."""
        self.counts[:] *= self._decay
        entry = self._entry.get(token_id)
        if entry is None:
            entry = self._append(token_id)
        self._counts[entry] += 1
        self._sampled[entry] = 1

    def _append(self, token_id: int) -> int:
        entry = len(self._entry)
        if entry == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._sampled = np.concatenate((self._sampled, np.zeros_like(self._sampled)))
        self._ids[entry] = token_id
        self._entry[token_id] = entry
        return entry


def ban(logits: Tensor, rows: Sequence[Sequence[int]], biases: Sequence[Bias]) -> None:
    """Set each request's banned ids to -inf in its rows of `logits` [B, V], *modified*."""
    vocab_size = logits.shape[-1]
    flat = [
        row * vocab_size + token_id
        for request_rows, bias in zip(rows, biases, strict=True)
        for row in (request_rows if bias.banned else ())
        for token_id in bias.banned
    ]
    if flat:
        index = torch.tensor(flat, dtype=torch.int64, device=logits.device)
        logits.view(-1).index_fill_(0, index, -torch.inf)


def apply_penalties(
    logits: Tensor, params: Sequence[SamplingParams], occurrences: Sequence[Occurrences | None]
) -> None:
    """Apply repetition, then presence and frequency penalties to `logits` [G, V], *modified*.

    `occurrences` has None for requests without penalties.
    """
    vocab_size = logits.shape[-1]
    index: list[NDArray[np.int64]] = []
    factors: list[NDArray[np.float32]] = []
    minus: list[NDArray[np.float32]] = []
    for g, (sampling, seen) in enumerate(zip(params, occurrences, strict=True)):
        if seen is None or not len(seen.ids):
            continue
        index.append(seen.ids + g * vocab_size)
        factors.append(np.full(len(seen.ids), sampling.repetition_penalty, dtype=np.float32))
        minus.append(
            np.float32(sampling.presence_penalty) * seen.sampled
            + np.float32(sampling.frequency_penalty) * seen.counts
        )
    if index:
        flat = logits.view(-1)
        at = _to_device(np.concatenate(index), logits)
        factor = _to_device(np.concatenate(factors), logits)
        values = flat[at]
        values = torch.where(values > 0, values / factor, values * factor)
        flat[at] = values - _to_device(np.concatenate(minus), logits)


def apply_bias(logits: Tensor, biases: Sequence[Bias]) -> None:
    """Add each request's bias to its row of `logits` [G, V], *modified*; -inf stays -inf."""
    vocab_size = logits.shape[-1]
    used = [(g, bias) for g, bias in enumerate(biases) if len(bias.ids)]
    if used:
        at = _to_device(np.concatenate([bias.ids + g * vocab_size for g, bias in used]), logits)
        values = _to_device(np.concatenate([bias.values for _, bias in used]), logits)
        flat = logits.view(-1)
        flat[at] = flat[at] + values


def _to_device(array: NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)
