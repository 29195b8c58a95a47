"""ModelRunner: a batch of the scheduler becomes calls of the model, and rows of logits.

Owns the state pool. All rows of a mixture read the same tokens, so a prompt's chunk is one
sequence a row, all of the same length.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrss_provider.engine.request import EOS_ID
from mrss_provider.engine.scheduler import Batch, Choice, Chunk
from mrss_provider.model.state import RowState, StateSnapshot

if TYPE_CHECKING:
    from mrss_provider.model import Model, TunedState


# Tokens of one call of the model, over all sequences: what bounds a step's temporary memory (on a
# CPU about 0.3 MB a token at 768 channels). More of them do not make a CPU's products any faster.
_CPU_PREFILL_LEN = 512
_CUDA_PREFILL_LEN = 16_384


class ModelRunner:
    """Runs batches on `num_slots` recurrent states.

    Attributes:
        pool: the states.
    """

    def __init__(self, model: Model, num_slots: int) -> None:
        self._model = model
        self.pool = model.new_pool(num_slots)
        is_cpu = model.device.type == "cpu"
        self._max_prefill_len = _CPU_PREFILL_LEN if is_cpu else _CUDA_PREFILL_LEN
        self._resident = None if is_cpu else ResidentStates(model.device)

    def forward(self, batch: Batch) -> tuple[Tensor, list[range | list[int]]]:
        """Run one step; the states of all its rows move on by what they read.

        Returns:
            Logits [B, V] fp32, and for each answer of `batch.sampling` which rows are its own, in
            the order of its mixture's states. Answers that share a prompt share rows here.
        """
        self.begin(batch.chunks)
        hidden: list[Tensor] = []
        rows: list[range | list[int]] = []
        if batch.decoding:
            hidden.append(self._decode(batch.decoding, rows))
        if batch.chunks:
            hidden.append(self._read(batch.chunks, rows, len(hidden[0]) if hidden else 0))
        if not rows:
            return torch.empty(0, self._model.config.vocab_size), rows
        return self._model.head(torch.cat(hidden)), rows

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """Write the initial states of prompts that begin; rows tuned with a token 0 read it."""
        bos_slots: list[int] = []
        for chunk in chunks:
            if not chunk.is_first:
                continue
            request = chunk.running.request
            begins = request.prompt[0] == EOS_ID
            slots = chunk.running.choices[0].slots
            for slot, state in zip(slots, request.mixture.states, strict=True):
                at_hand: RowState | None = state
                if state is not None and self._resident is not None:
                    at_hand = self._resident.get(state)
                self.pool.write(slot, at_hand)
                if state is not None and state.metadata.bos and not begins:
                    bos_slots.append(slot)
        if bos_slots:
            bos_slots.sort()
            ids = [EOS_ID] * len(bos_slots)
            self._model.decode(self._tensor(ids), self._tensor(bos_slots), self.pool)

    def read_beside(
        self, chunks: Sequence[Chunk], token_ids: Tensor, slots: Sequence[int]
    ) -> Tensor:
        """Read prompt chunks and a token for each decoding row, in one pass where the model can.

        Args:
            chunks: pieces of prompts.
            token_ids: int64 [B], the next tokens of decoding rows, on the device.
            slots: those rows' states.

        Returns:
            Last hidden states [n, C]: of the decoding rows, then of each prompt that ends here, in
            the order of its mixture's states.
        """
        if slots and not self._model.packs_rows:
            decoded = self._model.decode(token_ids, self._tensor(slots), self.pool)
            return torch.cat((decoded, self._read(chunks, [], 0)))
        sequences, ended = _sequences(chunks)
        hidden = self._prefill(sequences, token_ids, slots)
        self._share_states(chunks)
        if len(ended) < len(sequences):
            wanted = [*range(len(slots)), *(len(slots) + i for i in ended)]
            hidden = hidden[self._tensor(wanted)]
        return hidden

    def _decode(self, choices: Sequence[Choice], rows: list[range | list[int]]) -> Tensor:
        """Feed each answer's last token to its rows; append each answer's rows to `rows`."""
        # In the order of slots, so that neighbours in the pool are neighbours in the batch.
        fed = sorted((slot, choice.last_token) for choice in choices for slot in choice.slots)
        row_of = {slot: row for row, (slot, _) in enumerate(fed)}
        rows += [[row_of[slot] for slot in choice.slots] for choice in choices]
        slots, ids = zip(*fed, strict=True)
        return self._model.decode(self._tensor(ids), self._tensor(slots), self.pool)

    def _read(
        self, chunks: Sequence[Chunk], rows: list[range | list[int]], first_row: int
    ) -> Tensor:
        """Read prompt chunks; return the last hidden states [B, C] where a prompt ends.

        Where it ends, the states are copied to the other answers' slots, and each answer's rows,
        numbered from `first_row`, are appended to `rows`.
        """
        sequences, ended = _sequences(chunks)
        hidden = self._prefill(sequences)
        self._share_states(chunks)
        for chunk in chunks:
            if chunk.is_last:
                own_rows = range(first_row, first_row + len(chunk.running.choices[0].slots))
                rows += [own_rows] * len(chunk.running.choices)
                first_row = own_rows.stop
        return hidden if len(ended) == len(sequences) else hidden[self._tensor(ended)]

    def _prefill(
        self,
        sequences: Sequence[tuple[int, Sequence[int]]],
        token_ids: Tensor | None = None,
        decoding_slots: Sequence[int] = (),
    ) -> Tensor:
        """Read a token for each decoding slot, then (slot, tokens) pairs.

        As many at a time as fit in the limit, at least one. Rows do not depend on their
        neighbours, so the cuts change no bit.

        Returns:
            The last hidden states [n, C].
        """
        hidden: list[Tensor] = []
        first = 0
        slots = list(decoding_slots)
        while first < len(sequences):
            ids: list[int] = []
            ends = list(range(len(slots) + 1))
            begun = first
            for slot, tokens in sequences[first:]:
                if first > begun and ends[-1] + len(tokens) > self._max_prefill_len:
                    break
                slots.append(slot)
                ids += tokens
                ends.append(ends[-1] + len(tokens))
                first += 1
            packed = self._tensor(ids)
            if token_ids is not None and len(token_ids):
                packed = torch.cat((token_ids, packed))
            hidden.append(self._model.prefill(packed, ends, self._tensor(slots), self.pool))
            token_ids, slots = None, []
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _share_states(self, chunks: Sequence[Chunk]) -> None:
        """Where a prompt ends, give the rows of all its answers the states that read it."""
        for chunk in chunks:
            choices = chunk.running.choices
            if chunk.is_last and len(choices) > 1:
                for k, slot in enumerate(choices[0].slots):
                    self.pool.copy(slot, [choice.slots[k] for choice in choices[1:]])

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        # From pinned memory: the host does not wait for the steps under way.
        pin = self._model.device.type == "cuda"
        tensor = torch.tensor(numbers, dtype=torch.int64, pin_memory=pin)
        return tensor.to(self._model.device, non_blocking=True)


def _sequences(
    chunks: Sequence[Chunk],
) -> tuple[list[tuple[int, Sequence[int]]], list[int]]:
    """Return what each row reads, (slot, tokens), and which of these end a prompt."""
    sequences: list[tuple[int, Sequence[int]]] = []
    ended: list[int] = []
    for chunk in chunks:
        prompt = chunk.running.request.prompt
        own = chunk.running.choices[0].slots
        if chunk.is_last:
            ended += range(len(sequences), len(sequences) + len(own))
        part = prompt[chunk.start : chunk.start + chunk.length]
        sequences += [(slot, part) for slot in own]
    return sequences, ended


class ResidentStates:
    """Tuned states on the device, the last used ones: admitting a request copies nothing up."""

    def __init__(self, device: torch.device, max_states: int = 64) -> None:
        self._device = device
        self._max_states = max_states
        self._states: OrderedDict[str, StateSnapshot] = OrderedDict()

    def get(self, state: TunedState) -> StateSnapshot:
        """Return a state's tensors on the device."""
        if state.sha256 not in self._states:
            if len(self._states) >= self._max_states:
                self._states.popitem(last=False)
            self._states[state.sha256] = self._copy(state)
        self._states.move_to_end(state.sha256)
        return self._states[state.sha256]

    def _copy(self, state: TunedState) -> StateSnapshot:
        wkv = state.wkv.to(self._device)
        zeros = torch.zeros(wkv.shape[0], wkv.shape[1] * wkv.shape[2], device=self._device)
        shift_att, shift_ffn, offset = (
            None if part is None else part.to(self._device)
            for part in (state.shift_att, state.shift_ffn, state.time_offset)
        )
        return StateSnapshot(
            wkv,
            zeros if shift_att is None else shift_att,
            zeros if shift_ffn is None else shift_ffn,
            offset,
        )
