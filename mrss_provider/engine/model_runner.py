"""ModelRunner: a batch of the scheduler becomes calls of the model, and rows of logits.

Owns the state pool. All rows of a mixture read the same tokens, so a prompt's chunk is one
sequence a row, all of the same length. Chunks whose tokens are scored are read in calls of their
own, so that the numbers of whatever shares their step stay what they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrss_provider.engine.batch import Batch, CatchUp, Choice, Chunk, Running
from mrss_provider.engine.prompt_reader import PromptReader
from mrss_provider.engine.request import EOS_ID, EngineRequest
from mrss_provider.model.state import RowState, StateSnapshot

if TYPE_CHECKING:
    from mrss_provider.model import Model, TunedState


# Tokens of one call of the model, over all sequences: what bounds a step's temporary memory (on a
# CPU about 0.3 MB a token at 768 channels). More of them do not make a CPU's products any faster.
_CPU_PREFILL_LEN = 512
_CUDA_PREFILL_LEN = 16_384


@dataclass(frozen=True)
class _Sequence:
    """Tokens for the row of a slot, and `kept`: after which the hidden state is wanted too."""

    slot: int
    tokens: Sequence[int]
    kept: Sequence[int] = ()


class ModelRunner:
    """Runs batches on `num_slots` recurrent states.

    Args:
        model: what computes.
        num_slots: rows that may be held at once.
        banned_ids: int64 [M] on the model's device, ids that no request may get.

    Attributes:
        pool: the states.
    """

    def __init__(self, model: Model, num_slots: int, banned_ids: Tensor) -> None:
        self._model = model
        self._reader = PromptReader(model, banned_ids)
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
        self.catch_up(batch.catching_up)
        self.begin(batch)
        scored = self.score(batch.chunks)
        hidden: list[Tensor] = []
        rows: list[range | list[int]] = []
        if batch.decoding:
            hidden.append(self._decode(batch.decoding, rows))
        if batch.chunks:
            hidden += self._read(batch.chunks, scored)
            _number_rows(batch.chunks, rows)
        if not rows:
            return torch.empty(0, self._model.config.vocab_size), rows
        return self._model.head(torch.cat(hidden)), rows

    def catch_up(self, pieces: Sequence[CatchUp]) -> None:
        """Read what rows that wake have missed; its tokens must be committed."""
        # An answer that has ended since the step was planned has fewer tokens than that.
        missed = [_Sequence(piece.slot, piece.tokens) for piece in pieces if piece.tokens]
        if missed:
            self._prefill(missed)

    def begin(self, batch: Batch) -> None:
        """Write the states that rows begin with; rows tuned with a token 0 read it.

        Rows that have been somewhere before have the states of then, on `Running.rows`. Rows that
        lost their states read again what they had read. Where a piece begins at a reinjection, its
        rows are given their tuned states anew.
        """
        starting = [chunk.running for chunk in batch.chunks if chunk.is_first]
        bos_slots: list[int] = []
        for running in [*starting, *(choice.owner for choice in batch.resumed)]:
            bos_slots += self._write(running.request, running.choices[0].slots, running.rows)
            running.rows = None
        for piece in batch.rereading:
            if piece.is_first:
                request = piece.choice.owner.request
                rows = None if request.start is None else request.start.rows
                bos_slots += self._write(request, piece.choice.slots, rows)
        if bos_slots:
            bos_slots.sort()
            ids = [EOS_ID] * len(bos_slots)
            self._model.decode(self._tensor(ids), self._tensor(bos_slots), self.pool)
        for chunk in batch.chunks:
            if chunk.is_reinjected:
                self._reinject(chunk.running.choices[0])
        for piece in batch.rereading:
            if piece.is_reinjected:
                self._reinject(piece.choice)
        lost = [
            _Sequence(slot, piece.tokens)
            for piece in batch.rereading
            for slot in piece.choice.slots
            if piece.tokens
        ]
        if lost:
            self._prefill(lost)

    def score(self, chunks: Sequence[Chunk]) -> dict[Running, Tensor]:
        """Read the chunks of whose tokens more is wanted than that they are read; note it.

        What was found is noted on their `Running`; waits for the device.

        Returns:
            The last hidden states [K, C] of what was read.
        """
        wanted = [(chunk, self._reader.wanted(chunk)) for chunk in chunks]
        scored = [(chunk, after) for chunk, after in wanted if after is not None]
        if not scored:
            return {}
        hidden = self._prefill(
            [sequence for chunk, after in scored for sequence in _sequences([chunk], after)]
        )
        lasts: dict[Running, Tensor] = {}
        for chunk, after in scored:
            num_rows, count = chunk.running.request.mixture.rows, len(after) + 1
            own = hidden[: num_rows * count].view(num_rows, count, -1)
            hidden = hidden[num_rows * count :]
            self._reader.note(chunk, after, own)
            lasts[chunk.running] = own[:, -1]
        return lasts

    def read_beside(
        self,
        chunks: Sequence[Chunk],
        scored: Mapping[Running, Tensor],
        token_ids: Tensor,
        slots: Sequence[int],
    ) -> Tensor:
        """Read prompt chunks and a token for each decoding row, in one pass where the model can.

        Args:
            chunks: pieces of prompts.
            scored: those that `score` has read, with what it returned.
            token_ids: int64 [B], the next tokens of decoding rows, on the device.
            slots: those rows' states.

        Returns:
            Last hidden states [n, C]: of the decoding rows, then of each prompt whose answer begins
            here, in the order of its mixture's states.
        """
        unread = [chunk for chunk in chunks if chunk.running not in scored]
        if not slots:
            hidden = self._read(chunks, scored)
        elif unread and self._model.packs_rows:
            read = self._prefill(_sequences(unread), token_ids, slots)
            self._share_states(chunks)
            hidden = [read[: len(slots)], *_last_hidden(chunks, scored, read[len(slots) :])]
        else:
            decoded = self._model.decode(token_ids, self._tensor(slots), self.pool)
            hidden = [decoded, *self._read(chunks, scored)]
        return torch.cat(hidden) if hidden else torch.empty(0, device=self._model.device)

    def _write(
        self, request: EngineRequest, slots: Sequence[int], rows: Sequence[StateSnapshot] | None
    ) -> list[int]:
        """Write the states of one answer's rows: `rows`, or those of its mixture.

        Returns:
            The slots of those that are to read a token 0 before anything else.
        """
        if rows is not None:
            for slot, row in zip(slots, rows, strict=True):
                self.pool.write(slot, row)
            return []
        begins = request.prompt[0] == EOS_ID
        bos_slots: list[int] = []
        for slot, state in zip(slots, request.mixture.states, strict=True):
            self.pool.write(slot, self._at_hand(state))
            if state is not None and state.metadata.bos and not begins:
                bos_slots.append(slot)
        return bos_slots

    def _reinject(self, choice: Choice) -> None:
        """Make each row what the base's row is plus its tuned state; the base's stays."""
        mixture = choice.owner.request.mixture
        assert mixture.base_row is not None
        base_slot = choice.slots[mixture.base_row]
        for slot, state in zip(choice.slots, mixture.states, strict=True):
            at_hand = self._at_hand(state)
            if at_hand is not None:
                self.pool.reinject(slot, base_slot, at_hand)

    def _at_hand(self, state: TunedState | None) -> RowState | None:
        """Return a state where the pool is, if it is to be kept there."""
        if state is None or self._resident is None:
            return state
        return self._resident.get(state)

    def _decode(self, choices: Sequence[Choice], rows: list[range | list[int]]) -> Tensor:
        """Feed each answer's last token to its rows; append each answer's rows to `rows`."""
        # In the order of slots, so that neighbours in the pool are neighbours in the batch.
        fed = sorted(
            (slot, choice.last_token) for choice in choices for slot in choice.active_slots
        )
        row_of = {slot: row for row, (slot, _) in enumerate(fed)}
        rows += [[row_of[slot] for slot in choice.active_slots] for choice in choices]
        slots, ids = zip(*fed, strict=True)
        return self._model.decode(self._tensor(ids), self._tensor(slots), self.pool)

    def _read(self, chunks: Sequence[Chunk], scored: Mapping[Running, Tensor]) -> list[Tensor]:
        """Read prompt chunks that were not scored; return the last hidden states before answers.

        Where a prompt ends, the states are copied to the other answers' slots.
        """
        unread = [chunk for chunk in chunks if chunk.running not in scored]
        read = self._prefill(_sequences(unread)) if unread else None
        self._share_states(chunks)
        return _last_hidden(chunks, scored, read)

    def _prefill(
        self,
        sequences: Sequence[_Sequence],
        token_ids: Tensor | None = None,
        decoding_slots: Sequence[int] = (),
    ) -> Tensor:
        """Read a token for each decoding slot, then sequences.

        As many at a time as fit in the limit, at least one. Rows do not depend on their
        neighbours, so the cuts change no bit.

        Returns:
            Hidden states [n, C]: a decoding row's; of a sequence those that it keeps, then its
            last.
        """
        hidden: list[Tensor] = []
        first = 0
        slots = list(decoding_slots)
        while first < len(sequences):
            ids: list[int] = []
            ends = list(range(len(slots) + 1))
            begun = first
            for sequence in sequences[first:]:
                if first > begun and ends[-1] + len(sequence.tokens) > self._max_prefill_len:
                    break
                slots.append(sequence.slot)
                ids += sequence.tokens
                ends.append(ends[-1] + len(sequence.tokens))
                first += 1
            packed = self._tensor(ids)
            if token_ids is not None and len(token_ids):
                packed = torch.cat((token_ids, packed))
            hidden.append(self._forward(packed, ends, slots, sequences[begun:first]))
            token_ids, slots = None, []
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def _forward(
        self,
        token_ids: Tensor,
        ends: Sequence[int],
        slots: Sequence[int],
        sequences: Sequence[_Sequence],
    ) -> Tensor:
        """Read packed tokens in one call of the model; as `_prefill`."""
        model = self._model
        if not any(sequence.kept for sequence in sequences):
            return model.prefill(token_ids, ends, self._tensor(slots), self.pool)
        hidden = model.prefill(token_ids, ends, self._tensor(slots), self.pool, all_positions=True)
        first = len(slots) - len(sequences)
        wanted = list(range(first))
        for start, end, sequence in zip(ends[first:], ends[first + 1 :], sequences, strict=False):
            wanted += [start + offset for offset in sequence.kept]
            wanted.append(end - 1)
        return hidden[self._tensor(wanted)]

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


def _sequences(chunks: Sequence[Chunk], kept: Sequence[int] = ()) -> list[_Sequence]:
    """Return what each row reads of `chunks`."""
    return [
        _Sequence(slot, chunk.tokens, kept)
        for chunk in chunks
        for slot in chunk.running.choices[0].slots
    ]


def _last_hidden(
    chunks: Sequence[Chunk], scored: Mapping[Running, Tensor], read: Tensor | None
) -> list[Tensor]:
    """Return the last hidden states [K, C] where an answer begins, in the chunks' order.

    Args:
        chunks: all that were read.
        scored: those of scored chunks.
        read: [n, C], of the rows of the others.
    """
    lasts: list[Tensor] = []
    row = 0
    for chunk in chunks:
        own = scored.get(chunk.running)
        if own is None:
            assert read is not None
            own = read[row : row + chunk.running.request.mixture.rows]
            row += len(own)
        if chunk.gives_token:
            lasts.append(own)
    return lasts


def _number_rows(chunks: Sequence[Chunk], rows: list[range | list[int]]) -> None:
    """Append to `rows` those of each answer whose prompt ends; answers share their prompt's."""
    first = sum(map(len, rows))
    for chunk in chunks:
        if chunk.gives_token:
            own = range(first, first + chunk.running.request.mixture.rows)
            rows += [own] * len(chunk.running.choices)
            first = own.stop


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
            try:
                copy = self._copy(state)
            except torch.OutOfMemoryError:
                # Before requests have to end: the others can be copied again.
                self._states.clear()
                copy = self._copy(state)
            self._states[state.sha256] = copy
        self._states.move_to_end(state.sha256)
        return self._states[state.sha256]

    def _copy(self, state: TunedState) -> StateSnapshot:
        wkv = state.wkv.to(self._device, non_blocking=True)
        zeros = torch.zeros(wkv.shape[0], wkv.shape[1] * wkv.shape[2], device=self._device)
        shift_att, shift_ffn, offset = (
            None if part is None else part.to(self._device, non_blocking=True)
            for part in (state.shift_att, state.shift_ffn, state.time_offset)
        )
        return StateSnapshot(
            wkv,
            zeros if shift_att is None else shift_att,
            zeros if shift_ffn is None else shift_ffn,
            offset,
        )
