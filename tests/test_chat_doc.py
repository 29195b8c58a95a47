"""docs/chat.md: its header is read, its table names the templates, its request is answered."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from script_engine import collect

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import Message
from mrss_provider.chat import TEMPLATES, load_template, render_prompt
from mrss_provider.config import EngineConfig
from mrss_provider.openai_schema import Answer, parse_chat_request

TEXT = (Path(__file__).parents[1] / "docs/chat.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_table_names_each_template_and_what_ends_its_answers():
    rows = re.findall(
        r"^\| `(\S+)` \| .* \| (.*) \| (.*)\|$", TEXT.partition("The end-of")[0], re.M
    )
    assert [name for name, _, _ in rows] == list(TEMPLATES)
    for name, stop, thought in rows:
        template = TEMPLATES[name]
        shown = [text.encode().decode("unicode_escape") for text in re.findall("`(.*?)`", stop)]
        assert shown == list(template.stop)
        assert (template.thought is None) == (not thought.strip())
        if template.thought:
            assert template.thought[0] in thought


def test_the_header_of_the_example_is_one(tmp_path):
    (source,) = blocks("jinja")
    (tmp_path / "mine.jinja").write_text(source)
    template = load_template("mine.jinja", tmp_path)
    assert template.thought == ("<think>", "</think>")
    prompt = render_prompt([Message("user", "hi <think>")], template, (), True)
    assert prompt == "<user>hi < think><end><assistant><think"


@pytest.mark.slow
def test_the_request_is_answered_by_such_a_message():
    body, shown = map(json.loads, blocks("json"))
    request = parse_chat_request(body).request

    async def main():
        async with AsyncEngine(EngineConfig()) as engine:
            return await collect(engine, request)

    answer = Answer()
    for delta in asyncio.run(main()):
        answer.add(delta)
    (choice,) = answer.ordered()
    assert choice.finish_reason == "tool_calls"
    assert choice.message.keys() == shown.keys()
    assert choice.message["content"] is None
    for message in (choice.message, shown):
        (call,) = message["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert call["function"]["name"] == "open_door"
        assert arguments["door"] in ("dairy", "mill")
        assert type(arguments["wide"]) is bool
