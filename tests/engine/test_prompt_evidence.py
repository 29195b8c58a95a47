"""What each row makes of the user's words, against a plain pass over the whole prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from fake_model import VOCAB, FakeModel, fake_state, mixture, request
from mrss_kernels import reference_tail
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.config import EngineConfig
from mrss_provider.engine import model_runner, token_scorer
from mrss_provider.engine.batch import Running
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.request import EngineRequest
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.model import Model, TunedState, load_model
from mrss_provider.sampling_params import SamplingParams

A, B, C = (fake_state(name) for name in ("amber", "blue", "cyan"))
WITH_BOS = fake_state("bos", bos=True)
BANNED = VOCAB - 1
LONG = tuple(1 + (7 * i) % (VOCAB - 2) for i in range(90))


def plain_tail(logits: Tensor, inputs: object, outputs: object, **_: object) -> None:
    reference_tail.tail(logits, inputs, outputs)  # type: ignore[arg-type]


def fake_engine(model: FakeModel, *, on_device: bool, **config: int) -> Engine:
    values = {"max_rows": 24, "prefill_chunk_len": 16, "max_context_len": 999} | config
    values |= {"prefill_alone_len": values["prefill_chunk_len"]}
    config_ = EngineConfig(**values)  # type: ignore[arg-type]
    banned = torch.tensor([BANNED])
    runner = DeviceRunner(model, config_, banned, tail=plain_tail) if on_device else None  # type: ignore[arg-type]
    return Engine(model, None, config_, allowed_ids=range(BANNED), runner=runner)  # type: ignore[arg-type]


def read_all(engine: Engine, *wanted: EngineRequest) -> tuple[list[Running], dict[str, list[int]]]:
    """Run requests to their end; what the engine knew of each, and the ids of its answers."""
    for new in wanted:
        engine.add(new)
    running = [engine._scheduler._running[new.id] for new in wanted]
    answers: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            key = f"{output.request_id}/{output.index}"
            answers.setdefault(key, []).append(output.token_id or 0)
    return running, answers


def evidence_of(running: Running) -> NDArray[np.float32]:
    return np.concatenate(running.evidence)


def positions(spans: Iterable[range]) -> list[int]:
    return [position for span in spans for position in span if position > 0]


def by_hand(wanted: EngineRequest) -> NDArray[np.float32]:
    """Score with the fake model alone: every row from its first token on, for every token."""
    model = FakeModel()
    scores = []
    for position in positions(wanted.evidence):
        row = []
        for state in wanted.mixture.states:
            leading = state is not None and state.metadata.bos and wanted.prompt[0] != 0
            read = [0] * leading + list(wanted.prompt[:position])
            logits = model.logits_after(read, state)  # type: ignore[arg-type]
            logits[BANNED] = -torch.inf
            row.append(float(logits.log_softmax(-1)[wanted.prompt[position]]))
        scores.append(row)
    return np.array(scores, dtype=np.float32)


SPANS = [
    (range(90),),
    (range(5, 6),),
    (range(10, 16), range(16, 17), range(32, 60)),
    (range(1, 2), range(89, 90)),
    (range(17, 33),),
]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("chunk_len", [1, 7, 16, 200])
@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_evidence_is_what_each_row_gives_the_users_tokens(
    spans: tuple[range, ...], chunk_len: int, on_device: bool
) -> None:
    mixed = mixture(None, WITH_BOS, B, weights=[0.2, 0.4, 0.4])
    wanted = replace(request("x", LONG, mixed), evidence=spans)
    engine = fake_engine(FakeModel(), on_device=on_device, prefill_chunk_len=chunk_len)
    (running,), _ = read_all(engine, wanted)
    np.testing.assert_allclose(evidence_of(running), by_hand(wanted), atol=1e-4)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("packs_rows", [False, True])
def test_neighbours_and_further_answers_are_as_without_evidence(
    on_device: bool, packs_rows: bool
) -> None:
    """Requests of both kinds, several answers to a prompt, and prompts beside decoding rows."""
    plain = [
        request("decodes", [3], mixture(A, B), max_tokens=30, seed=2),
        request("short", [3, 1, 4], mixture(None, C, weights=[0.0, 1.0], merge="linear"), seed=3),
        request("scored", LONG, mixture(A, C), 3, seed=4),
        request("long", LONG[::-1], mixture(B), seed=5),
        request("scored too", LONG[:40], mixture(A, WITH_BOS), seed=6),
    ]
    spans = {"scored": (range(20, 60),), "scored too": (range(40),)}
    heard = [replace(r, evidence=spans.get(r.id, ())) for r in plain]
    results = []
    for wanted in (plain, heard):
        model = FakeModel()
        model.packs_rows = packs_rows
        running, answers = read_all(fake_engine(model, on_device=on_device), *wanted)
        results.append(answers)
    assert results[0] == results[1]
    for r, wanted in zip(running, heard, strict=True):
        assert bool(r.evidence) == bool(wanted.evidence)
        if r.evidence:
            np.testing.assert_allclose(evidence_of(r), by_hand(wanted), atol=1e-4)


def test_a_request_without_evidence_is_read_in_the_calls_that_it_always_was() -> None:
    model = FakeModel()
    read_all(fake_engine(model, on_device=False), request("x", LONG[:20], mixture(A, B)))
    assert model.calls[:2] == [("prefill", [16, 16]), ("prefill", [4, 4])]


def test_only_chunks_with_evidence_are_read_apart() -> None:
    model = FakeModel()
    engine = fake_engine(model, on_device=True)
    engine.add(request("decodes", [1], mixture(A), max_tokens=9))
    engine.step()
    engine.add(replace(request("x", LONG[:48], mixture(B)), evidence=(range(20, 30),)))
    calls = []
    for _ in range(3):
        model.calls.clear()
        engine.step()
        calls.append([call for call in model.calls if call[0] == "prefill"])
    # Beside decoding rows, alone, and beside them again.
    assert calls == [[("prefill", [1, 16])], [("prefill", [16])], [("prefill", [1, 16])]]


def test_tokens_without_a_vocabulary_entry_are_no_evidence() -> None:
    prompt = [1, 2, BANNED, 4, 5]
    wanted = replace(request("x", prompt, mixture(A, B)), evidence=(range(5),))
    (running,), _ = read_all(fake_engine(FakeModel(), on_device=False), wanted)
    expected = by_hand(wanted)
    np.testing.assert_allclose(evidence_of(running), expected[[0, 2, 3]], atol=1e-4)
    assert np.isneginf(expected[1]).all()


def test_an_answer_that_is_dropped_while_reading_loses_nothing() -> None:
    """The next answer takes over rows and evidence."""
    engine = fake_engine(FakeModel(), on_device=False)
    wanted = replace(request("x", LONG, mixture(A, B), 2), evidence=(range(4, 80),))
    engine.add(wanted)
    engine.step()
    running = engine._scheduler._running["x"]
    engine.abort("x", 0)
    while engine.has_work:
        engine.step()
    np.testing.assert_allclose(evidence_of(running), by_hand(wanted), atol=1e-4)
    assert engine.num_free_rows == 24


@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_real_rows_score_as_a_plain_pass_over_the_whole_prompt(
    version: int, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model.write_checkpoint(tmp_path / "tiny.pth", version)
    model = load_model(path, device="cpu", dtype="fp32", threads=1)
    states = tmp_path / "states"
    states.mkdir()
    for seed, name in enumerate("ab"):
        tiny_model.write_state(states / f"{name}.pth", seed=seed, offset=name == "b")
    library = StateLibrary(states, model.config)
    allowed = range(300)
    monkeypatch.setattr(token_scorer, "_CPU_LOGITS", piece * model.config.vocab_size)
    monkeypatch.setattr(model_runner, "_CPU_PREFILL_LEN", 40)
    config = EngineConfig(max_rows=12, prefill_chunk_len=32)
    prompt = tuple(range(3, 293, 4))
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, max_tokens=4, seed=1, ignore_eos=True, sampling_order="openai"
    )
    spans = (range(20), range(31, 34), range(60, 73))
    mixed = library.resolve("base+a+b~linear~fixed")
    wanted = EngineRequest("x", prompt, mixed, sampling, 2, evidence=spans)
    (running,), _ = read_all(Engine(model, library, config, allowed_ids=allowed), wanted)
    expected = [plain_scores(model, state, prompt, spans, allowed.stop) for state in mixed.states]
    np.testing.assert_allclose(evidence_of(running), np.stack(expected, 1), atol=2e-5, rtol=1e-5)


def test_the_posterior_picks_the_state_that_wrote_the_prompt(tmp_path: Path) -> None:
    model = load_model(
        tiny_model.write_checkpoint(tmp_path / "tiny.pth"), device="cpu", dtype="fp32", threads=1
    )
    states = tmp_path / "states"
    states.mkdir()
    for seed, name in enumerate("ab"):
        tiny_model.write_state(states / f"{name}.pth", seed=seed)
    library = StateLibrary(states, model.config)
    engine = Engine(model, library, EngineConfig(max_rows=4), allowed_ids=range(300))
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, max_tokens=60, seed=1, ignore_eos=True, sampling_order="openai"
    )
    for writer in range(2):
        wrote = EngineRequest("w", (5,), library.resolve("ab"[writer]), sampling)
        _, answers = read_all(engine, wrote)
        prompt = (5, *answers["w/0"])
        mixed = library.resolve("a+b~linear~posterior:0")
        wanted = EngineRequest("x", prompt, mixed, sampling, evidence=(range(1, len(prompt)),))
        engine.add(wanted)
        (choice,) = engine._scheduler._running["x"].choices
        while engine.has_work:
            engine.step()
        assert choice.mixture.weights[writer] > 0.9


def plain_scores(
    model: Model,
    state: TunedState | None,
    prompt: Sequence[int],
    spans: Sequence[range],
    num_allowed: int,
) -> NDArray[np.float64]:
    """Score with one row, one pass, and a log-softmax in fp64."""
    pool = model.new_pool(1)
    pool.write(0, state)
    hidden = model.prefill(
        torch.tensor(prompt), [0, len(prompt)], torch.tensor([0]), pool, all_positions=True
    )
    logits = model.head(hidden).double()
    logits[:, num_allowed:] = -torch.inf
    scores: NDArray[np.float64] = logits.log_softmax(-1).numpy()
    return np.array([scores[i - 1, prompt[i]] for i in positions(spans)])
