"""What comes back: deltas of text, reasoning and tool calls, with all that belongs to a token."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

AGREED = "agreed"
"""Who spoke, in the sums of a trace, where all states would have said much the same."""

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class TopLogprob:
    """A token that could have come next, and its log-probability (nats)."""

    token_id: int
    token: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """The chosen token's log-probability under the merge, before penalties, and the best few.

    An echoed prompt's tokens have theirs too; the first one's is None, as nothing comes before it.
    """

    token_id: int
    token: bytes
    logprob: float | None
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
    """Token counts of a request. Each token counts once, however many rows read it.

    Attributes:
        prompt_tokens: of the prompt.
        completion_tokens: of all answers, thoughts and calls among them.
        cached_tokens: of the prompt, that no row had to read.
        reasoning_tokens: of the answers, that were thoughts.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

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
            self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a call. The first one of a call has `id` and `name`, each adds to `arguments`.

    Attributes:
        position: which of the answer's calls.
        id: what the tool's answer is to refer to.
        name: of the function.
        arguments: new text of the arguments, which are together a JSON object.
    """

    position: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


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
        reasoning: new text of what the model thinks before it answers; as `text`.
        tool_calls: pieces of calls.
    """

    index: int = 0
    text: str = ""
    num_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    trace: tuple[TokenTrace, ...] = ()
    trace_summary: TraceSummary | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


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


class TextPiece(NamedTuple):
    """A piece of an answer that is text and nothing else, as most are: see `Delta`.

    Attributes:
        choice: which of the `n` answers.
        text: new text.
        num_tokens: how many sampled tokens it accounts for.
    """

    choice: int
    text: str
    num_tokens: int


class CallsReaders(DeltaStream, Protocol):
    """A `DeltaStream` that can be read by plain calls, which cost less than a task's turn.

    Both methods belong to the reader's event loop; nobody awaits the stream meanwhile.
    """

    def take_text(self) -> TextPiece | None:
        """Return the next delta if it is here and is text only; else None, and nothing is taken."""
        ...

    def call_when_ready(self, call: Callable[[], None] | None) -> None:
        """Call `call` once when `ready` becomes true, which it is not now; None takes that back."""
        ...


@dataclass(frozen=True)
class Embeddings:
    """The vectors of an `EmbedRequest`, in the order of its inputs.

    Attributes:
        mixture: canonical name of the state.
        fingerprint: `system_fingerprint` of weights and state.
        vectors: each of length 1, as C floats.
        num_tokens: of all inputs.
    """

    mixture: str
    fingerprint: str
    vectors: tuple[array[float], ...]
    num_tokens: int


@dataclass(frozen=True)
class Tokens:
    """What the engine reads for a text or a chat.

    Attributes:
        token_ids: in order.
        context_len: how many of them there may be at most, an answer's among them.
    """

    token_ids: tuple[int, ...]
    context_len: int
