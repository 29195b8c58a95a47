"""TokenScorer: how likely the model finds tokens that came, in pieces of bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    from mrss_provider.model import Model

# Numbers of logits that are held at once: 32 MB, and on CUDA 128 MB; their sum needs as much again.
_CPU_LOGITS = 1 << 23
_CUDA_LOGITS = 1 << 25


def max_logits(model: Model) -> int:
    """Return how many numbers of logits may be held at once."""
    return _CPU_LOGITS if model.device.type == "cpu" else _CUDA_LOGITS


class TokenScorer:
    """Log-probabilities of given tokens, over those that may occur.

    Attributes:
        banned: ids that no request may get; they have no log-probability.
    """

    def __init__(self, model: Model, banned_ids: Tensor) -> None:
        """Score with `model`; `banned_ids` is int64 [M] on its device."""
        self._model = model
        self._banned_ids = banned_ids
        self.banned = frozenset(banned_ids.tolist())
        self._piece_len = max(1, max_logits(model) // model.config.vocab_size)

    def log_probs(self, hidden: Tensor, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Score the tokens that come after hidden states; waits for the device.

        Args:
            hidden: [K, T, C], of K rows that read the same T tokens.
            token_ids: the T next tokens, none of them banned.

        Returns:
            Log-probabilities [T, K] fp32, natural.
        """
        num_rows, num_tokens, _ = hidden.shape
        targets = torch.tensor(token_ids, device=hidden.device).repeat(num_rows)
        flat = hidden.reshape(num_rows * num_tokens, -1)
        pieces = [
            slice(first, first + self._piece_len) for first in range(0, len(flat), self._piece_len)
        ]
        scores = [self._score(flat[piece], targets[piece]) for piece in pieces]
        return torch.cat(scores).view(num_rows, num_tokens).t().contiguous().cpu().numpy()

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._model.head(hidden).index_fill_(1, self._banned_ids, -torch.inf)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
