"""What the rows of a mixture say of a text, token by token: all that a gate learns from.

One pass of the frozen model and states over every text keeps, of each token that counts, the
features of the rows and the log-probability of what came: 24 bytes a row, never a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mrss_provider.engine.gating_layer import row_features
from mrss_provider.engine.merges import LOG_PROB_FLOOR, Rows
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.errors import InvalidRequestError
from mrss_provider.model import Model, StatePool, TunedState
from mrss_provider.tune.examples import Example

DOCUMENTS_A_PASS = 8

# Logits of one piece: 32 MB in fp32, and half a dozen tensors of that size beside it.
_NUMBERS_A_PIECE = 1 << 23

OnDocuments = Callable[[int, int], None]
"""Called with the number of documents that were read, and of all."""


@dataclass(frozen=True)
class GateData:
    """T tokens as the K rows that have a weight see them.

    Attributes:
        prior: [K] fp32, the named weights, which sum to 1.
        features: [T, K, 5] fp32, see `engine.gating_layer`.
        log_probs: [T, K] fp32, of the token that came, at least -30.
        document: [T] int64, which text it is of, from 0, growing.
    """

    prior: Tensor
    features: Tensor
    log_probs: Tensor
    document: Tensor

    @property
    def num_documents(self) -> int:
        """Texts that have a token that counts."""
        return len(torch.unique(self.document))

    def part(self, documents: Sequence[int]) -> GateData:
        """Return the tokens of some documents, which keep their numbers."""
        chosen = torch.isin(self.document, torch.tensor(documents))
        return GateData(
            self.prior, self.features[chosen], self.log_probs[chosen], self.document[chosen]
        )


def check_rows(mixture: ResolvedMixture) -> None:
    """Refuse a mixture that no gate can be trained for.

    Raises:
        InvalidRequestError: fewer than two rows with a weight, or no base to compare them with.
    """
    if mixture.base_row != 0 or sum(weight > 0 for weight in mixture.weights) < 2:
        raise InvalidRequestError(
            f"a gate weighs two states or more, with the base beside them, got "
            f"{mixture.canonical!r}"
        )


def collect(
    model: Model,
    mixture: ResolvedMixture,
    examples: Sequence[Example],
    *,
    banned_ids: Sequence[int] = (),
    max_len: int = 512,
    on_documents: OnDocuments | None = None,
) -> GateData:
    """Read every example with every row of `mixture` and keep what a gate may learn from.

    Args:
        model: the frozen model.
        mixture: its rows, the base first, and their weights, which sum to 1.
        examples: texts; the tokens flagged `answer` count, but for the first of a text, which
            nothing precedes.
        banned_ids: ids that are never sampled, and so have no probability.
        max_len: tokens of a text that are predicted, at most.
        on_documents: told of progress.

    Raises:
        InvalidRequestError: as `check_rows`, or no token that counts.
    """
    check_rows(mixture)
    reader = _Reader(model, mixture, torch.tensor(banned_ids, dtype=torch.int64))
    features, log_probs, document = [], [], []
    for start in range(0, len(examples), DOCUMENTS_A_PASS):
        taken = [example.cut(max_len) for example in examples[start : start + DOCUMENTS_A_PASS]]
        for seen, said in reader.read(taken):
            features.append(seen)
            log_probs.append(said)
        document += [start + i for i, example in enumerate(taken) for _ in _counted(example)]
        if on_documents is not None:
            on_documents(start + len(taken), len(examples))
    if not document:
        raise InvalidRequestError("no text has a token to learn from; give answers, or longer ones")
    named = torch.tensor(mixture.weights)
    return GateData(
        named[named > 0], torch.cat(features), torch.cat(log_probs), torch.tensor(document)
    )


class _Reader:
    """The rows of one mixture, ready to read texts."""

    def __init__(self, model: Model, mixture: ResolvedMixture, banned_ids: Tensor) -> None:
        self.model = model
        self.states = mixture.states
        self.named = torch.tensor(mixture.weights, device=model.device)
        self.banned_ids = banned_ids.to(model.device)
        self.pool = model.new_pool(DOCUMENTS_A_PASS * len(mixture.states))

    def read(self, examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features [M, K, 5] and log-probabilities [M, K], on the CPU, piece by piece."""
        examples = [example for example in examples if len(example.token_ids) > 1]
        if not examples:
            return
        num_rows = len(self.states)
        slots = self._start(examples)
        read = [ids for e in examples for ids in [e.token_ids[:-1]] * num_rows]
        offsets = [0]
        for ids in read:
            offsets.append(offsets[-1] + len(ids))
        tokens = torch.tensor([token for ids in read for token in ids], device=self.model.device)
        hidden = self.model.prefill(tokens, offsets, slots, self.pool, all_positions=True)
        where, following = [], []
        for i, example in enumerate(examples):
            starts = offsets[i * num_rows : (i + 1) * num_rows]
            where += [[start + at - 1 for start in starts] for at in _counted(example)]
            following += [example.token_ids[at] for at in _counted(example)]
        size = max(1, _NUMBERS_A_PIECE // (num_rows * self.model.config.vocab_size))
        for start in range(0, len(where), size):
            piece = torch.tensor(where[start : start + size], device=hidden.device)
            wanted = torch.tensor(following[start : start + size], device=hidden.device)
            yield self._features(hidden[piece.flatten()], wanted)

    def _start(self, examples: Sequence[Example]) -> Tensor:
        """Put every row of every example at its state, and return their slots."""
        slots = torch.arange(len(examples) * len(self.states), device=self.model.device)
        for i, example in enumerate(examples):
            for k, state in enumerate(self.states):
                slot = i * len(self.states) + k
                self.pool.write(slot, state)
                if state is not None and _reads_bos_first(state, example):
                    self._read_bos(slots[slot : slot + 1], self.pool)
        return slots

    def _read_bos(self, slot: Tensor, pool: StatePool) -> None:
        self.model.decode(torch.zeros_like(slot), slot, pool)

    def _features(self, hidden: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the rows say in `hidden` [M * rows, C] of the tokens `following` [M]."""
        num = len(following)
        logits = self.model.head(hidden).index_fill(1, self.banned_ids, -torch.inf)
        rows = Rows(
            logits.view(num, len(self.states), -1),
            self.named.expand(num, -1),
            logits.new_zeros(num),
            base_named=bool(self.named[0] > 0),
        )
        heard = self.named > 0
        log_probs = rows.log_probs.gather(-1, following[:, None, None].expand(num, len(heard), 1))
        floored = log_probs[:, heard, 0].clamp_min(LOG_PROB_FLOOR)
        return row_features(rows)[:, heard].cpu(), floored.cpu()


def _counted(example: Example) -> list[int]:
    """Return the positions of the tokens that count: answers that something precedes."""
    return [at for at, flag in enumerate(example.answer) if flag and at > 0]


def _reads_bos_first(state: TunedState, example: Example) -> bool:
    return state.metadata.bos and example.token_ids[0] != 0
