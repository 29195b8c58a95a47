"""SamplingParams: how one token is drawn, validated when built. A leaf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mrss_provider.errors import InvalidRequestError, shown

SamplingOrder = Literal["openai", "rwkv"]

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 1024
MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """Everything after the merge: penalties, temperature, truncation, stops, the seed.

    None means "not said by the request": the named mixture's value, then the model's, then
    the engine's default (`resolve_sampling` there) takes its place.

    Attributes:
        temperature: >= 0; 0 is greedy.
        top_p: in (0, 1]; 1 is off.
        top_k: >= 0; 0 is off (-1 is accepted as 0, as vLLM's users send it).
        min_p: in [0, 1]; 0 is off.
        presence_penalty: in [-2, 2], subtracted once from tokens that occurred in the answer.
        frequency_penalty: in [-2, 2], subtracted for each occurrence in the answer.
        repetition_penalty: in (0, 10]; divides positive logits, multiplies negative ones, of
            tokens that occurred in the prompt or the answer; 1 is off.
        penalty_decay: in (0, 1]; the occurrences that `frequency_penalty` counts are multiplied
            by it at each step; 1 is off.
        logit_bias: token id -> bias in [-100, 100]; -100 bans the token.
        seed: any 64-bit integer; None draws a fresh one.
        max_tokens: >= 0; 0 is no answer, for requests that want something of their prompt.
        stop: strings that end the answer and are not part of it.
        ignore_eos: go on past the end-of-text token (benchmarks).
        sampling_order: "openai": temperature, then top-k, top-p, min-p; "rwkv": truncation on
            the untempered distribution, then temperature (power 1/T).
        logprobs: return the chosen tokens' log-probabilities (of the merge, before penalties).
        top_logprobs: in [0, 20], alternatives a token; needs `logprobs`.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    penalty_decay: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    sampling_order: SamplingOrder | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None:
            _check_range("temperature", self.temperature, 0.0, 100.0)
        if self.top_p is not None:
            _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        _check_range("penalty_decay", self.penalty_decay, 0.0, 1.0, low_open=True)
        self._check_logit_bias()
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        self._check_stop()
        _check_bool("ignore_eos", self.ignore_eos)
        if self.sampling_order not in (None, "openai", "rwkv"):
            raise InvalidRequestError(
                f"sampling_order must be 'openai' or 'rwkv', got {self.sampling_order!r}",
                param="sampling_order",
            )
        _check_bool("logprobs", self.logprobs)
        _check_int("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs needs logprobs to be true", param="top_logprobs"
            )

    @property
    def has_penalties(self) -> bool:
        """Whether any occurrence-based penalty is on."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequestError(
                f"logit_bias must be a mapping: token id -> bias, got {shown(self.logit_bias)}",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            is_integer = isinstance(token_id, int) and not isinstance(token_id, bool)
            if not is_integer or not 0 <= token_id < 2**31:
                raise InvalidRequestError(
                    f"logit_bias keys are token ids, got {shown(token_id)}", param="logit_bias"
                )
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0, param="logit_bias")

    def _check_stop(self) -> None:
        if not isinstance(self.stop, tuple | list):
            raise InvalidRequestError(
                f"stop must be a tuple of strings, got {shown(self.stop)}", param="stop"
            )
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequestError(
                f"stop takes at most {MAX_STOPS} strings, got {len(self.stop)}", param="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise InvalidRequestError(
                    f"a stop string has 1 to {MAX_STOP_CHARS} characters, got {shown(text)}",
                    param="stop",
                )


def _check_range(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    param: str | None = None,
) -> None:
    allowed = f"{'(' if low_open else '['}{low:g}, {high:g}]"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN fails the comparison, and so do integers too large for a float.
    inside = is_number and low <= value <= high  # type: ignore[operator]
    if not inside or (low_open and value == low):
        raise InvalidRequestError(
            f"{name} must be in {allowed}, got {shown(value)}", param=param or name
        )


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(
            f"{name} must be an integer in [{low}, {high}], got {shown(value)}", param=name
        )


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be true or false, got {shown(value)}", param=name)
