"""PromptReader: what is wanted of a prompt while it is read, from the hidden states of its tokens.

Three things: how likely each row finds what the user wrote, for gates that read it (evidence); how
likely the merge finds each token (scores); and the hidden states as one vector (pooling). All come
from the pass that reads the prompt anyway, many tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mrss_provider.engine.gates import Heard, gate_of, named_weights
from mrss_provider.engine.request import (
    MAX_EVIDENCE,
    EngineRequest,
    PromptReading,
    ResolvedMixture,
    TokenScore,
)
from mrss_provider.engine.sampler import top_tokens
from mrss_provider.engine.tail import merge_rows
from mrss_provider.engine.token_scorer import TokenScorer, max_logits

if TYPE_CHECKING:
    from mrss_provider.engine.batch import Chunk
    from mrss_provider.model import Model


@dataclass(eq=False)
class PromptNotes:
    """What has been learned of a running request's prompt so far.

    Attributes:
        scores: of its tokens from the second on.
        heard: log-probabilities [T, K] that each row gave to them, for a gate that reads answers.
        total: the sum [C] fp64 of the hidden states, if their mean is wanted.
        vector: float32 [D] of length 1, once the prompt has been read, if it is wanted.
        is_finite: whether all numbers were.
    """

    scores: list[TokenScore] = field(default_factory=list)
    heard: list[NDArray[np.float32]] = field(default_factory=list)
    total: Tensor | None = None
    vector: NDArray[np.float32] | None = None
    is_finite: bool = True

    def reading(self) -> PromptReading:
        """Return what the request gets to know."""
        return PromptReading(tuple(self.scores), self.vector)


class PromptReader:
    """Reads what is wanted from the hidden states of prompts, and notes it on their `Running`."""

    def __init__(self, model: Model, banned_ids: Tensor) -> None:
        """Read with `model`; `banned_ids` is int64 [M] on its device."""
        self._model = model
        self._banned_ids = banned_ids
        self._scorer = TokenScorer(model, banned_ids)
        self._max_logits = max_logits(model)

    def wanted(self, chunk: Chunk) -> Sequence[int] | None:
        """Return the offsets in a chunk after which hidden states are wanted, besides the last one.

        None if nothing is wanted of the chunk.
        """
        request = chunk.running.request
        pooling = request.pooling
        if request.score_prompt is not None or (pooling is not None and pooling.is_mean):
            return range(chunk.length - 1)
        if pooling is not None:
            return () if chunk.is_last else None
        return self._evident(chunk) or None

    def note(self, chunk: Chunk, offsets: Sequence[int], hidden: Tensor) -> None:
        """Take in a chunk that was read; waits for the device.

        Args:
            chunk: what was read.
            offsets: what `wanted` returned.
            hidden: [K, n + 1, C], after these offsets and after the last token.
        """
        request = chunk.running.request
        if request.pooling is not None:
            self._pool(chunk, hidden[0])
            return
        is_whole = request.score_prompt is not None
        evident = self._evident(chunk)
        if evident:
            tokens = [request.prompt[chunk.start + offset + 1] for offset in evident]
            places = evident if is_whole else range(len(evident))
            own = hidden[:, list(places)]
            chunk.running.evidence.append(self._scorer.log_probs(own, tokens))
        if is_whole:
            self._score(chunk, hidden[:, :-1] if chunk.is_last else hidden)

    def _evident(self, chunk: Chunk) -> list[int]:
        """Return the offsets whose next token is evidence."""
        prompt = chunk.running.request.prompt
        return [
            position - chunk.start
            for position in chunk.before_evidence()
            if prompt[position + 1] not in self._scorer.banned
        ]

    def _pool(self, chunk: Chunk, hidden: Tensor) -> None:
        """Add hidden states [n, C] to the vector; the last of them is the chunk's last token's."""
        notes, request = chunk.running.notes, chunk.running.request
        pooling = request.pooling
        assert pooling is not None
        pooled = hidden[-1].double()
        if pooling.is_mean:
            total = hidden.sum(0, dtype=torch.float64)
            notes.total = total if notes.total is None else notes.total + total
            # Of length 1 in the end, so the sum will do.
            pooled = notes.total
        if chunk.is_last:
            kept = pooled[: pooling.num_dimensions or len(pooled)]
            vector = F.normalize(kept, dim=0)
            notes.is_finite = bool(vector.isfinite().all())
            notes.vector = vector.float().cpu().numpy()

    def _score(self, chunk: Chunk, hidden: Tensor) -> None:
        """Score the tokens that come after hidden states [K, n, C] of a chunk's first n tokens."""
        num_rows, num_tokens, _ = hidden.shape
        piece_len = max(1, self._max_logits // (num_rows * self._model.config.vocab_size))
        for first in range(0, num_tokens, piece_len):
            piece = hidden[:, first : first + piece_len].transpose(0, 1)
            logits = self._model.head(piece.reshape(-1, piece.shape[-1]))
            logits.index_fill_(1, self._banned_ids, -torch.inf)
            self._score_piece(chunk, chunk.start + first, logits)

    def _score_piece(self, chunk: Chunk, start: int, logits: Tensor) -> None:
        """Score the tokens of a prompt from `start` + 1 on by logits [n * K, V], token by token."""
        notes, request = chunk.running.notes, chunk.running.request
        num_rows = request.mixture.rows
        count = len(logits) // num_rows
        token_ids = request.prompt[start + 1 : start + 1 + count]
        targets = torch.tensor(token_ids, device=logits.device)
        if gate_of(request.mixture).reads_answer:
            notes.heard += _row_log_probs(logits, targets, num_rows)
        mixtures = mixtures_at(request, range(start, start + count), notes.heard)
        parts = [
            (range(i * num_rows, (i + 1) * num_rows), mixture) for i, mixture in enumerate(mixtures)
        ]
        log_probs = merge_rows(logits, parts).log_softmax(-1)
        chosen: list[float] = log_probs.gather(1, targets[:, None])[:, 0].tolist()
        tops = likeliest(log_probs, request.score_prompt or 0)
        notes.is_finite &= not any(np.isnan(chosen))
        notes.scores += map(TokenScore, token_ids, chosen, tops)


def mixtures_at(
    request: EngineRequest, positions: range, heard: Sequence[NDArray[np.float32]]
) -> list[ResolvedMixture]:
    """Return the mixtures by whose merge the prompt's tokens after `positions` are scored.

    A prompt is scored as an answer that is given: its second token is the answer's first, nothing
    was said by a user before, and the weights are those of the answer's moment.

    Args:
        request: whose prompt it is.
        positions: of the tokens before, so that 0 is where the answer begins.
        heard: what each row gave to the tokens from the second on, for a gate that reads answers.
    """
    gate = gate_of(request.mixture)
    if gate.moves_prior or gate.reads_answer:
        return [_mixture_at(request, position, heard) for position in positions]
    return [_mixture_at(request, 0, heard)] * len(positions)


def _mixture_at(
    request: EngineRequest, position: int, heard: Sequence[NDArray[np.float32]]
) -> ResolvedMixture:
    mixture = request.mixture
    before = heard[max(0, position - MAX_EVIDENCE) : position]
    log_probs = np.stack(before) if before else np.zeros((0, mixture.rows), np.float32)
    weights = named_weights(mixture, Heard(position, request.turn, log_probs))
    return mixture if weights == mixture.weights else replace(mixture, weights=weights)


def likeliest(log_probs: Tensor, num_top: int) -> list[tuple[tuple[int, float], ...]]:
    """Return what `top_tokens` returns, of each row of `log_probs` [n, V]."""
    if not num_top:
        return [()] * len(log_probs)
    num_top = min(num_top, log_probs.shape[1])
    values, ids = log_probs.topk(num_top)
    # Where equals stand at the edge it is chance which of them `topk` takes.
    reached = (log_probs >= values[:, -1:]).sum(1).tolist()
    found: list[tuple[tuple[int, float], ...]] = []
    for row, num, own, best in zip(log_probs, reached, ids.tolist(), values.tolist(), strict=True):
        ranked = sorted(zip(own, best, strict=True), key=lambda pair: (-pair[1], pair[0]))
        is_exact = num == num_top and best[-1] > -torch.inf
        found.append(tuple(ranked) if is_exact else top_tokens(row, num_top))
    return found


def _row_log_probs(logits: Tensor, targets: Tensor, num_rows: int) -> list[NDArray[np.float32]]:
    """Return what each of K rows gives the n `targets`, by logits [n * K, V]: n arrays [K]."""
    chosen = logits.gather(1, targets.repeat_interleave(num_rows)[:, None])[:, 0]
    return list((chosen - logits.logsumexp(-1)).view(-1, num_rows).cpu().numpy())
