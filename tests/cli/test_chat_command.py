import asyncio
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeBackend, text

from mrss_provider.backend import Delta, GenerateRequest, Grammar, Message
from mrss_provider.cli.chat import Conversation, chat, read_grammar
from mrss_provider.cli.output import CommandError, printable
from mrss_provider.errors import InvalidRequestError, QueueFullError
from mrss_provider.mixture import GATES, MERGES
from mrss_provider.sampling_params import SamplingParams


class Terminal(io.StringIO):
    """A stdin that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as running:
        yield running


@pytest.fixture
def talk(runner: asyncio.Runner) -> Conversation:
    return Conversation("knowledge+tone", SamplingParams(seed=7))


def _say(
    talk: Conversation,
    backend: FakeBackend,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    stdin: type[io.StringIO] = io.StringIO,
) -> None:
    monkeypatch.setattr("sys.stdin", stdin(lines))
    chat(talk, backend, runner, message=None, as_json=False)


def test_one_shot_writes_the_answer_alone_to_stdout(
    talk: Conversation, runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = FakeBackend()
    chat(talk, backend, runner, message="Hi", as_json=False)
    assert capsys.readouterr() == ("Hello, world\n", "")
    (request,) = backend.requests
    assert request.messages == (Message("user", "Hi"),)
    assert request.sampling.seed == 7


def test_a_thought_is_shown_apart_and_not_remembered(
    talk: Conversation,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backend = FakeBackend([Delta(reasoning="Hm.", num_tokens=1), text("Yes")])
    _say(talk, backend, runner, monkeypatch, "/think on\none\n/think auto\ntwo\n")
    assert capsys.readouterr() == ("Yes\nYes\n", "think: on\nHm.\n\nthink: auto\nHm.\n\n")
    assert [request.thinking for request in backend.requests] == [True, None]
    said = [message.content for message in backend.requests[1].messages or ()]
    assert said == ["one", "Yes", "two"]
    with pytest.raises(InvalidRequestError, match="on, off or auto"):
        talk.command("/think maybe")
    chat(talk, backend, runner, message="Hi", as_json=True)
    assert json.loads(capsys.readouterr().out)["reasoning"] == "Hm."


def test_json_tells_mixture_rows_text_and_counts(
    talk: Conversation, runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(talk, FakeBackend(), runner, message="Hi", as_json=True)
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told.pop("duration_s") >= 0
    assert err == ""
    assert told == {
        "mixture": "knowledge+tone",
        "rows": 3,
        "text": "Hello, world",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 3,
    }


def test_each_line_of_a_pipe_is_a_turn_that_remembers_the_ones_before(
    talk: Conversation,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backend = FakeBackend()
    talk.system = "Be brief."
    _say(talk, backend, runner, monkeypatch, "one\n\ntwo\n//three\n")
    assert capsys.readouterr() == ("Hello, world\n" * 3, "")
    assert backend.requests[2].messages == (
        Message("system", "Be brief."),
        Message("user", "one"),
        Message("assistant", "Hello, world"),
        Message("user", "two"),
        Message("assistant", "Hello, world"),
        Message("user", "/three"),
    )


def test_commands_change_the_next_request(
    talk: Conversation, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend()
    lines = "/weights tone=0.9\n/weights knowledge=0.5\n/merge linear\n/gate fixed\nHi\n"
    lines = "/reinject turn\n" + lines + "/weights off\n/merge off\n/gate off\n/reinject off\nHi\n"
    _say(talk, backend, runner, monkeypatch, lines)
    first, second = backend.requests
    assert (first.mixture.reinject, second.mixture.reinject) == ("turn", None)
    assert first.mixture.weights == {"tone": 0.9, "knowledge": 0.5}
    assert (first.mixture.merge, first.mixture.gate) == ("linear", "fixed")
    assert second.mixture.weights is None
    assert (second.mixture.merge, second.mixture.gate) == (None, None)


def test_reset_forgets_the_turns_and_model_changes_the_name(
    talk: Conversation, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend()
    _say(talk, backend, runner, monkeypatch, "one\n/reset\n/model mrss/tone\ntwo\n/quit\nthree\n")
    assert len(backend.requests) == 2
    assert backend.requests[1].messages == (Message("user", "two"),)
    assert backend.requests[1].model == "tone"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/wieghts tone=1", "unknown command /wieghts"),
        ("/merge mean", f"merge must be one of {', '.join(MERGES)}, got 'mean'"),
        ("/gate none", f"gate must be one of {', '.join(GATES)}, got 'none'"),
        ("/gate posterior 0.05", f"gate must be one of {', '.join(GATES)}, got 'posterior 0.05'"),
        ("/merge power:2 fixed", "bad merge 'power:2 fixed' at position 7: unexpected ' '"),
        ("/reinject always", "/reinject takes never, turn or off, got 'always'"),
        ("/weights tone", "a weight is written name=number"),
        ("/weights tone=inf", "weights: a weight must be finite"),
    ],
)
def test_a_bad_command_is_refused_with_what_is_allowed(
    talk: Conversation, line: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequestError, match="^" + sentence.replace("+", r"\+")):
        talk.command(line)


def test_a_pipe_ends_at_the_first_error(
    talk: Conversation, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend(open_error=QueueFullError("no room"))
    with pytest.raises(QueueFullError):
        _say(talk, backend, runner, monkeypatch, "one\ntwo\n")
    assert len(backend.requests) == 1


def test_at_a_terminal_an_error_is_told_and_the_turn_forgotten(
    talk: Conversation,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backend = FakeBackend(open_error=QueueFullError("no room"))
    _say(talk, backend, runner, monkeypatch, "one\n", Terminal)
    assert "error: no room\n" in capsys.readouterr().err
    assert talk.turns == []


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(
    talk: Conversation,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def script(request: GenerateRequest) -> list[object]:
        first = request.messages is not None and len(request.messages) == 1
        return [text("Half"), KeyboardInterrupt()] if first else [text("Whole")]

    backend = FakeBackend(script)  # type: ignore[arg-type]
    _say(talk, backend, runner, monkeypatch, "one\ntwo\n", Terminal)
    out, err = capsys.readouterr()
    assert out == "Half\nWhole\n"
    assert "[stopped]" in err
    assert talk.turns[1] == Message("assistant", "Half")


def test_ctrl_c_twice_at_the_prompt_leaves(
    talk: Conversation,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Interrupted(Terminal):
        def readline(self, *args: object) -> str:
            raise KeyboardInterrupt

    _say(talk, FakeBackend(), runner, monkeypatch, "", Interrupted)
    assert capsys.readouterr().err.count("Ctrl-C again leaves") == 1


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[31m\tb\nc\r\x9bd é") == "a[31m\tb\ncd é"


def test_half_of_a_surrogate_pair_does_not_stop_what_is_printed() -> None:
    assert printable("a\ud83d é 😀").encode() == "a? é 😀".encode()


def test_a_schema_or_an_expression_goes_with_every_request(
    talk: Conversation,
    runner: asyncio.Runner,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"type": "integer"}', encoding="utf-8")
    talk.grammar = read_grammar(file, None)
    backend = FakeBackend([replace(text("12"), finish_reason="length")])
    chat(talk, backend, runner, message="How many?", as_json=False)
    assert backend.requests[0].grammar == Grammar(
        "json_schema", '{"type": "integer"}', "--json-schema"
    )
    out, err = capsys.readouterr()
    assert (out, "need not conform" in err) == ("12\n", True)
    assert read_grammar(None, "a+") == Grammar("regex", "a+", "--regex")
    assert read_grammar(None, None) is None


def test_what_is_no_schema_or_no_expression_is_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    for content, told in (("[1", "is no JSON"), ("[1]", "which is an object, got list")):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(CommandError, match=told):
            read_grammar(file, None)
    with pytest.raises(CommandError, match="cannot be read"):
        read_grammar(tmp_path / "nothing", None)
    with pytest.raises(CommandError, match="not empty"):
        read_grammar(None, "")
    with pytest.raises(CommandError, match="one thing"):
        read_grammar(file, "a")
