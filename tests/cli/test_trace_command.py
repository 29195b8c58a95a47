"""`mrss trace` and `mrss chat --trace`: the page, the colours, and what is never HTML."""

import asyncio
import errno
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import mrss
from fakes import SUMMARY, FakeBackend, Script, token_trace, traced

from mrss_provider.backend import Delta, GenerateRequest, Message, MixtureOptions, TokenTrace
from mrss_provider.cli.chat import Conversation, chat
from mrss_provider.cli.output import CommandError
from mrss_provider.cli.spoken import Painter
from mrss_provider.cli.trace import trace
from mrss_provider.cli.trace_page import trace_page
from mrss_provider.sampling_params import SamplingParams

EVIL = "</script><script>alert('x')</script>\"&<b>"
REQUEST = GenerateRequest(
    "knowledge+tone",
    SamplingParams(),
    messages=(Message("user", "Hi <i>"),),
    mixture=MixtureOptions(trace=True),
)


def ended(*deltas: Delta) -> Script:
    """Return a script that ends as a traced answer does."""
    return [*deltas[:-1], replace(deltas[-1], finish_reason="stop", trace_summary=SUMMARY)]


ANSWER = ended(
    traced("Arr", "tone"), traced(",", disagreement=0.01), traced(" Bridge", "knowledge")
)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as running:
        yield running


class Page(HTMLParser):
    """What a browser makes of a page: its elements, the text of tokens, and the data."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[tuple[dict[str, str | None], str]] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._open.append(tag)
        if "token" in (dict(attrs).get("class") or "").split():
            self.tokens.append((dict(attrs), ""))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif self._open and self._open[-1] == "span" and self.tokens:
            attributes, text = self.tokens[-1]
            self.tokens[-1] = (attributes, text + data)


def page_of(*tokens: TokenTrace, prompt: str = "Hi", mixture: str = "knowledge+tone") -> Page:
    return Page(trace_page(mixture, prompt, tokens, SUMMARY, is_given=False))


def test_page_has_a_span_for_each_token_in_the_hue_of_who_spoke() -> None:
    page = page_of(token_trace(b"Arr"), token_trace(b" it", "knowledge"), token_trace(b"!", "base"))
    (arr, _), (it, _), (end, _) = page.tokens
    assert [text for _, text in page.tokens] == ["Arr", " it", "!"]
    hues = [re.search(r"--hue:(\d+)", a["style"] or "") for a in (arr, it)]
    assert len({hue[1] for hue in hues if hue}) == 2
    assert "base" in (end["class"] or "")


def test_page_is_grey_where_all_agree_and_fuller_where_they_differ() -> None:
    page = page_of(*(token_trace(b"x", disagreement=d) for d in (0.01, 0.1, 0.6)))
    fullness = [re.search(r"--d:([0-9.]+)", a["style"] or "") for a, _ in page.tokens]
    grey, some, full = (float(found[1]) for found in fullness if found)
    assert grey == 0 < some < full <= 1


def test_strip_stacks_the_weights_to_the_whole_height() -> None:
    (style,) = [a["style"] or "" for a, _ in page_of(token_trace(b"x")).tokens]
    assert "0% 20%" in style
    assert "20% 100%" in style


def test_text_of_a_model_is_never_html() -> None:
    evil = EVIL.encode()
    token = replace(token_trace(evil), would_say=dict.fromkeys(("base", "knowledge", "tone"), evil))
    plain = page_of(token_trace(b"x"))
    page = page_of(token, prompt=EVIL, mixture=EVIL)
    assert page.tags == plain.tags
    assert [text for _, text in page.tokens] == [EVIL]
    data = json.loads(page.scripts[0])
    assert data["tokens"][0]["token"] == EVIL
    assert data["tokens"][0]["would_say"]["tone"] == EVIL


def test_page_loads_nothing_and_forbids_itself_to() -> None:
    page = page_of(token_trace(b"https://example.org"))
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "data"}
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    policy = [value for name, value in page.attributes if name == "content" and value]
    assert any(value.startswith("default-src 'none'") for value in policy)


def test_page_can_be_walked_with_the_keyboard() -> None:
    page = page_of(*(token_trace(b"x") for _ in range(3)))
    assert [a["tabindex"] for a, _ in page.tokens] == ["0", "-1", "-1"]
    assert "ArrowRight" in page.scripts[1]


def test_newlines_and_parts_of_characters_are_shown() -> None:
    half, rest = "今".encode()[:1], "今".encode()[1:]
    page = page_of(token_trace(b".\n\n"), token_trace(half), token_trace(rest))
    assert [text for _, text in page.tokens] == [".↵↵", "·", "今"]


def test_command_writes_the_page(
    runner: asyncio.Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.html"
    backend = FakeBackend(ANSWER)
    trace(backend, runner, replace(REQUEST, given="Arr"), html=path, as_json=False)
    assert "Hi &lt;i&gt;" in path.read_text()
    assert "The given text" in path.read_text()
    out, err = capsys.readouterr()
    assert out == ""
    assert f"wrote {path}" in err
    assert "tone 25 %" in err


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    runner: asyncio.Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    path = tmp_path / "out.html"
    path.write_text("the last page")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left.*{path}"):
        trace(FakeBackend(ANSWER), runner, REQUEST, html=path, as_json=False)
    assert path.read_text() == "the last page"
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_can_go_into_a_pipe(runner: asyncio.Runner) -> None:
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as pipe:
        with open(writer, "wb"):
            path = Path(f"/proc/self/fd/{writer}")
            trace(FakeBackend(ANSWER), runner, REQUEST, html=path, as_json=False)
        assert len(Page(pipe.read()).tokens) == 3


def test_page_without_a_folder_is_refused_before_anything_is_asked(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    backend = FakeBackend(ANSWER)
    with pytest.raises(CommandError, match="is no folder"):
        trace(backend, runner, REQUEST, html=tmp_path / "no" / "out.html", as_json=False)
    assert backend.requests == []


def test_json_has_the_trace_and_its_sums(
    runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    trace(FakeBackend(ANSWER), runner, REQUEST, html=None, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["text"] == "Arr, Bridge"
    assert [token["who"] for token in told["tokens"]] == ["tone", "tone", "knowledge"]
    assert told["spoken_share"] == SUMMARY.spoken_share


def test_chat_asks_for_a_trace_and_is_plain_where_nobody_sees_colours(
    runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = FakeBackend(ANSWER)
    talk = Conversation("knowledge+tone", SamplingParams(), trace=True)
    chat(talk, backend, runner, message="Hi", as_json=False)
    out, err = capsys.readouterr()
    assert backend.requests[0].mixture.trace
    assert out == "Arr, Bridge\n"
    assert err == "base 0 %  knowledge 25 %  tone 25 %  all agree 50 %\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def painted(monkeypatch: pytest.MonkeyPatch, *deltas: Delta) -> list[tuple[str, str]]:
    """Return (colour, text) of each piece that a terminal is shown; "" is none."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    terminal = Terminal()
    painter = Painter(terminal)
    for delta in deltas:
        painter(delta.text, delta.trace)
    pieces = re.findall(r"(?:\x1b\[([0-9;]+)m)?([^\x1b]+)(?:\x1b\[0m)?", terminal.getvalue())
    return [(colour, text) for colour, text in pieces]


def test_each_state_has_a_colour_and_agreement_none(monkeypatch: pytest.MonkeyPatch) -> None:
    (arr, _), (comma, _), (bridge, _) = painted(monkeypatch, *ANSWER)  # type: ignore[arg-type]
    assert comma == ""
    assert len({arr, bridge, ""}) == 3


def test_colours_lie_on_their_tokens_whatever_is_cut_or_held_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The blank before an answer is no text, a stop string comes late or never."""
    tone = token_trace(b" Arr")
    agreed = token_trace(b", \xe4\xbb", disagreement=0.0)
    knowledge = token_trace(b"\x8a Bridge\n", "knowledge")
    pieces = painted(
        monkeypatch,
        Delta(text="Arr", trace=(tone,)),
        Delta(text=", ", trace=(agreed, knowledge)),
        Delta(text="今"),
        Delta(text=" Bridge"),
    )
    assert "".join(text for _, text in pieces) == "Arr, 今 Bridge"
    assert pieces[0][1] == "Arr"
    assert pieces[0][0] != ""
    assert pieces[1] == ("", ", ")
    assert len({colour for colour, _ in pieces[2:]}) == 1
    assert pieces[2][0] not in ("", pieces[0][0])


def test_control_characters_of_an_answer_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evil = traced("\x1b[31mred\x07")
    assert "".join(text for _, text in painted(monkeypatch, evil)) == "[31mred"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--given", "x", "--given-file", "y"), "not both"),
        (("--given", ""), "given must be a text"),
        (("--given", "x", "--max-tokens", "5"), "left out with mrss.given"),
        (("--given-file", "/no/such/file"), "No such file"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(
    arguments: tuple[str, ...], words: str
) -> None:
    result = mrss("trace", "knowledge+tone", "Hi", *arguments)
    assert result.code != 0
    assert words in result.err


def test_a_given_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "given.txt"
    path.write_bytes(b"ab\xff")
    result = mrss("trace", "knowledge+tone", "Hi", "--given-file", path)
    assert result.code == 1
    assert result.err == f"error: {path} is not UTF-8 text (byte 2); convert it\n"
