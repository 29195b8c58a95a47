"""What one key may use at a time and in a minute: reserved on arrival, settled at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from mrss_provider.backend import EmbedRequest, GenerateRequest
from mrss_provider.config import ServerConfig
from mrss_provider.errors import RateLimitError
from mrss_provider.sampling_params import DEFAULT_MAX_TOKENS
from mrss_provider.server.auth import Caller
from mrss_provider.server.keys import Limits

# Of the World vocabulary on English text; what was really read is settled.
_CHARS_A_TOKEN = 4
# How soon a request of another may have ended.
_SOON_S = 1.0


class Allowance:
    """What a key has left. Belongs to one event loop.

    Tokens come back evenly, up to a minute's worth. Who has a minute's worth left may ask for more
    than that once, and then waits until it is paid back: on average nobody gets more.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_running = 0
        self._clock = clock
        self._limits = Limits()
        self._level = 0.0
        self._when = clock()

    @contextmanager
    def taken(self, limits: Limits, num_tokens: int) -> Iterator[Reservation]:
        """Take a place, and `num_tokens` tokens, until the request has ended.

        Raises:
            RateLimitError: the key has not got them.
        """
        self._refill(limits)
        if limits.max_concurrent and self.num_running >= limits.max_concurrent:
            raise RateLimitError(
                f"this key may have {limits.max_concurrent} requests under way and has as many; "
                "wait for one to end",
                retry_after_s=_SOON_S,
                headers=self.headers(),
            )
        reserved = float(min(num_tokens, limits.tokens_per_minute))
        if reserved > self._level:
            raise RateLimitError(
                f"this key may use {limits.tokens_per_minute} tokens a minute and has "
                f"{max(0, int(self._level))} left; this request may use {num_tokens}: wait, or "
                "ask for fewer (max_tokens)",
                retry_after_s=self._seconds_for(reserved),
                headers=self.headers(),
            )
        self._level -= reserved
        self.num_running += 1
        reservation = Reservation()
        try:
            yield reservation
        finally:
            self.num_running -= 1
            # The limits of now: those of then, if they have changed, would begin a new minute.
            self._refill(self._limits)
            if self._limits.tokens_per_minute:
                back = self._level + reserved - reservation.num_used
                self._level = min(back, float(self._limits.tokens_per_minute))

    def headers(self) -> dict[str, str]:
        """Return what is left, under OpenAI's names; nothing is said of what has no limit."""
        limits, told = self._limits, {}
        if limits.max_concurrent:
            left = limits.max_concurrent - self.num_running
            told["x-ratelimit-limit-requests"] = str(limits.max_concurrent)
            told["x-ratelimit-remaining-requests"] = str(max(0, left))
        if limits.tokens_per_minute:
            seconds = self._seconds_for(limits.tokens_per_minute)
            told["x-ratelimit-limit-tokens"] = str(limits.tokens_per_minute)
            told["x-ratelimit-remaining-tokens"] = str(max(0, int(self._level)))
            told["x-ratelimit-reset-tokens"] = f"{seconds:.3g}s"
        return told

    def _refill(self, limits: Limits) -> None:
        now = self._clock()
        size = float(limits.tokens_per_minute)
        if limits.tokens_per_minute != self._limits.tokens_per_minute:
            # A new key, or a new limit, begins with a whole minute's worth.
            self._level = size
        self._level = min(size, self._level + (now - self._when) * size / 60)
        self._limits, self._when = limits, now

    def _seconds_for(self, level: float) -> float:
        rate = self._limits.tokens_per_minute / 60
        return max(0.0, (level - self._level) / rate)


class Reservation:
    """What a request that is under way has used so far; set by whoever counts."""

    def __init__(self) -> None:
        self.num_used = 0


class Allowances:
    """The allowance of each key."""

    def __init__(self) -> None:
        self._by_id: dict[str, Allowance] = {}

    def of(self, caller: Caller) -> Allowance:
        """Return a caller's; it outlives a reload of the keys."""
        found = self._by_id.get(caller.id)
        if found is None:
            found = self._by_id[caller.id] = Allowance()
        return found


def limited(request: GenerateRequest, caller: Caller, config: ServerConfig) -> GenerateRequest:
    """Return `request` with its owner, its lengths' limits and its deadline."""
    limits = caller.limits
    return replace(
        request,
        owner=caller.id,
        timeout_s=request.timeout_s or config.request_timeout_s,
        max_prompt_len=_lower(limits.max_prompt_len, config.max_prompt_len),
        max_answer_len=_lower(limits.max_answer_len, config.max_answer_len),
    )


def limited_inputs(request: EmbedRequest, caller: Caller, config: ServerConfig) -> EmbedRequest:
    """Return `request` with its owner, its inputs' limit and its deadline."""
    return replace(
        request,
        owner=caller.id,
        timeout_s=request.timeout_s or config.request_timeout_s,
        max_prompt_len=_lower(caller.limits.max_prompt_len, config.max_prompt_len),
    )


def num_tokens_of_inputs(request: EmbedRequest) -> int:
    """Return about how many tokens a request has read."""
    return sum(map(_text_len, request.inputs))


def num_tokens_of(requests: Sequence[GenerateRequest]) -> int:
    """Return about how many tokens requests may use, their prompts and answers together."""
    return sum(
        _prompt_len(request) + request.num_answers * _answer_len(request) for request in requests
    )


def _prompt_len(request: GenerateRequest) -> int:
    if request.prompt is not None:
        return _text_len(request.prompt)
    return math.ceil(sum(len(m.content) for m in request.messages or ()) / _CHARS_A_TOKEN)


def _text_len(text: str | tuple[int, ...]) -> int:
    return len(text) if isinstance(text, tuple) else math.ceil(len(text) / _CHARS_A_TOKEN)


def _answer_len(request: GenerateRequest) -> int:
    if request.given is not None:
        return math.ceil(len(request.given) / _CHARS_A_TOKEN)
    most = request.sampling.max_tokens
    return _lower(DEFAULT_MAX_TOKENS, request.max_answer_len) if most is None else most


def _lower(a: int, b: int) -> int:
    """Return the lower of two limits; 0 is none."""
    return min(a, b) if a and b else a or b
