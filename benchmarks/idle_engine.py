"""An engine whose model computes nothing: all that is left is what the host does for a token.

Everything but the device is the real thing: `Engine`, `Scheduler`, `DeviceRunner`, text and server.
A step takes a fixed time, in which it holds no lock, as a GPU's does.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.async_engine.card import Card
from mrss_provider.async_engine.loading import Loaded
from mrss_provider.chat import TEMPLATES
from mrss_provider.config import EngineConfig
from mrss_provider.engine.batch import Batch
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.step_runner import PendingTokens
from mrss_provider.engine.tail import Picked
from mrss_provider.mixture import Method
from mrss_provider.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mrss_kernels.tail_tensors import TailInputs, TailOutputs

torch.set_num_threads(1)

VOCAB_SIZE = 65_536
NUM_WORDS = 2_048


@dataclass(frozen=True)
class _Config:
    vocab_size: int = VOCAB_SIZE
    fingerprint: str = "0" * 64
    name: str = "idle"


class _Pool:
    has_offsets = False
    wkv = torch.zeros(0)

    def write(self, slot: int, state: object) -> None:
        """Keep no state."""


class IdleModel:
    """A model whose hidden state is the id that was read."""

    fused = None
    packs_rows = True

    def __init__(self) -> None:
        self.config = _Config()
        self.device = torch.device("cpu")

    def new_pool(self, num_slots: int) -> _Pool:
        """Return nothing to keep."""
        return _Pool()

    def decode(self, token_ids: Tensor, slots: Tensor, pool: _Pool) -> Tensor:
        """Return the ids, [B, 1]."""
        return token_ids[:, None]

    def prefill(self, token_ids: Tensor, ends: list[int], slots: Tensor, pool: _Pool) -> Tensor:
        """Return the last id of each sequence, [n, 1]."""
        return token_ids[torch.tensor(ends[1:]) - 1, None]

    def head(self, hidden: Tensor) -> Tensor:
        """Return the ids, [B, 1]."""
        return hidden


def words(tokenizer: Tokenizer) -> list[int]:
    """Return ids of tokens that are a space and a word."""
    ids = []
    for token_id in tokenizer.allowed_ids(VOCAB_SIZE):
        token = tokenizer.token_bytes(token_id) or b""
        if token[:1] == b" " and token[1:].isalpha() and token.isascii():
            ids.append(token_id)
    return ids[:NUM_WORDS]


class WordTail:
    """Takes the place of the tail's kernels: after each word comes the next one of the list."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = torch.tensor(words(tokenizer))
        self._next = ids[torch.arange(VOCAB_SIZE) % len(ids)]
        self._next[ids] = ids.roll(-1)

    def __call__(
        self,
        logits: Tensor,
        inputs: TailInputs,
        outputs: TailOutputs,
        *,
        num_groups: int,
        **flags: bool,
    ) -> None:
        """Draw: *writes* `outputs.ids` and `outputs.token_ids`."""
        rows = inputs.column("first_row")[:num_groups]
        # The step's bucket may have more groups than there are rows.
        ids = self._next[logits[rows.clamp_max(len(logits) - 1), 0]]
        outputs.ids[:num_groups] = ids
        is_live = inputs.column("num_rows")[:num_groups] > 0
        outputs.token_ids[inputs.column("next_row")[:num_groups][is_live]] = ids[is_live]


@dataclass(frozen=True)
class _Pending:
    pending: PendingTokens
    due: float

    def go_on(self) -> None:
        self.pending.go_on()

    def picked(self) -> list[Picked]:
        time.sleep(max(0.0, self.due - time.monotonic()))
        return self.pending.picked()


@dataclass
class Steps:
    """When steps were done (monotonic), and in which one each answer (by seed) got its first token.

    All later tokens come one a step.
    """

    done: list[float] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)


class TimedRunner(DeviceRunner):
    """A runner whose steps, one after the other, take `step_s` seconds each; notes them."""

    step_s = 0.0
    steps: Steps

    def launch(self, batch: Batch) -> PendingTokens:
        """Begin a step: the device does it when it is done with those before."""
        pending = super().launch(batch)
        done = self.steps.done
        for choice in batch.sampling[len(batch.decoding) :]:
            self.steps.first[choice.owner.request.sampling.seed or 0] = len(done)
        free = max(time.monotonic(), done[-1] if done else 0.0)
        done.append(free + self.step_s)
        return _Pending(pending, done[-1])


class _Library:
    """Knows the base and nothing else."""

    def resolve(self, name: str, options: object) -> ResolvedMixture:
        """Return the base, whatever is asked for."""
        return ResolvedMixture(
            canonical="base",
            states=(None,),
            names=("base",),
            groups=("",),
            ratios=(1.0,),
            weights=(1.0,),
            merge=Method("linear"),
            gate=Method("fixed"),
            cut=0.0,
            base_row=0,
            fingerprint="idle",
        )

    def cards(self) -> list[object]:
        """Return none."""
        return []


def idle_engine(max_rows: int, step_s: float, steps: Steps) -> AsyncEngine:
    """Return an engine that gives every answer a word each `step_s` seconds."""
    config = EngineConfig(max_rows=max_rows, max_queued=max_rows, cache_bytes=0)

    def load(config: EngineConfig) -> Loaded:
        tokenizer = Tokenizer.load()
        model: Any = IdleModel()
        library: Any = _Library()
        banned = torch.zeros(0, dtype=torch.int64)
        runner = TimedRunner(model, config, banned, tail=WordTail(tokenizer))
        runner.step_s, runner.steps = step_s, steps
        allowed = tokenizer.allowed_ids(VOCAB_SIZE)
        engine = Engine(model, library, config, allowed_ids=allowed, runner=runner)
        return Loaded(engine, library, tokenizer, TEMPLATES["world"], Card())

    return AsyncEngine(config, loader=load)


def write_steps(steps: Steps, path: Path) -> None:
    """Write when the steps were done."""
    path.write_text(json.dumps({"done": steps.done, "first": steps.first}))
