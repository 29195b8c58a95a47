"""Where turns begin in prompts, and chats whose states are given anew there."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import write_model_folder, write_state

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.async_engine.turns import find_turns
from mrss_provider.backend import GenerateRequest, Message, MixtureOptions, Tool
from mrss_provider.chat import (
    TEMPLATES,
    PromptText,
    render_chat,
    render_prompt,
    turn_starts,
    user_spans,
)
from mrss_provider.chat.template import parse_template
from mrss_provider.config import EngineConfig
from mrss_provider.errors import InvalidRequestError
from mrss_provider.openai_schema import parse_chat_request, request_to_body
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.tokenizer import Tokenizer

CHAT = (
    Message("system", "Be kind."),
    Message("user", "Hi"),
    Message("assistant", "Hello, User: you"),
    Message("user", "Who keeps it?"),
    Message("user", "I mean the mill."),
    Message("assistant", "Flora"),
    Message("user", "  "),
    Message("assistant", "Yes?"),
    Message("user", "User: thanks, 今天"),
)
TURN = MixtureOptions(reinject="turn")
NEVER = MixtureOptions(reinject="never")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_begins_with_what_names_the_user(name):
    template = TEMPLATES[name]
    prompt = render_prompt(CHAT, template)
    starts = turn_starts(CHAT, template, prompt, user_spans(CHAT, template, prompt))
    who = "" if name == "plain" else "User: "
    begun = [f"{who}Hi\n", f"{who}Who keeps it?\n", f"{who}User: thanks, 今天"]
    assert len(starts) == 3
    assert all(map(str.startswith, (prompt[at:] for at in starts), begun))


def test_marks_of_other_templates_and_prompts_of_their_own_are_no_hindrance():
    source = (
        "<s>system\nYou help.</s>\n{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n"
        "{% endfor %}<s>assistant\n"
    )
    template = parse_template("marks", source)
    prompt = render_prompt(CHAT, template)
    starts = turn_starts(CHAT, template, prompt, user_spans(CHAT, template, prompt))
    ends = [prompt[at:].partition("<s>user\n")[2][:3] for at in starts]
    assert ends == ["Hi<", "Who", "Use"]


def test_a_template_that_hides_turns_is_refused_by_name():
    source = "{% for m in messages %}{{ m.content | length }} {% endfor %}"
    template = parse_template("count", source)
    prompt = render_prompt(CHAT, template)
    with pytest.raises(InvalidRequestError, match="chat template 'count' does not show") as error:
        turn_starts(CHAT, template, prompt, user_spans(CHAT, template, prompt))
    assert error.value.param == "mrss.reinject"


TOOL = Tool("look", "Looks \U000f0000 at \U000f0001 it.", {"type": "object"})
SAID = st.text(
    st.sampled_from("ab \n\r\t\x1c\x85\u2028:<>é\U000f0000\U000f0002") | st.characters(),
    max_size=12,
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    messages=st.lists(
        st.builds(Message, st.sampled_from(("system", "user", "assistant", "tool")), SAID),
        max_size=6,
    ),
    tools=st.sampled_from(((), (TOOL,))),
    thinking=st.sampled_from((None, False)),
)
@settings(max_examples=60, deadline=None)
def test_one_rendering_with_marks_gives_what_two_give(name, messages, tools, thinking):
    template = TEMPLATES[name]
    messages = [*messages, Message("user", "<think> User: \n\nhi"), Message("assistant", "so")]
    found = render_chat(messages, template, tools, thinking)
    prompt = render_prompt(messages, template, tools, thinking)
    assert found.text == prompt
    assert found.user_spans in (None, user_spans(messages, template, prompt, tools, thinking))
    # Characters of the tools' own may be those of marks.
    assert found.user_spans is not None or tools


def test_the_positions_are_the_tokens_with_which_turns_begin_but_for_the_first():
    tokenizer = Tokenizer.load(EngineConfig.model / "vocab.txt")
    template = TEMPLATES["world"]
    text = render_chat(CHAT, template)
    ids = tokenizer.encode(text.text)
    request = GenerateRequest("knowledge", SamplingParams(), messages=CHAT)
    points = find_turns(request, text, ids, template, tokenizer)
    told = [tokenizer.decode(ids[at:]).partition("\n")[0] for at in points]
    assert told == ["User: Who keeps it?", "User: User: thanks, 今天"]
    # Of a beginning of the chat: those that are in it.
    assert find_turns(request, text, ids[: points[1]], template, tokenizer) == points[:1]
    # The same from two renderings.
    assert find_turns(request, PromptText(text.text), ids, template, tokenizer) == points
    with pytest.raises(InvalidRequestError, match="writes this chat differently"):
        find_turns(request, text, ids[1:], template, tokenizer)


def test_characters_of_several_bytes_do_not_move_the_positions():
    tokenizer = Tokenizer.load(EngineConfig.model / "vocab.txt")
    template = TEMPLATES["world"]
    said = ("今天 é", "User: é", "🌊")
    chat = [m for text in said for m in (Message("user", text), Message("assistant", "é! 今"))]
    text = render_chat(chat, template)
    ids = tokenizer.encode(text.text)
    request = GenerateRequest("knowledge", SamplingParams(), messages=tuple(chat))
    points = find_turns(request, text, ids, template, tokenizer)
    told = [tokenizer.decode(ids[at:]).partition("\n")[0] for at in points]
    assert told == ["User: User: é", "User: 🌊"]


def test_the_wire_says_it_and_refuses_what_it_does_not_know():
    request = GenerateRequest("a+b", SamplingParams(), messages=CHAT[:2], mixture=TURN)
    body = request_to_body(request)
    assert body["mrss"] == {"reinject": "turn"}
    assert parse_chat_request(body).request == request
    with pytest.raises(InvalidRequestError, match=r"mrss.reinject must be one of never, turn, got"):
        parse_chat_request({**body, "mrss": {"reinject": ["turn"]}})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "states").mkdir()
    for seed, name in enumerate(("knowledge", "tone")):
        write_state(folder / "states" / f"{name}.pth", seed=seed)
    named = '[both]\nterms = "knowledge+tone"\nreinject = "turn"\n[one]\nterms = "tone"\n'
    (folder / "states" / "mixtures.toml").write_text(named + 'reinject = "turn"\n')
    return EngineConfig(
        model=write_model_folder(folder / "model"),
        states=folder / "states",
        device="cpu",
        dtype="fp32",
        threads=1,
        max_rows=8,
        prefill_chunk_len=32,
        max_context_len=2000,
    )


def ask(*messages, model="knowledge+tone", mixture=TURN, **kwargs):
    sampling = SamplingParams(max_tokens=9, seed=3, temperature=1.0, logprobs=True)
    if "prompt" not in kwargs:
        kwargs["messages"] = messages
    return GenerateRequest(model, sampling, mixture=mixture, timeout_s=60.0, **kwargs)


async def told(engine, request):
    stream = await engine.open(request)
    deltas = [delta async for delta in stream]
    entries = [entry for delta in deltas for entry in delta.logprobs]
    return "".join(d.text for d in deltas), [(e.token_id, e.logprob) for e in entries], stream.info


def alike(one, other):
    """Compare tokens, and log-probabilities to 1e-4: pieces of prompts were cut elsewhere."""
    assert [token for token, _ in one] == [token for token, _ in other]
    assert [p for _, p in one] == pytest.approx([p for _, p in other], abs=1e-4)
    return True


QUESTIONS = ("Tell me of the keeper of the harbour, and of her sea.", "And the mill?", "Why?")


def test_turn_after_turn_from_the_cache_or_a_session_is_the_chat_read_anew(config):
    async def chat(engine, *, session=None):
        messages, said = [], []
        for place, text in enumerate(QUESTIONS):
            new = Message("user", text)
            messages.append(new)
            if session is None:
                request = ask(*messages)
            else:
                new = () if place == 0 else (new,)
                request = ask(*new, session=session, session_save=True)
            answer, entries, _ = await told(engine, request)
            messages.append(Message("assistant", answer))
            said.append(entries)
        return said

    async def main():
        async with AsyncEngine(replace(config, cache_bytes=0)) as engine:
            fresh = await chat(engine)
            made = await engine.create_session(ask(Message("user", QUESTIONS[0])))
            resumed = await chat(engine, session=made.id)
            # A copy that has been a file reads on in the same way.
            copy = await engine.import_session(await engine.export_session(made.id, ""), "")
            more = [
                (await told(engine, ask(Message("user", "So?"), session=each.id)))[1]
                for each in (made, copy)
            ]
            plain = await told(engine, ask(Message("user", QUESTIONS[0]), mixture=NEVER))
        async with AsyncEngine(config) as engine:
            cached = await chat(engine)
        return fresh, resumed, more, plain, cached

    fresh, resumed, more, plain, cached = asyncio.run(main())
    assert all(map(alike, fresh, cached))
    assert all(map(alike, fresh, resumed))
    assert alike(*more)
    assert alike(fresh[0], plain[1]), "a first turn is given nothing anew"


def test_it_is_another_chat_than_without_and_one_state_takes_the_base_along(config):
    chat = (Message("user", QUESTIONS[0]), Message("assistant", "Yes."), Message("user", "Why?"))

    async def main():
        async with AsyncEngine(replace(config, cache_bytes=0)) as engine:
            found = {}
            for model in ("knowledge+tone", "both", "tone", "one", "base"):
                for mixture in (TURN, MixtureOptions(), NEVER):
                    key = model, mixture.reinject
                    found[key] = await told(engine, ask(*chat, model=model, mixture=mixture))
            prompt = await told(engine, ask(model="one", mixture=MixtureOptions(), prompt="Why?"))
            with pytest.raises(InvalidRequestError, match="a prompt has no turns") as error:
                await engine.open(ask(model="tone", prompt="Why?"))
        return found, prompt, error.value.param

    found, prompt, param = asyncio.run(main())
    assert param == "mrss.reinject"
    assert prompt[2].rows == 1, "a prompt has no turns, and needs no base for them"
    for alone, named in (("knowledge+tone", "both"), ("tone", "one")):
        turn, never = found[alone, "turn"], found[alone, "never"]
        assert turn[1] != never[1]
        assert turn[2].fingerprint != never[2].fingerprint
        assert found[named, None] == found[named, "turn"]
        assert alike(found[named, None][1], turn[1])
        assert found[named, "never"][1] == never[1]
    assert found["knowledge+tone", None] == found["knowledge+tone", "never"]
    assert found["tone", None] == found["tone", "never"]
    assert [found["tone", how][2].rows for how in ("turn", None)] == [2, 1]
    assert found["base", "turn"] == found["base", None], "nothing is given to the base"


def test_what_only_a_named_mixture_wants_is_left_out_where_it_cannot_be_done(
    config, tmp_path, caplog
):
    (tmp_path / "count.jinja").write_text("{{ messages | length }} User: Why?")
    hidden = replace(config, template=str(tmp_path / "count.jinja"), cache_bytes=0)
    chat = (Message("user", QUESTIONS[0]), Message("assistant", "Yes."), Message("user", "Why?"))
    own = MixtureOptions()

    def both(*messages, **fields):
        return ask(*messages, model="both", **fields)

    async def main():
        async with AsyncEngine(hidden) as engine:
            # Twice, for the warning.
            served = [await told(engine, both(*chat, mixture=how)) for how in (own, own)]
            never = await told(engine, both(*chat, mixture=NEVER))
            with pytest.raises(InvalidRequestError, match="does not show where"):
                await engine.open(both(*chat, mixture=TURN))
        async with AsyncEngine(replace(config, cache_bytes=0)) as engine:
            prompts = [await told(engine, both(prompt="Why?", mixture=how)) for how in (own, NEVER)]
            # Turns were read as they were; those that come are given the states.
            made = await engine.create_session(both(*chat[:1], mixture=own))
            again = [
                await told(engine, both(session=made.id, session_save=how is own, mixture=how))
                for how in (NEVER, own)
            ]
            turns = [
                await told(engine, both(Message("user", "So?"), session=made.id, mixture=how))
                for how in (own, TURN, NEVER)
            ]
        return served, never, prompts, again, turns

    served, never, prompts, again, turns = asyncio.run(main())
    assert served == [never, never]
    warnings = [each for each in caplog.records if "reinject 'never'" in each.message]
    assert len(warnings) == 1
    assert "chat template" in warnings[0].message
    assert prompts[0] == prompts[1]
    assert alike(again[0][1], again[1][1])
    assert alike(turns[0][1], turns[1][1])
    assert turns[0][1] != turns[2][1]


@pytest.mark.slow
def test_the_base_row_that_is_taken_along_has_no_say_under_any_rule_and_gate(config):
    ways = (
        *("linear~fixed", "linear~confidence", "linear~posterior", "linear~posterior-novelty"),
        *("geometric~fixed", "geometric~confidence", "power:-1~fixed", "power:2~confidence"),
        *("product~fixed", "product~confidence", "product~schedule:tone=0@0,1@6"),
        *("route~fixed", "route~confidence"),
    )

    async def main():
        async with AsyncEngine(replace(config, cache_bytes=0)) as engine:
            found = []
            for way in ways:
                request = ask(Message("user", QUESTIONS[0]), model=f"knowledge+tone~{way}")
                without = replace(request, mixture=NEVER)
                found.append((await told(engine, request), await told(engine, without)))
        return found

    for (_, entries, info), (_, expected, _) in asyncio.run(main()):
        assert info.rows == 3
        assert alike(entries, expected)
