"""The seam: what a front end asks for, what it gets back, and the `Backend` protocol.

A leaf. `AsyncEngine` (in this process) and `Client` (over HTTP) are both a `Backend`, so the
server and the LiteLLM provider are written and tested against this file alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from mrss_provider.errors import InvalidRequestError
from mrss_provider.sampling_params import SamplingParams

AGREED = "agreed"
"""Who spoke, in the sums of a trace, where all states would have said much the same."""

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
        trace: tell of each token which state spoke.
    """

    weights: Mapping[str, float] | None = None
    merge: str | None = None
    gate: str | None = None
    cut: float | None = None
    gating_weights: tuple[float, ...] | None = None
    trace: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    """One request for `n` answers to one prompt.

    Exactly one of `messages` (a chat, rendered by the engine's template) and `prompt` (text, or
    token ids, taken as they are) is given.

    Attributes:
        model: the mixture as typed, without LiteLLM's `mrss/`.
        timeout_s: for the whole answer, seconds; None is the server's limit.
        given: a text that takes the place of the answer: its tokens are read, none is drawn. `n`
            is 1 then, and `sampling` has neither `max_tokens` nor `stop`.
        owner: who asks: the id of an API key, never the key; "" where no keys are in use. Set by
            the server, not by what was sent.
        max_prompt_len: longest prompt that the owner may send, in tokens; 0 is the engine's limit
            alone. Set by the server too.
        max_answer_len: most tokens that the owner may ask for; the same.
        session: a saved conversation that this goes on with: `messages` or `prompt` is what is new,
            and empty where the last answer goes on. `n` is 1 then.
        session_save: put the conversation after the answer in the place of the saved one.
    """

    model: str
    sampling: SamplingParams
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    n: int = 1
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    timeout_s: float | None = None
    given: str | None = None
    owner: str = ""
    max_prompt_len: int = 0
    max_answer_len: int = 0
    session: str | None = None
    session_save: bool = False

    def __post_init__(self) -> None:
        assert (self.messages is None) != (self.prompt is None)
        self._check_session()
        if self.given is not None:
            self._check_given(self.given)

    def _check_session(self) -> None:
        if self.session is None:
            if self.session_save:
                raise InvalidRequestError(
                    "mrss.save needs mrss.session, the id of the conversation that is saved",
                    param="mrss.save",
                )
        elif self.n != 1 or self.given is not None:
            key = "n" if self.n != 1 else "mrss.given"
            raise InvalidRequestError(
                f"a session goes on with one answer, which is not given; leave {key} out", param=key
            )

    def _check_given(self, given: str) -> None:
        if not given:
            raise InvalidRequestError("given must be a text, got ''", param="mrss.given")
        sampling = self.sampling
        for key, value, neutral in (
            ("n", self.n, 1),
            ("max_tokens", sampling.max_tokens, None),
            ("stop", sampling.stop, ()),
        ):
            if value != neutral:
                raise InvalidRequestError(
                    f"{key} must be left out with mrss.given, whose text is the one answer, whole; "
                    f"got {value!r}",
                    param=key,
                )


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
class TokenTrace:
    """What each state had to do with a token. Mappings are by state, in the order of the rows.

    The base is called `base`, also where no name says it but the rule or gate needs it. Logarithms
    are natural, numbers have 5 significant digits, and those beyond 9999 are written as that.

    Attributes:
        token_id: the token.
        token: its bytes; none for the end of the text.
        who: the state that spoke.
        agreed: whether all would have said much the same, so that `who` says nothing.
        weights: the gate's weights for this token.
        logprob: the token's log-probability under each state alone.
        merged_logprob: under the merge, before penalties, temperature and truncation.
        r: each state's part in the token if the merge were linear with these weights; sums to 1.
        r_is_exact: whether it is, so that `r` is the probability that the state said it.
        additive: the terms of a rule that adds log-probabilities: `merged_logprob` is their sum
            minus `log_z`. None for other rules.
        log_z: what normalises them; None also where the cut has removed the token.
        loo: leave-one-out: how much of `merged_logprob` is gone without the state. None for the
            base of `delta` and `contrast`, and where no other state has weight.
        kl: from the state to the merge: `KL(p_state || p)`; None where nothing of it is left.
        kl_base: from the state to the base: `KL(p_state || p_base)`; None without a base.
        entropy: of each state.
        merged_entropy: of the merge.
        disagreement: of the states that the name names, by its ratios: in [0, log K].
        would_say: the likeliest token of each state.
    """

    token_id: int
    token: bytes
    who: str
    agreed: bool
    weights: Mapping[str, float]
    logprob: Mapping[str, float]
    merged_logprob: float
    r: Mapping[str, float]
    r_is_exact: bool
    additive: Mapping[str, float] | None
    log_z: float | None
    loo: Mapping[str, float | None]
    kl: Mapping[str, float | None]
    kl_base: Mapping[str, float] | None
    entropy: Mapping[str, float]
    merged_entropy: float
    disagreement: float
    would_say: Mapping[str, bytes]


@dataclass(frozen=True)
class TraceSummary:
    """The trace of a whole answer.

    Attributes:
        spoken_share: state -> share of the tokens that are its own, and "agreed" -> share of
            those that all agree on; sums to 1.
        influence_half_life: state -> tokens until its `kl_base` has halved, by a straight line
            through its logarithm; None where it does not fall, or there is no base.
    """

    spoken_share: Mapping[str, float]
    influence_half_life: Mapping[str, float | None]


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
        trace: one entry a token, when asked for.
        trace_summary: with `finish_reason`, when asked for.
    """

    index: int = 0
    text: str = ""
    num_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    trace: tuple[TokenTrace, ...] = ()
    trace_summary: TraceSummary | None = None


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
    after the end, and needs no await of the engine. Whoever reads late, as the server does when it
    has many streams, gets what has come in few deltas.
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


@dataclass(frozen=True)
class CacheStats:
    """What a cache of states has done since the start, and holds now.

    Attributes:
        hits: requests that began with states of the cache.
        misses: those that might have and did not.
        hit_tokens: prompt tokens that did not have to be read.
        num_entries: snapshots held.
        device_bytes: what they take on the device.
        ram_bytes: the same in memory.
        disk_bytes: the same on disk.
    """

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    num_entries: int = 0
    device_bytes: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Gauges of this moment, and totals since the start.

    Attributes:
        num_waiting: requests without rows.
        num_running: requests with rows.
        num_rows: rows that are held.
        num_free_rows: rows that nobody holds.
        num_steps: steps launched.
        num_prompt_tokens: tokens read of prompts.
        num_sampled_tokens: tokens drawn.
        cache: of states, where there is one.
        device_bytes: memory of the device that is in use by us; 0 on a CPU.
        device_bytes_total: memory that the device has; 0 on a CPU.
    """

    num_waiting: int
    num_running: int
    num_rows: int
    num_free_rows: int
    num_steps: int
    num_prompt_tokens: int
    num_sampled_tokens: int
    cache: CacheStats | None = None
    device_bytes: int = 0
    device_bytes_total: int = 0


@runtime_checkable
class Observable(Protocol):
    """A backend that tells how it is doing."""

    def stats(self) -> EngineStats | None:
        """Return the numbers of this moment, without waiting; None while nothing is loaded."""
        ...


@dataclass(frozen=True)
class SessionInfo:
    """What there is to know of a saved conversation.

    Attributes:
        owner: whose it is; nobody else sees it.
        mixture: canonical name.
        num_tokens: of the conversation so far.
        num_bytes: that it takes.
        created: Unix time in seconds.
        updated: of the last answer that was saved.
    """

    id: str
    owner: str
    mixture: str
    num_tokens: int
    num_bytes: int
    created: int
    updated: int


@runtime_checkable
class KeepsSessions(Protocol):
    """A backend that saves conversations: `GenerateRequest.session` goes on with one.

    A session that is not there and one of another owner are the same `NotFoundError`.
    """

    async def create_session(self, request: GenerateRequest) -> SessionInfo:
        """Read a prompt, or a chat up to where the next turn begins, and save what the rows are.

        Raises:
            MRSSError: what `Backend.open` raises, or the owner has too many sessions.
        """
        ...

    async def session(self, session_id: str, owner: str) -> SessionInfo:
        """Return one of the owner's sessions."""
        ...

    async def sessions(self, owner: str) -> list[SessionInfo]:
        """Return the owner's sessions, the oldest first."""
        ...

    async def fork_session(self, session_id: str, owner: str) -> SessionInfo:
        """Save the same conversation once more, under another id."""
        ...

    async def export_session(self, session_id: str, owner: str) -> bytes:
        """Return a session as a safetensors file with a checksum, for `import_session`."""
        ...

    async def import_session(self, data: bytes, owner: str) -> SessionInfo:
        """Save what `export_session` returned, of any owner, under a new id.

        Raises:
            StateFileError: damaged, or of another model.
            PayloadTooLargeError: more than an owner may save.
        """
        ...

    async def delete_session(self, session_id: str, owner: str) -> None:
        """Forget a session."""
        ...


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
