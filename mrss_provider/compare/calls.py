"""One call to one model: what is asked, what comes back piece by piece, and what can go wrong.

`Connection` is the seam: LiteLLM's SDK, an OpenAI server, or a test's fake.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import NoneType
from typing import Any, Protocol

from mrss_provider.compare.prompts import Prompt

Clock = Callable[[], float]


class CallError(Exception):
    """A call that failed.

    Args:
        kind: the error's name, for counting.
        message: what it said.
        status: of HTTP, where there was one.
    """

    def __init__(self, kind: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


@dataclass(frozen=True)
class Call:
    """What one model is asked.

    Attributes:
        model: its name.
        messages: a chat, or None.
        prompt: a text to continue, or None.
        params: of the request.
        seed: of the answer, or None for none.
        timeout_s: for the whole answer.
    """

    model: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Piece:
    """A part of an answer; what it does not tell is empty or None.

    Attributes:
        text: that came.
        reasoning: text of the model's reasoning.
        finish_reason: as OpenAI names them.
        prompt_tokens: of the whole prompt.
        completion_tokens: of the whole answer.
        cost: of the call, in the currency of the prices, mostly US dollars.
        id: of the response.
        call_id: LiteLLM's, of the call.
        model_id: `model_info.id` of the deployment that answered.
        fingerprint: `system_fingerprint`.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    id: str | None = None
    call_id: str | None = None
    model_id: str | None = None
    fingerprint: str | None = None


class Connection(Protocol):
    """Where answers come from. Belongs to one event loop."""

    def stream(self, call: Call) -> AsyncIterator[Piece]:
        """Yield the answer; iterating raises CallError where it fails."""
        ...

    async def aclose(self) -> None:
        """Close what is open."""
        ...


# Of a piece as it comes, and of a line of results.jsonl, which somebody may have edited by hand.
_SOME_TEXT = (str, NoneType)
_SOME_NUMBER = (int, float, NoneType)
_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "model", "text", "reasoning"), (str,)),
    **dict.fromkeys(("finish_reason", "id", "call_id", "model_id", "fingerprint"), _SOME_TEXT),
    **dict.fromkeys(("started", "total_s"), (int, float)),
    **dict.fromkeys(("ttft_s", "prompt_tokens", "completion_tokens", "cost"), _SOME_NUMBER),
    "seed": (int,),
    "chunk_s": (list,),
    "error": (dict, NoneType),
}


def check_kinds(values: Mapping[str, Any]) -> None:
    """Do nothing if the fields of a `Piece` or a `Result` are of the kinds that they must be.

    Raises:
        TypeError: one is not.
    """
    for key, value in values.items():
        if not isinstance(value, _KINDS.get(key, object)) or isinstance(value, bool):
            raise TypeError(f"{key} must not be {value!r:.40}")


@dataclass(frozen=True)
class Result:
    """One cell of a comparison: one model's answer to one prompt with one seed.

    Attributes:
        prompt: its id.
        model: its name.
        seed: of the answer.
        started: when it was asked, in seconds since 1970.
        text: the answer, or what came of it before an error.
        reasoning: of the model, where it tells.
        finish_reason: None where the answer did not end.
        ttft_s: from asking to the first text.
        total_s: from asking to the end, or to the error.
        chunk_s: when each piece of text came, since asking.
        prompt_tokens, completion_tokens, cost, id, call_id, model_id, fingerprint: as in `Piece`.
        error: {"type", "message", "status"}, or None.
    """

    prompt: str
    model: str
    seed: int
    started: float
    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    chunk_s: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    id: str | None = None
    call_id: str | None = None
    model_id: str | None = None
    fingerprint: str | None = None
    error: Mapping[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """Which cell this is."""
        return self.prompt, self.model, self.seed

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second from the first text to the end, where the server counts them.

        The end of the text is a token too, which has no text.
        """
        if self.ttft_s is None or not self.completion_tokens or self.completion_tokens < 2:
            return None
        took_s = self.total_s - self.ttft_s
        return (self.completion_tokens - 1) / took_s if took_s > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the line of results.jsonl."""
        line = asdict(self)
        for key in ("started", "ttft_s", "total_s"):
            line[key] = None if line[key] is None else round(line[key], 6)
        return {**line, "chunk_s": [round(t, 6) for t in self.chunk_s]}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Result:
        """Rebuild what `to_dict` wrote; keys that are not ours are left out.

        Raises:
            TypeError: a field is missing, or not what it must be.
        """
        values = {f.name: line[f.name] for f in fields(cls) if f.name in line}
        check_kinds(values)
        times = values.get("chunk_s", [])
        if not all(isinstance(t, int | float) for t in times):
            raise TypeError("chunk_s must be times")
        error = values.get("error")
        if error is not None and not {"type", "message"} <= error.keys():
            raise TypeError("error must have a type and a message")
        return cls(**{**values, "chunk_s": tuple(times)})


def call_of(prompt: Prompt, model: str, seed: int, params: Mapping[str, Any], s: float) -> Call:
    """Return the call that a cell stands for; the prompt's own parameters win over `params`."""
    return Call(
        model=model,
        messages=prompt.messages,
        prompt=prompt.prompt,
        params={**params, **prompt.params},
        seed=seed,
        timeout_s=s,
    )


async def ask(
    connection: Connection,
    call: Call,
    prompt_id: str,
    *,
    clock: Clock = time.perf_counter,
    on_piece: Callable[[Piece], None] | None = None,
) -> Result:
    """Ask once and return what came, an error among it.

    Args:
        connection: where to.
        call: what.
        prompt_id: of the result.
        clock: monotonic seconds.
        on_piece: called with each piece as it comes.
    """
    began, started = clock(), time.time()
    texts, thoughts, chunk_s = [], [], []
    told: dict[str, Any] = {}
    error: dict[str, Any] | None = None
    try:
        async with asyncio.timeout(call.timeout_s):
            async for piece in connection.stream(call):
                if piece.text or piece.reasoning:
                    chunk_s.append(clock() - began)
                texts.append(piece.text)
                thoughts.append(piece.reasoning)
                told |= {
                    key: value
                    for key, value in asdict(piece).items()
                    if key not in ("text", "reasoning") and value is not None
                }
                if on_piece is not None:
                    on_piece(piece)
    except CallError as exc:
        error = {"type": exc.kind, "message": str(exc), "status": exc.status}
    except TimeoutError:
        # A connection's own limits are for one read, and a slow stream meets none of them.
        told_s = f"no whole answer within {call.timeout_s:g} s"
        error = {"type": "Timeout", "message": told_s, "status": None}
    return Result(
        prompt=prompt_id,
        model=call.model,
        seed=call.seed or 0,
        started=started,
        text="".join(texts),
        reasoning="".join(thoughts),
        ttft_s=chunk_s[0] if chunk_s else None,
        total_s=clock() - began,
        chunk_s=tuple(chunk_s),
        error=error,
        **told,
    )
