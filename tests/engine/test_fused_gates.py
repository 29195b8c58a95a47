"""Every merge rule and gate with its parameters, from a mixture to the fields that kernels read.

The kernels' plain form reads them, in a runner that stays ahead; the other runner is torch's tail.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from fake_model import VOCAB, FakeModel, fake_state, mixture, request
from mrss_kernels import reference_tail
from torch import Tensor

from mrss_provider.config import EngineConfig
from mrss_provider.engine import device_runner
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.gate_metadata import GateMetadata
from mrss_provider.engine.gate_table import GateTable
from mrss_provider.engine.gates import Learned
from mrss_provider.engine.gating_layer import GatingLayer
from mrss_provider.engine.merges import make_merge
from mrss_provider.engine.request import EngineRequest, ResolvedMixture
from mrss_provider.mixture import GATES, MERGES, parse_method

A, B, C = (fake_state(name) for name in ("amber", "blue", "cyan"))
CONFIG = EngineConfig(max_rows=64, prefill_chunk_len=64, prefill_alone_len=64, max_context_len=999)
RULES = ("linear", "geometric", "product", "power:-2", "power:0.001", "delta", "contrast", "route")
ROW_GATES = (
    "fixed",
    "novelty:0.2,2",
    "confidence:0.7",
    "posterior-novelty:0.02,0.5",
    "learned:first",
    "learned:second",
)


def learned(seed: int) -> Learned:
    cpu = torch.Generator().manual_seed(seed)
    parts = (torch.randn(*size, generator=cpu) * 0.4 for size in ((16, 10), (16,), (16,)))
    return Learned("check", GatingLayer(*parts), GateMetadata.__new__(GateMetadata))


TRAINED = {"learned:first": learned(1), "learned:second": learned(2)}


def mixture_of(rule: str, gate: str) -> ResolvedMixture:
    ratios = (0.0, 1.0, 0.5, -0.25 if rule == "contrast" else 0.75)
    scaled = make_merge(parse_method(rule, "merge", "merge")).scale(ratios, base_named=False)
    cut = 0.1 if rule in ("delta", "contrast") else 0.0
    mixed = mixture(None, A, B, C, weights=scaled, merge=rule, gate=gate, cut=cut)
    return dataclasses.replace(mixed, ratios=ratios, trained_gate=TRAINED.get(gate))


def requests() -> list[EngineRequest]:
    return [
        request(f"{rule}~{gate}", [1, 2 + n % 5], mixture_of(rule, gate), max_tokens=4, seed=n)
        for n, (rule, gate) in enumerate(itertools.product(RULES, ROW_GATES))
    ]


def plain_tail(logits: Tensor, inputs: Any, outputs: Any, **_: Any) -> None:
    reference_tail.tail(logits, inputs, outputs)


def tokens(engine: Engine) -> dict[str, list[int | None]]:
    for one in requests():
        engine.add(one)
    found: dict[str, list[int | None]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output.token_id)
    return found


def test_every_rule_and_gate_is_fused_and_draws_what_torch_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    banned = torch.tensor([VOCAB - 1])
    model: Any = FakeModel()
    host = Engine(model, None, CONFIG, allowed_ids=range(VOCAB - 1))
    expected = tokens(host)

    def not_here(*args: object) -> None:
        raise AssertionError("torch's tail was asked")

    monkeypatch.setattr(device_runner, "run_step", not_here)
    model = FakeModel()
    runner = DeviceRunner(model, CONFIG, banned, tail=plain_tail)
    got = tokens(Engine(model, None, CONFIG, allowed_ids=range(VOCAB - 1), runner=runner))
    assert got == expected
    assert len({tuple(ids) for ids in got.values()}) > len(got) // 2


def test_the_lists_above_have_every_rule_and_gate_of_rows() -> None:
    assert {rule.split(":")[0] for rule in RULES} == set(MERGES)
    assert {gate.split(":")[0] for gate in ROW_GATES} == set(GATES) - {"schedule", "posterior"}


class TestGateTable:
    def test_a_gate_has_one_row_with_its_numbers(self) -> None:
        table = GateTable(3, torch.device("cpu"))
        first, second = TRAINED.values()
        rows = [table.row_of(gate, ()) for gate in (first, second, first)]
        assert rows == [0, 1, 0]
        for gate, row in zip((first, second), rows, strict=False):
            assert table.rows[row].equal(gate.layer.table)

    def test_a_gate_that_nobody_uses_makes_room(self) -> None:
        table = GateTable(2, torch.device("cpu"))
        gates = [learned(seed) for seed in range(4)]
        address = table.rows.data_ptr()
        assert [table.row_of(gate, {gates[1].sha256}) for gate in gates] == [0, 1, 0, 0]
        assert table.row_of(gates[1], ()) == 1
        assert table.rows[0].equal(gates[3].layer.table)
        assert table.rows.data_ptr() == address
