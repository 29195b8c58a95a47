"""A toy recurrent model with the real one's interface: what the engine does shows in its ids.

Every operation works on one row at a time in effect, so a row's numbers are the same bits
whatever else is in the batch, and a prompt's split changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mrss_provider.engine.request import EngineRequest, ResolvedMixture
from mrss_provider.mixture import parse_method
from mrss_provider.model.state import StateSnapshot
from mrss_provider.sampling_params import SamplingParams

SIZE = 12
VOCAB = 40


@dataclass(frozen=True)
class FakeMetadata:
    bos: bool = False
    display_name: str | None = None


@dataclass(frozen=True, eq=False)
class FakeState:
    """A tuned state: the first hidden vector [SIZE]."""

    name: str
    vector: Tensor
    metadata: FakeMetadata = field(default_factory=FakeMetadata)

    @property
    def sha256(self) -> str:
        return self.name


def fake_state(name: str, *, bos: bool = False) -> FakeState:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return FakeState(name, torch.randn(SIZE, generator=generator), FakeMetadata(bos))


class FakePool:
    has_offsets = False

    def __init__(self, num_slots: int) -> None:
        # NaN until written: a slot that is used without its state gives NaN ids.
        self.hidden = torch.full((num_slots, SIZE), torch.nan)
        self.wkv = self.hidden

    def write(self, slot: int, state: FakeState | StateSnapshot | None) -> None:
        if isinstance(state, StateSnapshot):
            self.hidden[slot] = state.wkv
        else:
            self.hidden[slot] = torch.zeros(SIZE) if state is None else state.vector

    def reinject(self, slot: int, base_slot: int, state: FakeState) -> None:
        self.hidden[slot] = self.hidden[base_slot] + state.vector

    def snapshot(self, slot: int) -> StateSnapshot:
        return StateSnapshot(self.hidden[slot].clone(), torch.zeros(1), torch.zeros(1))

    def copy(self, src_slot: int, dst_slots: Sequence[int]) -> None:
        for slot in dst_slots:
            self.hidden[slot] = self.hidden[src_slot]


@dataclass(frozen=True)
class FakeConfig:
    vocab_size: int = VOCAB
    hidden_size: int = SIZE
    fingerprint: str = "f" * 64
    name: str = "fake"


class FakeModel:
    """`h = tanh(A h + E[token])`, logits `4 W h`. `prefill` takes decoding rows along.

    `calls` has one entry a call: ("decode", slots) or ("prefill", lengths). `poison` makes the
    logits of any row NaN that has just read that token; `fail` is raised by the next call.
    """

    fused = None
    packs_rows = True

    def __init__(self, vocab_size: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(7)
        self.config = FakeConfig(vocab_size)
        self.device = torch.device("cpu")
        self.transition = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
        self.embedding = torch.randn(vocab_size, SIZE, generator=generator)
        self.readout = torch.randn(vocab_size, SIZE, generator=generator)
        self.calls: list[tuple[str, list[int]]] = []
        self.poison: int | None = None
        self.fail: Exception | None = None

    def new_pool(self, num_slots: int) -> FakePool:
        return FakePool(num_slots)

    def decode(self, token_ids: Tensor, slots: Tensor, pool: FakePool) -> Tensor:
        self._called("decode", slots.tolist())
        assert len(set(slots.tolist())) == len(slots), "a slot twice in one batch"
        return torch.stack(
            [
                self._read(int(token), int(slot), pool)
                for token, slot in zip(token_ids, slots, strict=True)
            ]
        )

    def prefill(
        self,
        token_ids: Tensor,
        cu_seqlens: Sequence[int],
        slots: Tensor,
        pool: FakePool,
        *,
        all_positions: bool = False,
    ) -> Tensor:
        lengths = [b - a for a, b in pairwise(cu_seqlens)]
        self._called("prefill", lengths)
        assert len(set(slots.tolist())) == len(slots), "a slot twice in one batch"
        assert cu_seqlens[-1] == len(token_ids)
        assert min(lengths) > 0
        hidden = torch.stack(
            [
                self._read(token, slot, pool)
                for i, slot in enumerate(slots.tolist())
                for token in token_ids[cu_seqlens[i] : cu_seqlens[i + 1]].tolist()
            ]
        )
        return hidden if all_positions else hidden[[end - 1 for end in cu_seqlens[1:]]]

    def head(self, hidden: Tensor) -> Tensor:
        assert len(hidden)
        return torch.stack([4 * (self.readout * row).sum(1) for row in hidden])

    def logits_after(self, tokens: Sequence[int], state: FakeState | None) -> Tensor:
        """Return what the engine must see: the logits [V] after `tokens`, without any engine."""
        pool = self.new_pool(1)
        pool.write(0, state)
        for token in tokens:
            hidden = self._read(token, 0, pool)
        return self.head(hidden[None])[0]

    def _read(self, token: int, slot: int, pool: FakePool) -> Tensor:
        mixed = (self.transition * pool.hidden[slot]).sum(1)
        pool.hidden[slot] = torch.tanh(mixed + self.embedding[token])
        if token == self.poison:
            pool.hidden[slot] = torch.nan
        return pool.hidden[slot].clone()

    def _called(self, what: str, numbers: list[int]) -> None:
        self.calls.append((what, numbers))
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure


def mixture(
    *states: FakeState | None,
    weights: Sequence[float] | None = None,
    merge: str = "linear",
    gate: str = "fixed",
    cut: float = 0.0,
) -> ResolvedMixture:
    """Lay out rows as the library does: None, the base, comes first; equal weights of sum 1."""
    shares = tuple(weights or [1 / len(states)] * len(states))
    return ResolvedMixture(
        canonical="+".join("base" if s is None else s.name for s in states),
        states=tuple(states),  # type: ignore[arg-type]
        names=tuple("base" if s is None else s.name for s in states),
        groups=("",) * len(states),
        ratios=shares,
        weights=shares,
        merge=parse_method(merge, "merge", "merge"),
        gate=parse_method(gate, "gate", "gate"),
        cut=cut,
        base_row=0 if states[0] is None else None,
        fingerprint="fp_test",
    )


def request(
    request_id: str,
    prompt: Sequence[int],
    mixed: ResolvedMixture,
    n: int = 1,
    **sampling: object,
) -> EngineRequest:
    values = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "seed": 1, "ignore_eos": True}
    values |= {"sampling_order": "openai"} | sampling
    return EngineRequest(request_id, tuple(prompt), mixed, SamplingParams(**values), n)  # type: ignore[arg-type]
