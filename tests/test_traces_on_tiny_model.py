"""Traces and given texts from a real engine on a tiny model, by every way that an answer takes."""

import asyncio

import pytest
from fakes import serving
from tiny_model import write_model_folder, write_state

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest, Message, MixtureOptions
from mrss_provider.client import Client
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.errors import ContextLengthError
from mrss_provider.sampling_params import SamplingParams

GIVEN = "hello,\n\nUser: 今天 😀 yes\n"
CHAT = (Message("user", "hi"),)
NAMES = {"base", "knowledge", "tone"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "states").mkdir()
    for seed, name in enumerate(("knowledge", "tone")):
        write_state(folder / "states" / f"{name}.pth", seed=seed)
    return EngineConfig(
        model=write_model_folder(folder / "model"),
        states=folder / "states",
        device="cpu",
        dtype="fp32",
        threads=1,
        max_rows=8,
        max_context_len=200,
    )


def ask(*, trace=True, given=None, prompt=None, model="knowledge+tone", n=1, **sampling):
    drawn = {} if given is not None else {"seed": 5, "max_tokens": 24, "ignore_eos": True}
    return GenerateRequest(
        model,
        SamplingParams(**{**drawn, **sampling}),
        prompt=prompt,
        messages=None if prompt is not None else CHAT,
        mixture=MixtureOptions(trace=trace),
        given=given,
        n=n,
        timeout_s=60.0,
    )


async def deltas_of(backend, request):
    stream = await backend.open(request)
    try:
        return [delta async for delta in stream]
    finally:
        await stream.aclose()


def run(config, *requests):
    async def main():
        async with AsyncEngine(config) as engine:
            return [await deltas_of(engine, request) for request in requests]

    return asyncio.run(main())


def text_of(deltas):
    return "".join(delta.text for delta in deltas)


def trace_of(deltas):
    return sum((delta.trace for delta in deltas), ())


def test_a_traced_answer_is_the_answer_and_each_token_has_its_states(config):
    plain, traced = run(config, ask(trace=False), ask())
    assert text_of(traced) == text_of(plain)
    assert not trace_of(plain)
    trace = trace_of(traced)
    assert len(trace) == traced[-1].usage.completion_tokens == 24
    assert all(set(token.weights) == set(token.would_say) == NAMES for token in trace)
    assert (
        b"".join(token.token for token in trace)
        .decode(errors="replace")
        .endswith(text_of(traced)[-3:])
    )


def test_the_summary_comes_with_the_finish_of_each_answer(config):
    (deltas,) = run(config, ask(n=2))
    told = [delta for delta in deltas if delta.trace_summary]
    assert sorted(delta.index for delta in told) == [0, 1]
    for delta in told:
        assert delta.finish_reason is not None
        shares = delta.trace_summary.spoken_share
        assert set(shares) == {*NAMES, "agreed"}
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)


def test_a_trace_arrives_over_http_as_it_left(config, tmp_path):
    request = ask()
    (here,) = run(config, request)
    server = ServerConfig(socket=tmp_path / "s")
    with serving(AsyncEngine(config), server):
        there = asyncio.run(deltas_of(Client(f"unix://{server.socket}"), request))
    assert trace_of(there) == trace_of(here)
    assert [d.trace_summary for d in there if d.trace_summary] == [
        d.trace_summary for d in here if d.trace_summary
    ]


def test_a_stop_string_leaves_the_trace_of_every_token_that_was_drawn(config):
    (whole,) = run(config, ask())
    stop = text_of(whole)[5:8]
    (cut,) = run(config, ask(stop=(stop,), logprobs=True))
    assert len(trace_of(cut)) == cut[-1].usage.completion_tokens
    logprobs = sum((delta.logprobs for delta in cut), ())
    assert [token.token_id for token in trace_of(cut)] == [token.token_id for token in logprobs]


@pytest.mark.parametrize("prompt", [None, "Once"])
def test_a_given_text_is_the_answer_to_the_character(config, prompt):
    """Also where it has stop strings, and characters of several tokens."""
    (deltas,) = run(config, ask(given=GIVEN, prompt=prompt, logprobs=True))
    assert text_of(deltas) == GIVEN
    count = deltas[-1].usage.completion_tokens
    assert len(trace_of(deltas)) == count == sum(len(delta.logprobs) for delta in deltas)
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    told = b"".join(token.token for token in trace_of(deltas)).decode()
    # In a chat the blank before an answer is read too.
    assert told == (" " if prompt is None else "") + GIVEN


def test_a_given_text_that_begins_with_a_blank_keeps_it(config):
    (deltas,) = run(config, ask(given="  yes"))
    assert text_of(deltas) == "  yes"


def test_a_given_text_does_not_depend_on_seed_or_temperature(config):
    first, second = run(
        config,
        ask(given="yes", seed=1, temperature=0.0),
        ask(given="yes", seed=2, temperature=2.0, top_p=0.1),
    )
    assert trace_of(first) == trace_of(second)


def test_a_single_state_speaks_alone(config):
    (deltas,) = run(config, ask(model="tone"))
    assert {token.who for token in trace_of(deltas)} == {"tone"}
    assert all(token.agreed for token in trace_of(deltas))
    assert deltas[-2].trace_summary.spoken_share == {"tone": 0.0, "agreed": 1.0}


def test_a_given_text_counts_against_the_context(config):
    with pytest.raises(ContextLengthError, match="200 tokens"):
        run(config, ask(given="x" * 300))
