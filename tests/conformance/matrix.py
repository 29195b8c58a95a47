"""The matrix: which client asks for which feature on which route, and what comes of it.

A cell that is not told of here passes. `make conformance` holds every cell to what is said: a known
failure must fail, and in the stated way.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from conformance.features import FEATURES, Feature

ROUTES = ("server", "mrss", "openai")
ANY = "*"


@dataclass(frozen=True)
class Client:
    """A column of the table.

    Attributes:
        id: its title, as people call it.
        path: module and class.
        methods: what it can ask for.
        routes: where it can go.
    """

    id: str
    path: str
    methods: frozenset[str]
    routes: tuple[str, ...] = ROUTES

    def on(self, route: Any) -> Any:
        """Return the client on a route."""
        module, name = self.path.split(":")
        return getattr(importlib.import_module(f"conformance.{module}"), name)(route)


_CHATS = frozenset({"chat", "stream"})
_TEXTS = _CHATS | {"complete", "complete_stream", "embed"}
_ALL = _TEXTS | {"models", "respond", "respond_stream", "leave"}
CLIENTS = (
    Client("openai", "clients:OpenAISync", _ALL),
    Client("openai, async", "clients:OpenAIAsync", _ALL),
    Client("litellm", "clients:LiteLLM", _ALL - {"models"}),
    Client("litellm, no proxy", "clients:LiteLLMAlone", _ALL - {"models"}, ("server",)),
    Client("LangChain", "frameworks:LangChain", _TEXTS),
    Client("Instructor", "frameworks:Instructor", _CHATS),
    Client("others", "protocols:Others", frozenset({"message", "message_stream", "post"})),
)


@dataclass(frozen=True)
class Known:
    """What some cells do instead of passing.

    Attributes:
        features: names, or `ANY`.
        clients: ids, or `ANY`.
        routes: ids, or `ANY`.
        why: for the table.
        match: a pattern of the error; None where there is nothing to ask.
    """

    features: Sequence[str]
    clients: Sequence[str]
    routes: Sequence[str]
    why: str
    match: str | None = None

    def is_about(self, feature: str, client: str, route: str) -> bool:
        """Whether it is about this cell."""
        return all(
            wanted == ANY or value in wanted
            for wanted, value in (
                (self.features, feature),
                (self.clients, client),
                (self.routes, route),
            )
        )


_OBJECTS = (
    "`response_format` json_object",
    "`response_format` json_schema, strict",
    "json_schema, streamed",
    "`tool_choice` by name",
    "tool calls, streamed",
)
_STREAMED = "LiteLLM's own reading of OpenAI's stream "
_TEXT_ROUTES = (
    "a list of prompts",
    "token ids as a prompt",
    "`logprobs` of a completion",
    "`echo`",
    "`echo` with `logprobs`: a given text scored",
    "`best_of`",
)
# Where a stream goes through LiteLLM's `openai/`, in the proxy or in the SDK.
_READ_BY_LITELLM = ((ANY, ("openai",)), (("litellm",), ANY))

EXCEPTIONS: tuple[Known, ...] = (
    Known(
        [f.name for f in FEATURES if f.name not in _OBJECTS],
        ["Instructor"],
        ANY,
        "Instructor asks for objects only",
    ),
    Known(
        ["tool calls, streamed"], ["Instructor"], ANY, "Instructor's partial objects hide the calls"
    ),
    Known(["`n`, streamed"], ["LangChain"], ANY, "LangChain streams one answer"),
    Known(
        ["`reasoning_content`", "`reasoning_content`, streamed"],
        ["LangChain"],
        ANY,
        "`ChatOpenAI` drops `reasoning_content`",
        "AssertionError",
    ),
    Known(
        ["`encoding_format` base64"], ["LangChain"], ANY, "`OpenAIEmbeddings` returns floats only"
    ),
    *(
        Known(
            ["`n`, streamed"],
            clients,
            routes,
            f"{_STREAMED}drops the finish reasons of all answers but the first",
            "AssertionError",
        )
        for clients, routes in _READ_BY_LITELLM
    ),
    *(
        Known(
            ["`logprobs`, streamed"],
            clients,
            routes,
            f"{_STREAMED}drops the log-probabilities of a chunk without text",
            "AssertionError",
        )
        for clients, routes in _READ_BY_LITELLM
    ),
    Known(
        _TEXT_ROUTES,
        ["litellm"],
        ["mrss", "openai"],
        "LiteLLM's `litellm_proxy/` makes a completion a chat; `text-completion-openai/` does not",
        "AssertionError|Unmapped prompt format|must be true or false|is refused",
    ),
    Known(
        ["token ids as a prompt"],
        ANY,
        ["mrss"],
        "LiteLLM refuses token ids itself where it does not know the provider",
        "Unmapped prompt format",
    ),
    Known(
        ["token ids as a prompt"],
        ["litellm, no proxy"],
        ANY,
        "LiteLLM refuses token ids itself where it does not know the provider",
        "Unmapped prompt format",
    ),
    Known(
        ["`encoding_format` base64"],
        ANY,
        ["mrss"],
        "the configuration has LiteLLM drop it, which refuses it else: floats come",
        "AssertionError",
    ),
    Known(
        ["`encoding_format` base64"],
        ["litellm, no proxy"],
        ANY,
        "LiteLLM refuses it where it does not know the provider",
        "not supported by mrss",
    ),
    Known(
        ["`dimensions`"],
        ANY,
        ["mrss"],
        "LiteLLM refuses it where it does not know the provider",
        "not supported by mrss",
    ),
    Known(
        ["`dimensions`"],
        ["litellm, no proxy"],
        ANY,
        "LiteLLM refuses it where it does not know the provider",
        "not supported by mrss",
    ),
    Known(
        ["`dimensions`"],
        ["litellm"],
        ["server"],
        "LiteLLM wants `allowed_openai_params` for it, which a configuration can have",
        "Setting dimensions is not supported",
    ),
    Known(
        ["the list of models"], ANY, ["openai"], "LiteLLM does not list wildcards", "AssertionError"
    ),
    Known(
        ["`/v1/responses`", "`/v1/responses`, streamed"],
        ["openai", "openai, async", "litellm"],
        ["server"],
        "our server has not this route; LiteLLM translates it",
        "there is no POST /v1/responses here",
    ),
    Known(
        [f.name for f in FEATURES if f.name.startswith("`/v1/messages`")],
        ["others"],
        ["server"],
        "our server has not this route; LiteLLM translates it",
        "there is no POST /v1/messages here",
    ),
    Known(
        ["`/v1/messages` with thinking"],
        ["others"],
        ["openai"],
        "LiteLLM sends a thinking request for `openai/` to /v1/responses, which the engine has not",
        "there is no POST /v1/responses here",
    ),
    Known(["tokenise and back"], ANY, ["mrss", "openai"], "LiteLLM has not these routes", "404"),
)


@dataclass(frozen=True)
class Cell:
    """One cell; `exception` is None where it passes."""

    feature: Feature
    client: Client
    route: str
    exception: Known | None

    @property
    def id(self) -> str:
        """A name for the test."""
        return f"{self.route}-{self.client.id}-{self.feature.name}".replace("`", "")

    @property
    def is_asked(self) -> bool:
        """Whether there is something to ask."""
        return self.exception is None or self.exception.match is not None


def cells() -> Iterator[Cell]:
    """Yield the cells that there are: those whose client has a way to ask."""
    for feature in FEATURES:
        for client in CLIENTS:
            for route in client.routes:
                if feature.needs in client.methods:
                    found = [e for e in EXCEPTIONS if e.is_about(feature.name, client.id, route)]
                    yield Cell(feature, client, route, found[0] if found else None)


def run(cell: Cell, ask: Any) -> None:
    """Ask, and hold the cell to what is said of it.

    Raises:
        AssertionError: it fails, or a known failure does not fail as it should.
    """
    try:
        cell.feature.check(ask)
    except Exception as exc:
        if cell.exception is None or cell.exception.match is None:
            raise
        told = f"{type(exc).__name__}: {exc}"
        assert re.search(cell.exception.match, told), told
    else:
        assert cell.exception is None, f"it passes: {cell.exception.why} is no longer true"
