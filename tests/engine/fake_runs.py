"""Engines over the fake model, with and without rows that sleep, run to their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fake_model import VOCAB, FakeModel, fake_state
from mrss_kernels import reference_tail
from torch import Tensor

from mrss_provider.config import EngineConfig
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.request import EngineRequest, TokenOutput

A, B, C, D = (fake_state(name) for name in ("amber", "blue", "cyan", "dun"))
BANNED = VOCAB - 1

MAX_ROWS = 24

Outputs = dict[tuple[str, int], list[TokenOutput]]


def plain_tail(logits: Tensor, inputs: Any, outputs: Any, **_: Any) -> None:
    reference_tail.tail(logits, inputs, outputs)


def make_engine(model: FakeModel, *, on_device: bool, lazy: bool = True, **config: int) -> Engine:
    values = {"max_rows": MAX_ROWS, "prefill_chunk_len": 32, "max_context_len": 999} | config
    config_ = EngineConfig(lazy_rows="on" if lazy else "off", **values)  # type: ignore[arg-type]
    banned = torch.tensor([BANNED])
    runner = DeviceRunner(model, config_, banned, tail=plain_tail) if on_device else None  # type: ignore[arg-type]
    return Engine(model, None, config_, allowed_ids=range(BANNED), runner=runner)  # type: ignore[arg-type]


def run(engine: Engine, arrivals: Mapping[int, Sequence[EngineRequest]]) -> Outputs:
    """Run to the end; `arrivals[step]` come before that step."""
    outputs: Outputs = {}
    for step in range(1000):
        for new in arrivals.get(step, ()):
            engine.add(new)
        if not engine.has_work and step > max(arrivals):
            assert engine.num_free_rows == MAX_ROWS
            return outputs
        for output in engine.step():
            assert output.error is None
            outputs.setdefault((output.request_id, output.index), []).append(output)
    raise AssertionError("the engine does not come to an end")


def ids(outputs: Outputs) -> dict[tuple[str, int], list[int | None]]:
    return {key: [o.token_id for o in answer] for key, answer in outputs.items()}
