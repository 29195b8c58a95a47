"""What is wanted of prompts while they are read: scores of their tokens, and vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_model import VOCAB, FakeModel, fake_state, mixture, request
from mrss_kernels import reference_tail

from mrss_provider.config import EngineConfig
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.prompt_reader import likeliest
from mrss_provider.engine.request import (
    EngineRequest,
    Pooling,
    PromptReading,
    ResolvedMixture,
    TokenOutput,
)
from mrss_provider.engine.sampler import top_tokens
from mrss_provider.errors import ContextLengthError, EngineError, InvalidRequestError

A, B, C = (fake_state(name) for name in ("amber", "blue", "cyan"))
PLAIN = mixture(None)
LINEAR = mixture(A, B, weights=[0.3, 0.7])
PROMPT = tuple([3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9, 7, 9, 3, 2, 3, 8, 4] * 3)
MIXTURES = [
    PLAIN,
    mixture(A),
    LINEAR,
    mixture(A, C, weights=[0.5, 0.5], merge="geometric"),
    mixture(A, C, weights=[0.5, 0.5], merge="power:0.5", gate="confidence"),
    mixture(None, A, B, weights=[0, 1, 0.5], merge="delta", gate="novelty", cut=0.1),
    mixture(None, A, B, weights=[0, 1, 0.5], merge="contrast"),
    mixture(A, B, weights=[0.6, 0.4], merge="route", gate="posterior"),
    mixture(A, B, weights=[0.6, 0.4], gate="posterior:0.1,true"),
    mixture(A, B, weights=[0.6, 0.4], gate="schedule:amber=0@4,1@30"),
    mixture(A, B, weights=[0.6, 0.4], gate="schedule:amber=0.2@0,1@3,turns"),
]


def make_engine(
    model: FakeModel | None = None, *, is_device: bool = False, **config: int
) -> Engine:
    values = {"max_rows": 16, "prefill_chunk_len": 16, "prefill_alone_len": 16} | config
    settings = EngineConfig(lazy_rows="off", max_context_len=1000, **values)  # type: ignore[arg-type]
    model = model or FakeModel()
    runner = None
    if is_device:
        banned = torch.tensor([VOCAB - 1])
        runner = DeviceRunner(model, settings, banned, tail=plain_tail)  # type: ignore[arg-type]
    allowed = range(VOCAB - 1)
    return Engine(model, None, settings, allowed_ids=allowed, runner=runner)  # type: ignore[arg-type]


def plain_tail(logits: torch.Tensor, inputs: object, outputs: object, **_: object) -> None:
    reference_tail.tail(logits, inputs, outputs)  # type: ignore[arg-type]


def run(engine: Engine, *wanted: EngineRequest) -> dict[tuple[str, int], list[TokenOutput]]:
    for each in wanted:
        engine.add(each)
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    for _ in range(400):
        if not engine.has_work:
            assert engine.num_free_rows == 16
            return outputs
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
    raise AssertionError("the engine does not come to an end")


def reading_of(outputs: list[TokenOutput]) -> PromptReading:
    told = [output.reading for output in outputs if output.reading is not None]
    assert outputs[0].reading is not None
    assert len(told) == 1
    return told[0]


def scored(
    name: str,
    mixed: ResolvedMixture = LINEAR,
    prompt: tuple[int, ...] = PROMPT,
    n: int = 1,
    **sampling: object,
) -> EngineRequest:
    wanted = request(name, prompt, mixed, n, **({"max_tokens": 0} | sampling))
    return replace(wanted, score_prompt=3)


def pooled(
    name: str, prompt: tuple[int, ...] = PROMPT, mixed: ResolvedMixture = PLAIN, **pooling: object
) -> EngineRequest:
    wanted = request(name, prompt, mixed, max_tokens=0)
    return replace(wanted, pooling=Pooling(**pooling))  # type: ignore[arg-type]


def cases() -> list[Any]:
    """Return each mixture for both runners; the device's has a path of its own for three kinds."""
    found = []
    for i, mixed in enumerate(MIXTURES):
        for is_device in (False, True):
            marks = [pytest.mark.slow] if is_device and i not in (2, 5, 8) else []
            name = f"{mixed.merge.text}~{mixed.gate.text}-{'device' if is_device else 'host'}"
            found.append(pytest.param(mixed, is_device, marks=marks, id=f"{i}-{name}"))
    return found


@pytest.mark.parametrize(("mixed", "is_device"), cases())
def test_a_prompt_is_scored_as_an_answer_that_is_given(
    mixed: ResolvedMixture, is_device: bool
) -> None:
    given = request("given", PROMPT[:1], mixed, logprobs=True, top_logprobs=3, max_tokens=56)
    (answer,) = run(make_engine(), replace(given, forced=PROMPT[1:])).values()
    (output,) = run(make_engine(is_device=is_device), scored("s", mixed))["s", 0]
    scores = reading_of([output]).scores
    assert (output.token_id, output.finish_reason) == (None, "length")
    assert tuple(score.token_id for score in scores) == PROMPT[1:]
    for score, token in zip(scores, answer, strict=True):
        assert token.logprob is not None
        assert score.logprob == pytest.approx(token.logprob, abs=2e-5)
        assert [i for i, _ in score.top] == [i for i, _ in token.top]


@pytest.mark.parametrize(
    "mixed", [LINEAR, MIXTURES[7], MIXTURES[8]], ids=["fixed", "prompt", "own"]
)
def test_scoring_a_prompt_changes_no_token_of_the_answer(mixed: ResolvedMixture) -> None:
    plain = request("p", PROMPT, mixed, n=2, max_tokens=6, logprobs=True)
    plain = replace(plain, evidence=(range(5, 40),))
    expected = run(make_engine(), plain)
    got = run(make_engine(), replace(plain, score_prompt=0), scored("other", DELTA))
    for key, outputs in expected.items():
        assert [o.token_id for o in got[key]] == [o.token_id for o in outputs]
        assert [o.logprob for o in got[key]] == pytest.approx([o.logprob for o in outputs])
        assert len(reading_of(got[key]).scores) == len(PROMPT) - 1


DELTA = MIXTURES[5]


def test_a_request_for_no_token_ends_with_its_prompt_and_draws_none() -> None:
    engine = make_engine()
    outputs = run(engine, scored("s", n=3))
    assert {key: len(own) for key, own in outputs.items()} == {("s", i): 1 for i in range(3)}
    stats = engine.stats()
    assert (stats.num_sampled_tokens, stats.num_prompt_tokens) == (0, len(PROMPT))


def test_a_token_that_cannot_come_is_scored_as_that() -> None:
    (output,) = run(make_engine(), scored("s", prompt=(5, VOCAB - 1, 7)))["s", 0]
    first, second = reading_of([output]).scores
    assert first.logprob == -torch.inf
    assert second.logprob > -torch.inf


def test_the_best_few_of_many_rows_are_those_of_each_row_alone() -> None:
    """The oracle is `top_tokens`; equals stand at the edge."""
    log_probs = torch.randn(30, 40, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    log_probs[3, 2:] = -torch.inf
    assert likeliest(log_probs, 5) == [top_tokens(row, 5) for row in log_probs]
    assert likeliest(log_probs, 0) == [()] * 30


def hidden_states(prompt: tuple[int, ...], first: torch.Tensor) -> torch.Tensor:
    """Read by hand: `h = tanh(A h + E[token])`."""
    model, states = FakeModel(), []
    hidden = first
    for token in prompt:
        hidden = torch.tanh((model.transition * hidden).sum(1) + model.embedding[token])
        states.append(hidden)
    return torch.stack(states).double()


@pytest.mark.parametrize("is_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("chunk_len", [7, 16, 200])
def test_a_vector_is_the_mean_or_the_last_hidden_state_of_length_1(
    chunk_len: int, is_device: bool
) -> None:
    engine = make_engine(prefill_alone_len=chunk_len, is_device=is_device)
    outputs = run(
        engine,
        pooled("mean"),
        pooled("last", is_mean=False),
        pooled("state", mixed=mixture(A)),
        pooled("short", num_dimensions=5),
        pooled("one", PROMPT[:1]),
        request("decoding", [1, 2], LINEAR, max_tokens=9),
    )
    base, tuned = hidden_states(PROMPT, torch.zeros(12)), hidden_states(PROMPT, A.vector)
    expected = {
        "mean": base.mean(0),
        "last": base[-1],
        "state": tuned.mean(0),
        "short": base.mean(0)[:5],
        "one": base[0],
    }
    for name, vector in expected.items():
        found = reading_of(outputs[name, 0]).vector
        assert found is not None
        assert torch.from_numpy(found).double().allclose(vector / vector.norm(), atol=1e-6), name
    assert len(outputs["decoding", 0]) == 9


def test_answers_go_on_in_every_step_while_a_long_text_is_embedded() -> None:
    engine = make_engine()
    engine.add(request("decoding", [1], LINEAR, max_tokens=30))
    engine.step()
    engine.add(pooled("long", PROMPT * 5))
    for _ in range(15):
        assert [o.request_id for o in engine.step()] == ["decoding"]


def test_numbers_that_are_not_finite_end_their_request_alone() -> None:
    model = FakeModel()
    model.poison = 35
    outputs = run(
        make_engine(model),
        scored("s"),
        pooled("p"),
        scored("a", max_tokens=2),
        pooled("fine", (1,)),
    )
    for name in "spa":
        (output,) = outputs[name, 0]
        assert isinstance(output.error, EngineError)
        assert "not finite" in str(output.error)
    assert outputs["fine", 0][0].error is None


def test_a_step_without_memory_lets_the_older_begin_again() -> None:
    model = FakeModel()
    engine = make_engine(model)
    older, newer = scored("older"), pooled("newer")
    engine.add(older)
    engine.add(newer)
    engine.step()
    model.fail = torch.OutOfMemoryError("none")
    outputs = run(engine)
    assert [o.error is None for o in outputs["newer", 0]] == [False]
    again = reading_of(outputs["older", 0]).scores
    assert again == reading_of(run(make_engine(), older)["older", 0]).scores


def test_an_aborted_reading_says_nothing_and_frees_its_row() -> None:
    engine = make_engine()
    engine.add(pooled("gone", PROMPT * 3))
    engine.step()
    engine.abort("gone")
    assert run(engine) == {}


def test_what_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"dimensions must be .*\[1, 12\].*got 13"
    ) as caught:
        make_engine().check(pooled("p", num_dimensions=13))
    assert caught.value.param == "dimensions"
    with pytest.raises(ContextLengthError):
        make_engine().check(pooled("p", PROMPT * 20))
