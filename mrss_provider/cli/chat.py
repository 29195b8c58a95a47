"""`mrss chat`: a conversation in the terminal, one shot, or through a pipe."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast, get_args

from mrss_provider.backend import (
    Backend,
    GenerateRequest,
    Grammar,
    Message,
    MixtureOptions,
    Reinject,
)
from mrss_provider.cli.ask import Reply, Show, ask, ignore, thinker, unsaid, writer
from mrss_provider.cli.output import CommandError, answer_json, note, read_text
from mrss_provider.cli.spoken import Painter, print_legend
from mrss_provider.errors import InvalidRequestError, MRSSError
from mrss_provider.mixture import Kind, check_weight, parse_method
from mrss_provider.sampling_params import SamplingParams

HELP = """\
/weights knowledge=1 tone=0.9   weigh the states (ratios); /weights off: as the name says
/merge power:0.5, /gate fixed   combine them another way; off: the default
/reinject turn, or never        give states anew at each of your turns; off: as the name says
/model NAME                     talk to another mixture, the conversation goes on
/think on, off or auto          whether the model thinks first; auto: as it likes
/reset                          forget the conversation
/quit                           leave (or Ctrl-D)
Ctrl-C stops an answer, and at the prompt, twice, leaves. //text sends "/text"."""


_THINKING = {"on": True, "off": False, "auto": None}


@dataclass
class Conversation:
    """What a chat remembers. Commands and turns modify it."""

    model: str
    sampling: SamplingParams
    system: str | None = None
    weights: dict[str, float] | None = None
    merge: str | None = None
    gate: str | None = None
    reinject: Reinject | None = None
    trace: bool = False
    turns: list[Message] = field(default_factory=list)
    thinking: bool | None = None
    grammar: Grammar | None = None

    def request(self, text: str) -> GenerateRequest:
        """Return the request that says `text` next."""
        system = [Message("system", self.system)] if self.system else []
        return GenerateRequest(
            model=self.model,
            sampling=self.sampling,
            messages=(*system, *self.turns, Message("user", text)),
            mixture=MixtureOptions(
                self.weights, self.merge, self.gate, trace=self.trace, reinject=self.reinject
            ),
            thinking=self.thinking,
            grammar=self.grammar,
        )

    def keep(self, text: str, reply: str) -> None:
        """Remember a turn."""
        self.turns += [Message("user", text), Message("assistant", reply)]

    def command(self, line: str) -> str:
        """Carry out `/name ...` and return what to tell.

        Raises:
            InvalidRequestError: an unknown command or a bad value.
        """
        name, _, rest = line[1:].partition(" ")
        words = rest.split()
        commands: dict[str, Callable[[list[str]], str]] = {
            "weights": self._set_weights,
            "merge": lambda words: self._set_method("merge", words),
            "gate": lambda words: self._set_method("gate", words),
            "reinject": self._set_reinject,
            "model": self._set_model,
            "think": self._set_thinking,
            "reset": self._reset,
            "help": lambda _: HELP,
        }
        if name not in commands:
            raise InvalidRequestError(f"unknown command /{name}; /help lists them")
        return commands[name](words)

    def _set_weights(self, words: list[str]) -> str:
        if words == ["off"]:
            self.weights = None
        elif words:
            changed = dict(self.weights or {})
            for word in words:
                name, _, value = word.partition("=")
                changed[name] = _weight(word, value)
            self.weights = changed
        told = " ".join(f"{name}={weight:g}" for name, weight in (self.weights or {}).items())
        return f"weights: {told or 'as the name says'}"

    def _set_method(self, kind: Kind, words: list[str]) -> str:
        if words == ["off"]:
            setattr(self, kind, None)
        elif words:
            # With all words, so that `/gate posterior 0.05` is refused and not half understood.
            setattr(self, kind, parse_method(" ".join(words), kind, kind).text)
        return f"{kind}: {getattr(self, kind) or 'as the name says'}"

    def _set_reinject(self, words: list[str]) -> str:
        known = get_args(Reinject)
        if words and (len(words) > 1 or words[0] not in (*known, "off")):
            raise InvalidRequestError(
                f"/reinject takes {', '.join(known)} or off, got {' '.join(words)!r}"
            )
        if words:
            self.reinject = None if words[0] == "off" else cast(Reinject, words[0])
        return f"reinject: {self.reinject or 'as the name says'}"

    def _set_model(self, words: list[str]) -> str:
        if words:
            self.model = words[0].removeprefix("mrss/")
            self.weights = self.merge = self.gate = self.reinject = None
        return f"model: {self.model}"

    def _set_thinking(self, words: list[str]) -> str:
        if words and (len(words) > 1 or words[0] not in _THINKING):
            raise InvalidRequestError(f"/think takes on, off or auto, got {' '.join(words)!r}")
        if words:
            self.thinking = _THINKING[words[0]]
        told = next(word for word, value in _THINKING.items() if value is self.thinking)
        return f"think: {told}"

    def _reset(self, words: list[str]) -> str:
        self.turns.clear()
        return "the conversation starts anew"


def read_grammar(json_schema: Path | None, regex: str | None) -> Grammar | None:
    """Return what every answer is to conform to: a schema in a file, an expression, or nothing.

    What else they must be is known where they are compiled.

    Raises:
        CommandError: both are given, or the file has no JSON object.
    """
    if json_schema is not None and regex is not None:
        raise CommandError("an answer conforms to one thing: give --json-schema or --regex")
    if regex is not None:
        if not regex:
            raise CommandError("--regex must be an expression that is not empty; leave it out")
        return Grammar("regex", regex, "--regex")
    if json_schema is None:
        return None
    try:
        schema = json.loads(read_text(json_schema))
    except (ValueError, RecursionError) as exc:
        raise CommandError(f"{json_schema} is no JSON: {exc}") from exc
    if not isinstance(schema, dict):
        raise CommandError(
            f"{json_schema} must have a JSON Schema, which is an object, got "
            f"{type(schema).__name__}"
        )
    return Grammar("json_schema", json.dumps(schema), "--json-schema")


def chat(
    conversation: Conversation,
    backend: Backend,
    runner: asyncio.Runner,
    *,
    message: str | None,
    as_json: bool,
) -> None:
    """Answer `message` alone, or every line of stdin until it ends.

    Raises:
        MRSSError: in one shot and from a pipe, whatever the request meets; at a terminal it is
            told and the conversation goes on.
    """
    if message is not None:
        _turn(conversation, backend, runner, message, as_json)
        return
    interactive = sys.stdin.isatty()
    if interactive:
        note(f"{conversation.model}: /help lists the commands, /quit leaves")
    for line in _lines(interactive):
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                note(conversation.command(line))
            else:
                text = line[1:] if line.startswith("//") else line
                _turn(conversation, backend, runner, text, as_json, told=interactive)
        except MRSSError as exc:
            if not interactive:
                raise
            note(f"error: {exc}")


def _turn(
    conversation: Conversation,
    backend: Backend,
    runner: asyncio.Runner,
    text: str,
    as_json: bool,
    told: bool = False,
) -> None:
    reply = Reply()
    show: Show = ignore
    if not as_json:
        show = Painter() if conversation.trace else writer()
    # What the model thinks is shown and not remembered.
    think = unsaid if as_json else thinker()
    try:
        runner.run(ask(backend, conversation.request(text), reply, show, think))
    except KeyboardInterrupt:
        # One Ctrl-C stops the answer, not the conversation; what was said is remembered.
        if not told:
            raise
        note("\n[stopped]")
        if not reply.text:
            return
    conversation.keep(text, reply.text)
    if as_json:
        answer_json(reply.to_json())
    else:
        show("\n")
        if reply.trace_summary is not None:
            print_legend(reply.trace_summary)
        if conversation.grammar is not None and reply.finish_reason == "length":
            note("[cut at the most tokens that it may have, so it need not conform]")
        # An answer that was stopped has no usage.
        if told and reply.usage:
            note(reply.summary())


def _lines(interactive: bool) -> Iterator[str]:
    """Yield the lines of stdin that are not empty; at a terminal two Ctrl-C in a row end them."""
    interrupted = False
    while True:
        try:
            line = _read_line(interactive)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            if interrupted:
                note("")
                return
            interrupted = True
            note("\n(Ctrl-C again leaves)")
            continue
        interrupted = False
        if line.strip():
            yield line.strip()


def _read_line(interactive: bool) -> str:
    if interactive and sys.stdout.isatty():
        # Gives `input` line editing and a history.
        import readline  # noqa: F401

        return input("you> ")
    if interactive:
        sys.stderr.write("you> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _weight(word: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise InvalidRequestError(
            f"a weight is written name=number, such as tone=0.9, got {word!r}"
        ) from None
    return check_weight(number, "weights")
