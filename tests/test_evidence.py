"""What the user wrote, found in prompts and their tokens, whatever a template does to it."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_model_folder, write_state

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.async_engine.evidence import last_positions, token_spans
from mrss_provider.backend import GenerateRequest, Message
from mrss_provider.chat import TEMPLATES, ChatTemplate, render_prompt, user_spans
from mrss_provider.config import EngineConfig
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
texts = st.lists(
    st.sampled_from(["\n", "\r\n", "\n\n", " ", "User:", "a", "grüße", "海 ", "\U000f0000", "."]),
    max_size=8,
).map("".join)
conversations = st.lists(st.builds(Message, st.sampled_from(ROLES), texts), min_size=1, max_size=5)
WORLD = TEMPLATES["world"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load()


def parts(prompt, spans):
    return [prompt[span.start : span.stop] for span in spans]


@pytest.mark.parametrize("name", list(TEMPLATES))
@given(messages=conversations)
def test_the_spans_are_what_the_user_wrote_and_nothing_else(name, messages):
    template = TEMPLATES[name]
    prompt = render_prompt(messages, template)
    said = [message.content.strip() for message in messages if message.role == "user"]
    alone = [render_prompt([Message("user", text)], template) for text in said if text]
    frame = {"plain": ("", "")}.get(name, ("User: ", "\n\nAssistant:"))
    written = [text[len(frame[0]) : len(text) - len(frame[1])] for text in alone]
    continued = messages[-1].role == "assistant"
    assert parts(prompt, user_spans(messages, template, prompt)) == written or continued
    assert len(user_spans(messages, template, prompt)) == len(written)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content | truncate(3, true, '', 0) }}",
        "{{ messages[0].content | length }}",
        "{{ messages[0].content[1:] }}",
        "{{ messages[0].content | reverse }}",
        "{% if messages[0].content != 'straße' %}{{ raise_exception('no') }}{% endif %}x",
        "nothing of it",
    ],
)
def test_a_template_that_works_on_the_text_gives_only_what_is_certain(source):
    template = ChatTemplate("t", source)
    messages = [Message("user", "straße")]
    prompt = render_prompt(messages, template)
    spans = user_spans(messages, template, prompt)
    assert not spans or parts(prompt, spans) == ["STRASSE"]


def test_a_template_may_say_it_twice():
    template = ChatTemplate("t", "{{ messages[0].content }}, {{ messages[0].content }}!")
    messages = [Message("user", "ho")]
    assert user_spans(messages, template, "ho, ho!") == (range(2), range(4, 6))


def test_text_that_uses_every_mark_gives_no_spans():
    every = "".join(map(chr, range(0xF0000, 0xFFFFE)))
    messages = [Message("user", every)]
    assert user_spans(messages, WORLD, render_prompt(messages, WORLD)) == ()


@given(messages=conversations)
def test_the_tokens_are_those_that_hold_a_character_of_the_spans(tokenizer, messages):
    prompt = render_prompt(messages, WORLD)
    spans = user_spans(messages, WORLD, prompt)
    token_ids = tokenizer.encode(prompt)
    wanted = {i for span in spans for i in span}
    offsets = [len(char.encode()) for char in prompt]
    char_of = [i for i, length in enumerate(offsets) for _ in range(length)]
    expected, byte = [], 0
    for position, token_id in enumerate(token_ids):
        length = len(tokenizer.token_bytes(token_id))
        if wanted.intersection(char_of[byte : byte + length]):
            expected.append(position)
        byte += length
    found = token_spans(spans, prompt, token_ids, tokenizer)
    assert [i for span in found for i in span] == expected


def test_a_vocabulary_that_writes_other_bytes_gives_none(tokenizer):
    token_ids = tokenizer.encode("Hello")
    assert token_spans([range(5)], "Hello", token_ids, tokenizer) == (range(len(token_ids)),)
    assert token_spans([range(5)], "hello", token_ids, tokenizer) == ()
    assert token_spans([], "Hello", token_ids, tokenizer) == ()


def test_the_last_positions_are_kept():
    spans = (range(10), range(20, 25))
    assert last_positions(spans, 7) == (range(8, 10), range(20, 25))
    assert last_positions(spans, 5) == (range(20, 25),)
    assert last_positions(spans, 3) == (range(22, 25),)
    assert last_positions(spans) == spans
    assert last_positions((range(1000),)) == (range(744, 1000),)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "states").mkdir()
    for seed, name in enumerate("ab"):
        write_state(folder / "states" / f"{name}.pth", seed=seed)
    return EngineConfig(
        model=write_model_folder(folder / "model"),
        states=folder / "states",
        device="cpu",
        dtype="fp32",
        threads=1,
        max_rows=8,
    )


CHAT = (
    Message("system", "Be kind."),
    Message("user", " Who keeps\n\nthe bakery? "),
    Message("assistant", "Leopold."),
    Message("user", "And the mill?"),
)
SAID = ["Who keeps\nthe bakery?", "And the mill?"]


def engine_request(config, model, **what):
    async def main():
        async with AsyncEngine(config) as engine:
            loaded, _ = await engine._parts()
            request = GenerateRequest(model, SamplingParams(max_tokens=2), **what)
            mixture = loaded.library.resolve(request.model, request.mixture)
            made = await engine._engine_request(request, loaded, mixture)
            spans = [loaded.tokenizer.decode(made.prompt[s.start : s.stop]) for s in made.evidence]
            return made, [text.strip() for text in spans]

    return asyncio.run(main())


def test_a_gate_that_reads_the_prompt_gets_what_the_user_wrote(config):
    made, heard = engine_request(config, "a+b~linear~posterior", messages=CHAT)
    assert heard == SAID
    assert made.turn == 2
    plain, _ = engine_request(config, "a+b~linear~fixed", messages=CHAT)
    assert (plain.evidence, plain.turn) == ((), 2)
    assert plain.prompt == made.prompt


def test_a_prompt_without_messages_is_all_the_users(config):
    made, heard = engine_request(config, "a+b~linear~posterior", prompt="Who keeps the mill?")
    assert (heard, made.turn) == (["Who keeps the mill?"], 1)
    made, _ = engine_request(config, "a+b~linear~posterior", prompt=tuple(range(1, 301)))
    assert made.evidence == (range(44, 300),)


def test_a_long_prompt_is_heard_at_its_end(config):
    messages = (Message("user", "mill " * 5000), Message("assistant", "no"), Message("user", "x"))
    made, heard = engine_request(config, "a+b~linear~posterior", messages=messages)
    assert sum(map(len, made.evidence)) == 256
    assert heard[-1] == "x"
    assert set("".join(heard[:-1])) <= set("mill ")
