"""The engine on a toy model whose every number can be computed without it."""

from dataclasses import replace

import pytest
import torch
from fake_model import VOCAB, FakeModel, FakeState, fake_state, mixture, request

from mrss_provider.config import EngineConfig
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.logits_processors import Bias, Occurrences
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.engine.tail import Pick, pick_tokens
from mrss_provider.errors import (
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
)

A, B, C = (fake_state(name) for name in ("amber", "blue", "cyan"))
WITH_BOS = fake_state("bos", bos=True)
BANNED = torch.tensor([VOCAB - 1])

PLAIN = mixture(None)
ONE = mixture(A)
LINEAR = mixture(A, B, weights=[0.3, 0.7])
DELTA = mixture(None, A, B, C, weights=[0, 1, 1, 0.5], merge="delta", gate="novelty", cut=0.1)


def make_engine(model: FakeModel | None = None, **config: int) -> Engine:
    values = {"max_rows": 16, "prefill_chunk_len": 16, "max_context_len": 1000} | config
    return Engine(
        model or FakeModel(),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        EngineConfig(**values),  # type: ignore[arg-type]
        allowed_ids=range(VOCAB - 1),
    )


def run(engine: Engine, max_steps: int = 500) -> dict[tuple[str, int], list[TokenOutput]]:
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
    raise AssertionError("the engine does not come to an end")


def ids(outputs: list[TokenOutput]) -> list[int | None]:
    return [output.token_id for output in outputs]


def expected_ids(wanted: EngineRequest, choice: int = 0) -> list[int]:
    """Decode by hand: every row from its first token on, for every token anew."""
    model = FakeModel()
    sampling = wanted.sampling
    seen = Occurrences(wanted.prompt, sampling) if sampling.has_penalties else None
    answer: list[int] = []
    states: tuple[FakeState | None, ...] = wanted.mixture.states  # type: ignore[assignment]
    for position in range(sampling.max_tokens or 0):
        rows = []
        for state in states:
            leading = state is not None and state.metadata.bos and wanted.prompt[0] != 0
            rows.append(model.logits_after([0] * leading + list(wanted.prompt) + answer, state))
        picked = pick_tokens(
            torch.stack(rows),
            [
                Pick(
                    range(len(rows)),
                    wanted.mixture,
                    sampling,
                    Bias(sampling),
                    seen,
                    choice,
                    position,
                )
            ],
            BANNED,
        )
        assert picked[0].token_id is not None
        answer.append(picked[0].token_id)
        if answer[-1] == 0 and not sampling.ignore_eos:
            break
        if seen is not None:
            seen.push(answer[-1])
    return answer


REQUESTS = [
    request("plain", [3, 1, 4], PLAIN, seed=1),
    request("one", [1, 5], ONE, seed=2, temperature=0.7),
    request("linear", [9, 2, 6, 5], LINEAR, seed=3, top_p=0.8),
    request("delta", [3, 5, 8, 9], DELTA, seed=4, top_k=12),
    request("long", [7] * 70 + [2], LINEAR, seed=5),
    request("penalties", [4, 4, 2], ONE, seed=6, frequency_penalty=1.5, penalty_decay=0.9),
    request("repetition", [4, 4, 2], DELTA, seed=7, repetition_penalty=1.7, presence_penalty=1.0),
    request("greedy", [11], LINEAR, seed=8, temperature=0.0),
    request("rwkv", [12], ONE, seed=9, top_p=0.6, sampling_order="rwkv", temperature=1.4),
    request("bias", [13], ONE, seed=10, logit_bias={5: 4.0, 6: -100, 7: -100.0}),
    request("bos", [2, 3], mixture(WITH_BOS, B), seed=11),
    request("stops", [2, 3], ONE, seed=12, ignore_eos=False, max_tokens=60),
]


@pytest.mark.parametrize("wanted", REQUESTS, ids=lambda wanted: wanted.id)
def test_a_request_equals_decoding_by_hand(wanted: EngineRequest) -> None:
    engine = make_engine()
    engine.add(wanted)
    assert ids(run(engine)[wanted.id, 0]) == expected_ids(wanted)
    assert engine.num_free_rows == 16


@pytest.mark.parametrize("max_rows", [4, 16, 64])
@pytest.mark.parametrize("every", [0, 1, 3])
def test_same_seed_same_ids_whatever_shares_the_batch(max_rows: int, every: int) -> None:
    """All requests at once, or joining every few steps, with many slots or few."""
    engine = make_engine(max_rows=max_rows)
    waiting = list(REQUESTS)
    outputs: dict[str, list[int | None]] = {}
    for step in range(500):
        while waiting and (every == 0 or step % every == 0):
            engine.add(waiting.pop(0))
            if every:
                break
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output.token_id)
        if not engine.has_work and not waiting:
            break
    assert outputs == {wanted.id: expected_ids(wanted) for wanted in REQUESTS}


def test_each_answer_of_n_is_its_own_and_the_prompt_is_read_once() -> None:
    model = FakeModel()
    engine = make_engine(model)
    wanted = request("n", [7] * 20, DELTA, n=3, seed=3, frequency_penalty=0.5)
    engine.add(wanted)
    assert engine.num_free_rows == 16 - 12
    outputs = run(engine)
    for choice in range(3):
        assert ids(outputs["n", choice]) == expected_ids(wanted, choice)
    assert len({tuple(ids(outputs["n", choice])) for choice in range(3)}) == 3
    assert [call for call in model.calls if call[0] == "prefill"] == [
        ("prefill", [16] * 4),
        ("prefill", [4] * 4),
    ]


def test_finish_reasons() -> None:
    engine = make_engine()
    engine.add(request("length", [1], ONE, max_tokens=3))
    engine.add(request("stop", [1], ONE, ignore_eos=False, logit_bias={0: 100.0}))
    engine.add(request("goes on", [1], ONE, max_tokens=2, logit_bias={0: 100.0}))
    outputs = run(engine)
    assert [o.finish_reason for o in outputs["length", 0]] == [None, None, "length"]
    assert [(o.token_id, o.finish_reason) for o in outputs["stop", 0]] == [(0, "stop")]
    assert [(o.token_id, o.finish_reason) for o in outputs["goes on", 0]] == [
        (0, None),
        (0, "length"),
    ]


def test_an_empty_prompt_is_the_token_that_begins_a_text() -> None:
    empty = request("empty", [], LINEAR)
    assert empty.prompt == (0,)
    engine = make_engine()
    engine.add(empty)
    assert ids(run(engine)["empty", 0]) == expected_ids(request("zero", [0], LINEAR))


def test_a_row_tuned_with_a_leading_token_0_reads_it_alone() -> None:
    model = FakeModel()
    engine = make_engine(model)
    engine.add(request("bos", [5, 6], mixture(A, WITH_BOS, B), max_tokens=1))
    run(engine)
    # One extra token in the slot of the middle row, then the prompt in all three.
    assert model.calls == [("decode", [1]), ("prefill", [2, 2, 2])]
    engine.add(request("has it", [0, 6], mixture(A, WITH_BOS, B), max_tokens=1))
    run(engine)
    assert model.calls[2:] == [("prefill", [2, 2, 2])]


def test_decoding_rows_go_on_while_a_long_prompt_is_read() -> None:
    model = FakeModel()
    engine = make_engine(model)
    engine.add(request("short", [1, 2], LINEAR, max_tokens=40))
    engine.step()
    engine.add(request("long", [3] * 100, DELTA))
    model.calls.clear()
    for _ in range(7):
        outputs = engine.step()
        assert "short" in {output.request_id for output in outputs}
    prefills = [lengths for what, lengths in model.calls if what == "prefill"]
    assert prefills == [[16] * 4] * 6 + [[4] * 4]
    # Between two decode steps at most one chunk a row.
    assert [what for what, _ in model.calls] == ["decode", "prefill"] * 7


def test_rows_of_one_request_are_decoded_as_one_run_of_slots() -> None:
    model = FakeModel()
    engine = make_engine(model)
    engine.add(request("a", [1], LINEAR, n=2))
    run(engine)
    decodes = [slots for what, slots in model.calls if what == "decode"]
    assert decodes == [[0, 1, 2, 3]] * 7


def test_rows_are_decoded_in_the_order_of_their_slots() -> None:
    model = FakeModel()
    engine = make_engine(model, max_rows=4)
    engine.add(request("leaves", [1], LINEAR))
    engine.add(request("stays", [1], ONE, seed=2))
    engine.step()
    engine.abort("leaves")
    late = request("late", [1], LINEAR, seed=3)
    engine.add(late)
    outputs = run(engine)
    assert ("decode", [0, 1, 2]) in model.calls
    assert ids(outputs["late", 0]) == expected_ids(late)
    assert ids(outputs["stays", 0]) == expected_ids(request("x", [1], ONE, seed=2))[1:]


def test_abort_frees_the_slots_for_the_next_step() -> None:
    engine = make_engine(max_rows=4)
    engine.add(request("runs", [1], DELTA, max_tokens=50))
    engine.add(request("waits", [1], DELTA, max_tokens=2))
    engine.step()
    assert engine.num_free_rows == 0
    engine.abort("runs")
    assert {output.request_id for output in engine.step()} == {"waits"}
    engine.abort("waits")
    assert not engine.has_work
    assert engine.num_free_rows == 4
    engine.abort("waits")
    engine.abort("never was")


def test_abort_of_a_waiting_request() -> None:
    engine = make_engine(max_rows=4)
    for name in "abc":
        engine.add(request(name, [1], DELTA, max_tokens=2))
    engine.abort("b")
    assert {name for name, _ in run(engine)} == {"a", "c"}


@pytest.mark.parametrize("when", ["reading", "decoding"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_abort_of_one_answer_leaves_the_others(when: str, index: int) -> None:
    engine = make_engine()
    wanted = request("n", [7] * 40, LINEAR, n=3, seed=3)
    engine.add(wanted)
    for _ in range(1 if when == "reading" else 4):
        before = {(o.request_id, o.index): o.token_id for o in engine.step()}
    engine.abort("n", index)
    assert engine.num_free_rows == 16 - 4
    outputs = run(engine)
    assert set(outputs) == {("n", i) for i in range(3) if i != index}
    for choice in {0, 1, 2} - {index}:
        rest = ids(outputs["n", choice])
        assert rest == expected_ids(wanted, choice)[-len(rest) :]
        assert len(rest) == (8 if when == "reading" else 6)
    assert bool(before) == (when == "decoding")
    assert engine.num_free_rows == 16


def test_a_slot_used_again_starts_from_its_new_state() -> None:
    engine = make_engine(max_rows=4)
    for wanted in [request(f"{i}", [i], DELTA, seed=i) for i in range(4)]:
        engine.add(wanted)
        assert ids(run(engine)[wanted.id, 0]) == expected_ids(wanted)


def test_numbers_that_are_not_finite_end_their_request_alone() -> None:
    model = FakeModel()
    model.poison = 17
    engine = make_engine(model)
    good = request("good", [1, 2], DELTA, max_tokens=4, logit_bias={17: -100})
    engine.add(good)
    engine.add(request("bad", [1, 17], LINEAR, n=2))
    outputs = run(engine)
    assert ids(outputs["good", 0]) == expected_ids(good)
    for index in (0, 1):
        (output,) = outputs["bad", index]
        assert output.token_id is None
        assert isinstance(output.error, EngineError)
        assert "not finite after 0 tokens" in str(output.error)
    # The slots serve the next request as if nothing had been.
    model.poison = None
    again = request("again", [1, 17], LINEAR)
    engine.add(again)
    assert ids(run(engine)["again", 0]) == expected_ids(again)


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = FakeModel()
    engine = make_engine(model, max_rows=4)
    engine.add(request("first", [1], LINEAR, n=2))
    engine.add(request("waits", [1], LINEAR))
    engine.step()
    model.fail = RuntimeError("out of memory")
    outputs = engine.step()
    assert [(o.request_id, o.index, o.token_id) for o in outputs] == [
        ("first", 0, None),
        ("first", 1, None),
    ]
    for output in outputs:
        assert isinstance(output.error, EngineError)
        assert "RuntimeError: out of memory" in str(output.error)
    assert "a step failed" in caplog.text
    waits = request("waits", [1], LINEAR)
    assert ids(run(engine)["waits", 0]) == expected_ids(waits)
    assert engine.num_free_rows == 4


def test_what_can_never_run_is_refused_at_once() -> None:
    engine = make_engine(max_rows=4, max_context_len=20)
    cases = [
        (request("x", [1] * 13, ONE), ContextLengthError, "fit in 20 tokens, got 13 of prompt and"),
        (request("x", [1], DELTA, n=2), InvalidRequestError, r"at most 4 rows \(max_rows\), got 8"),
        (request("x", [VOCAB], ONE), InvalidRequestError, r"token ids in \[0, 40\), got 40"),
        (request("x", [-1], ONE), InvalidRequestError, r"token ids in \[0, 40\), got -1"),
        (request("x", [1, 2**32], ONE), InvalidRequestError, r"\[0, 40\), got 4294967296"),
        (request("x", [1, 2**70], ONE), InvalidRequestError, r"\[0, 40\), got 1180591620717411"),
        (request("x", [1, 2.0], ONE), InvalidRequestError, r"integers as token ids in .* got 2\.0"),
        (request("x", [2, True], ONE), InvalidRequestError, "integers as token ids in .* got True"),
        (
            replace(request("x", [1], ONE, max_tokens=1), forced=(2.0,)),
            InvalidRequestError,
            r"mrss.given must have integers as token ids in .* got 2\.0",
        ),
        (request("x", [2, None], ONE), InvalidRequestError, "integers as token ids in .* got None"),
        (
            request("x", [1], ONE, logit_bias={VOCAB: 1.0}),
            InvalidRequestError,
            r"logit_bias must have token ids in \[0, 40\), got 40",
        ),
        (
            request("x", [1], ONE, logit_bias=dict.fromkeys(range(VOCAB - 1), -100)),
            InvalidRequestError,
            "must leave a token",
        ),
    ]
    for bad, error, message in cases:
        with pytest.raises(error, match=message):
            engine.add(bad)
    assert not engine.has_work
    engine.add(request("x", [1] * 12, ONE))


def test_a_full_queue_refuses() -> None:
    engine = make_engine(max_rows=4, max_queued=1)
    engine.add(request("runs", [1], DELTA))
    engine.add(request("waits", [1], ONE))
    with pytest.raises(QueueFullError) as caught:
        engine.add(request("too many", [1], ONE))
    assert caught.value.status_code == 429
    assert {name for name, _ in run(engine)} == {"runs", "waits"}


def test_stats_count_tokens_once_however_many_rows_read_them() -> None:
    engine = make_engine(max_rows=8)
    engine.add(request("a", [1] * 30, DELTA, max_tokens=3))
    engine.add(request("b", [1], DELTA, n=2))
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 1)
    assert (engine.stats().num_rows, engine.stats().num_free_rows) == (4, 4)
    run(engine)
    stats = engine.stats()
    assert stats.num_prompt_tokens == 31
    assert stats.num_sampled_tokens == 3 + 16
    assert (stats.num_running, stats.num_waiting, stats.num_rows) == (0, 0, 0)


def test_a_step_without_work_does_nothing() -> None:
    assert make_engine().step() == []
