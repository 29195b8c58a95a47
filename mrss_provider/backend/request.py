"""What a front end asks for: messages, tools, a grammar, and the `GenerateRequest` around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mrss_provider.errors import InvalidRequestError, shown
from mrss_provider.sampling_params import SamplingParams

Role = Literal["system", "user", "assistant", "tool"]
Reinject = Literal["never", "turn"]


@dataclass(frozen=True)
class ToolCall:
    """A call of a function, as the assistant made it.

    Attributes:
        id: what the tool's answer refers to.
        name: of the function.
        arguments: a JSON object, as text.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn of a chat, its text already joined from the OpenAI content parts.

    Attributes:
        role: who speaks; `tool` is the answer of a function.
        content: the text.
        tool_calls: what the assistant called in this turn.
        tool_call_id: the call that a tool's message answers.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: of the function.
        description: what it is for; may be empty.
        parameters: JSON Schema of its arguments, an object.
        strict: whether its arguments must follow the schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True)
class ToolChoice:
    """Whether tools are called.

    Attributes:
        mode: `none` never, `auto` as the model likes, `required` at least one.
        name: the only one that may be called; `mode` is `required` then.
        parallel: whether one answer may have several calls.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    parallel: bool = True


@dataclass(frozen=True)
class Grammar:
    """What every answer that ends by itself conforms to.

    Attributes:
        kind: how `text` says it: a JSON Schema (as JSON text), a regular expression that matches
            the whole answer, or a Lark grammar whose start rule is `start`.
        text: the schema, expression or grammar.
        param: the key of the request that asked for it, for errors.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    param: str = "response_format"


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
        reinject: whether tuned states are given anew to their rows: never, or where a turn of the
            user's begins, but for the first; None is as the named mixture says, else there where
            the mixture has the base's row anyway.
    """

    weights: Mapping[str, float] | None = None
    merge: str | None = None
    gate: str | None = None
    cut: float | None = None
    gating_weights: tuple[float, ...] | None = None
    trace: bool = False
    reinject: Reinject | None = None


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
        grammar: what the answer conforms to; None is any text.
        tools: functions that the model is told of; none in a text completion.
        tool_choice: whether it calls them.
        thinking: whether it thinks before it answers; None is what the template does by itself.
        echo: each answer's text begins with the prompt, and its log-probabilities, where they are
            asked for, with those of the prompt's tokens. `sampling.max_tokens` may be 0 then: no
            answer follows. The prompt is no chat's.
        best_of: so many answers are made, and the `n` with the highest mean log-probability of
            their tokens are given, the best first, each whole; None is `n`.
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
    grammar: Grammar | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    thinking: bool | None = None
    echo: bool = False
    best_of: int | None = None

    def __post_init__(self) -> None:
        assert (self.messages is None) != (self.prompt is None)
        assert self.messages is None or not self.echo
        if self.prompt is not None:
            _check_kind(self.prompt, "prompt")
        _check_count(self.n, "n")
        if self.best_of is not None:
            _check_count(self.best_of, "best_of")
        self._check_session()
        self._check_echo()
        self._check_best_of()
        if self.given is not None:
            self._check_given(self.given)
        if self.grammar is not None and self.sampling.ignore_eos:
            raise InvalidRequestError(
                f"ignore_eos must be false with {self.grammar.param}, whose answers end",
                param="ignore_eos",
            )

    @property
    def num_answers(self) -> int:
        """How many answers are made."""
        return self.n if self.best_of is None else self.best_of

    def _check_echo(self) -> None:
        if self.sampling.max_tokens == 0 and not self.echo:
            raise InvalidRequestError(
                "max_tokens must be an integer in [1, 2147483647], got 0; only a completion with "
                "echo, which is its prompt then, may have none",
                param="max_tokens",
            )
        for key, value in (("mrss.given", self.given), ("mrss.session", self.session)):
            if self.echo and value is not None:
                raise InvalidRequestError(
                    f"{key} must be left out with echo: what it stands for is no prompt of this "
                    "request",
                    param=key,
                )

    def _check_best_of(self) -> None:
        if self.best_of is None:
            return
        if self.best_of < self.n:
            raise InvalidRequestError(
                f"best_of must be at least n, which is {self.n}, got {self.best_of}",
                param="best_of",
            )
        if self.best_of > 1 and (self.session is not None or self.given is not None):
            raise InvalidRequestError(
                "best_of must be left out where there is one answer only: with mrss.session and "
                f"with mrss.given; got {self.best_of}",
                param="best_of",
            )

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
            (self.grammar.param, self.grammar.text, "") if self.grammar else ("grammar", "", ""),
        ):
            if value != neutral:
                raise InvalidRequestError(
                    f"{key} must be left out with mrss.given, whose text is the one answer, whole; "
                    f"got {value!r:.80}",
                    param=key,
                )


def _check_kind(text: object, where: str) -> None:
    """Refuse what is neither text nor token ids; which ids there are, the model says."""
    if not isinstance(text, str | tuple | list):
        raise InvalidRequestError(
            f"{where} must be text or a tuple of token ids, got {shown(text)}", param=where
        )


def _check_count(value: object, where: str) -> None:
    if type(value) is not int or value < 1:
        raise InvalidRequestError(
            f"{where} must be an integer above 0, got {shown(value)}", param=where
        )


@dataclass(frozen=True)
class EmbedRequest:
    """One request for a vector of each of several texts.

    Attributes:
        model: one state, `base`, or a mixture that needs one recurrent state, as typed.
        inputs: texts, or token ids, taken as they are; none is empty.
        pooling: what of the hidden states becomes the vector: their mean over all tokens, or the
            last one.
        dimensions: leading components that are kept; None is all.
        timeout_s: for all of them, seconds; None is the server's limit.
        owner: who asks, as in `GenerateRequest`.
        max_prompt_len: longest input that the owner may send, in tokens; 0 is the engine's limit.
    """

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    pooling: Literal["mean", "last"] = "mean"
    dimensions: int | None = None
    timeout_s: float | None = None
    owner: str = ""
    max_prompt_len: int = 0

    def __post_init__(self) -> None:
        for i, text in enumerate(self.inputs):
            _check_kind(text, f"input[{i}]")
