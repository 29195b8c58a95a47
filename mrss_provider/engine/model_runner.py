"""ModelRunner: a batch of the scheduler becomes calls of the model, and rows of logits.

Owns the state pool. All rows of a mixture read the same tokens, so a prompt's chunk is one
sequence a row, all of the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrss_provider.engine.request import EOS_ID
from mrss_provider.engine.scheduler import Batch, Choice, Chunk

if TYPE_CHECKING:
    from mrss_provider.model import Model


# Tokens of one call of the model, over all sequences: what bounds a step's temporary memory (on a
# CPU about 0.3 MB a token at 768 channels). More of them do not make a CPU's products any faster.
_CPU_PREFILL_LEN = 512
_CUDA_PREFILL_LEN = 16_384


class ModelRunner:
    """Runs batches on `num_slots` recurrent states."""

    def __init__(self, model: Model, num_slots: int) -> None:
        self._model = model
        self._pool = model.new_pool(num_slots)
        is_cpu = model.device.type == "cpu"
        self._max_prefill_len = _CPU_PREFILL_LEN if is_cpu else _CUDA_PREFILL_LEN

    def forward(self, batch: Batch) -> tuple[Tensor, list[range | list[int]]]:
        """Run one step; the states of all its rows move on by what they read.

        Returns:
            Logits [B, V] fp32, and for each answer of `batch.sampling` which rows are its own, in
            the order of its mixture's states. Answers that share a prompt share rows here.
        """
        self._begin([chunk for chunk in batch.chunks if chunk.is_first])
        hidden: list[Tensor] = []
        rows: list[range | list[int]] = []
        if batch.decoding:
            hidden.append(self._decode(batch.decoding, rows))
        if batch.chunks:
            hidden.append(self._read(batch.chunks, rows, len(hidden[0]) if hidden else 0))
        if not rows:
            return torch.empty(0, self._model.config.vocab_size), rows
        return self._model.head(torch.cat(hidden)), rows

    def _begin(self, chunks: Sequence[Chunk]) -> None:
        """Write the initial states; rows of states tuned with a leading token 0 read it."""
        bos_slots: list[int] = []
        for chunk in chunks:
            request = chunk.running.request
            begins = request.prompt[0] == EOS_ID
            slots = chunk.running.choices[0].slots
            for slot, state in zip(slots, request.mixture.states, strict=True):
                self._pool.write(slot, state)
                if state is not None and state.metadata.bos and not begins:
                    bos_slots.append(slot)
        if bos_slots:
            bos_slots.sort()
            ids = [EOS_ID] * len(bos_slots)
            self._model.decode(self._tensor(ids), self._tensor(bos_slots), self._pool)

    def _decode(self, choices: Sequence[Choice], rows: list[range | list[int]]) -> Tensor:
        """Feed each answer's last token to its rows; append each answer's rows to `rows`."""
        # In the order of slots, so that neighbours in the pool are neighbours in the batch.
        fed = sorted((slot, choice.last_token) for choice in choices for slot in choice.slots)
        row_of = {slot: row for row, (slot, _) in enumerate(fed)}
        rows += [[row_of[slot] for slot in choice.slots] for choice in choices]
        slots, ids = zip(*fed, strict=True)
        return self._model.decode(self._tensor(ids), self._tensor(slots), self._pool)

    def _read(
        self, chunks: Sequence[Chunk], rows: list[range | list[int]], first_row: int
    ) -> Tensor:
        """Read prompt chunks; return the last hidden states [B, C] where a prompt ends.

        Where it ends, the states are copied to the other answers' slots, and each answer's rows,
        numbered from `first_row`, are appended to `rows`.
        """
        sequences: list[tuple[int, Sequence[int]]] = []
        sampled: list[int] = []
        for chunk in chunks:
            prompt = chunk.running.request.prompt
            own = chunk.running.choices[0].slots
            if chunk.is_last:
                sampled += range(len(sequences), len(sequences) + len(own))
            part = prompt[chunk.start : chunk.start + chunk.length]
            sequences += [(slot, part) for slot in own]
        hidden = self._prefill(sequences)
        for chunk in chunks:
            if chunk.is_last:
                own_rows = range(first_row, first_row + len(chunk.running.choices[0].slots))
                rows += [own_rows] * len(chunk.running.choices)
                first_row = own_rows.stop
                self._share_state(chunk.running.choices)
        return hidden if len(sampled) == len(sequences) else hidden[self._tensor(sampled)]

    def _prefill(self, sequences: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Read (slot, tokens) pairs; return the last hidden states [n, C].

        As many at a time as fit in the limit, at least one. Rows do not depend on their
        neighbours, so the cuts change no bit.
        """
        hidden: list[Tensor] = []
        first = 0
        while first < len(sequences):
            slots: list[int] = []
            ids: list[int] = []
            ends = [0]
            for slot, tokens in sequences[first:]:
                if slots and len(ids) + len(tokens) > self._max_prefill_len:
                    break
                slots.append(slot)
                ids += tokens
                ends.append(len(ids))
            hidden.append(
                self._model.prefill(self._tensor(ids), ends, self._tensor(slots), self._pool)
            )
            first += len(slots)
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _share_state(self, choices: Sequence[Choice]) -> None:
        if len(choices) > 1:
            for k, slot in enumerate(choices[0].slots):
                self._pool.copy(slot, [choice.slots[k] for choice in choices[1:]])

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._model.device)
