"""The seam: what a front end asks for, what it gets back, and the `Backend` protocol.

A leaf. `AsyncEngine` (in this process) and `Client` (over HTTP) are both a `Backend`, so the
server and the LiteLLM provider are written and tested against this file alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mrss_provider.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a chat, its text already joined from the OpenAI content parts."""

    role: Role
    content: str


@dataclass(frozen=True)
class MixtureOptions:
    """A request's `mrss` object and RWKV-Infer's `mrss_gatingweight`.

    Attributes:
        weights: state name -> weight (a ratio), replacing those of the name.
        merge: merge rule by name.
        gate: gate by name.
        cut: plausibility cut in [0, 1) for the rules that have one; 0 is off.
        gating_weights: RWKV-Infer's list, in the order of the terms as typed.
    """

    weights: Mapping[str, float] | None = None
    merge: str | None = None
    gate: str | None = None
    cut: float | None = None
    gating_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class GenerateRequest:
    """One request for `n` answers to one prompt.

    Exactly one of `messages` (a chat, rendered by the engine's template) and `prompt` (text, or
    token ids, taken as they are) is given.

    Attributes:
        model: the mixture as typed, without LiteLLM's `mrss/`.
        timeout_s: for the whole answer, seconds; None is the server's limit.
        priority_key: who asks, for fair scheduling; opaque.
    """

    model: str
    sampling: SamplingParams
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    n: int = 1
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        assert (self.messages is None) != (self.prompt is None)


@dataclass(frozen=True)
class TopLogprob:
    """A token that could have come next, and its log-probability (nats)."""

    token_id: int
    token: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """The chosen token's log-probability under the merge, before penalties, and the best few."""

    token_id: int
    token: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of a request. Each token counts once, however many rows read it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        """Return the sum, for several prompts of one call."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True)
class Delta:
    """A piece of an answer.

    Attributes:
        index: which of the `n` answers.
        text: new text; never half a character, never the beginning of a stop string.
        num_tokens: how many sampled tokens this delta accounts for.
        logprobs: one entry a token, when asked for.
        finish_reason: set on the last delta of this index.
        usage: set on the last delta of the stream, after every index has finished.
    """

    index: int = 0
    text: str = ""
    num_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class StreamInfo:
    """What is known on admission.

    Attributes:
        mixture: canonical name.
        rows: recurrent states computed for one answer (the base row included when needed).
        fingerprint: `system_fingerprint` of weights and mixture.
        prompt_tokens: length of the encoded prompt.
    """

    mixture: str
    rows: int
    fingerprint: str
    prompt_tokens: int


class DeltaStream(Protocol):
    """An admitted request: an async iterator of deltas.

    Whoever stops reading calls `aclose`, which aborts what still runs; it is idempotent, also
    after the end, and needs no await of the engine.
    """

    info: StreamInfo

    def __aiter__(self) -> DeltaStream: ...

    async def __anext__(self) -> Delta: ...

    def ready(self) -> bool:
        """Tell whether the next delta, or the end, is already here; False is always safe."""
        ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True)
class ModelCard:
    """One name that `/v1/models` lists.

    Attributes:
        id: a state, a named mixture, or `base`.
        kind: what it is.
        description: one line, may be empty.
        created: Unix time in seconds.
        context_len: longest prompt plus answer, in tokens.
    """

    id: str
    kind: Literal["base", "state", "mixture"]
    description: str = ""
    created: int = 0
    context_len: int = 0


class Backend(Protocol):
    """Where answers come from."""

    async def open(self, request: GenerateRequest) -> DeltaStream:
        """Admit a request.

        Raises:
            MRSSError: everything that can be known before the first token (a bad name, a
                prompt that is too long, a full queue) is raised here, so that a front end can
                still answer with a status.
        """
        ...

    async def models(self) -> list[ModelCard]:
        """Return the names that are served, `base` first."""
        ...

    async def aclose(self) -> None:
        """Release everything; open streams end with `EngineUnavailableError`."""
        ...
