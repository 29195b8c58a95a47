"""Recovery: what goes on after a step that no memory was left for, and how; what failures tell.

Such a step may have moved some layers of its rows on and others not. So the newest of its requests
end, and the rows of the others begin anew: they read again what they had read, which is known.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable

from mrss_provider.engine.batch import Batch, Choice, Reread, Running
from mrss_provider.engine.reinjection import next_stop
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.errors import EngineError, MRSSError

log = logging.getLogger(__name__)


def parties(batch: Batch) -> list[Running]:
    """Return the requests that have a part in a step."""
    owners = [choice.owner for choice in batch.decoding]
    owners += [chunk.running for chunk in batch.chunks]
    owners += [piece.choice.owner for piece in batch.catching_up]
    owners += [piece.choice.owner for piece in batch.rereading]
    return list(dict.fromkeys(owners))


def not_finite(choice: Choice) -> EngineError:
    """Return what ends an answer whose rows gave numbers that are not finite."""
    return EngineError(
        f"the model gave numbers that are not finite after {choice.num_sampled} tokens of request "
        f"{choice.owner.request.id!r}; check the state files with `mrss states check`"
    )


def not_begun(request: EngineRequest, exc: Exception) -> list[TokenOutput]:
    """Return what ends the answers of a request that could not begin when it got its rows."""
    error = exc if isinstance(exc, MRSSError) else None
    if error is None:
        log.error("the request %s could not begin", request.id, exc_info=exc)
        told = f"{type(exc).__name__}: {exc}"
        error = EngineError(f"the request {request.id!r} could not begin: {told}")
    return [TokenOutput(request.id, index, None, error=error) for index in range(request.n)]


def split(running: Iterable[Running], involved: Collection[Running]) -> tuple[list[Running], ...]:
    """Return the older and the newer half of those `involved`, the newer at least as large.

    Args:
        running: all requests that hold slots, oldest first.
        involved: those of a step.
    """
    ordered = [each for each in running if each in involved]
    half = len(ordered) // 2
    return ordered[:half], ordered[half:]


class LostAnswers:
    """The answers that read their tokens again: one at a time, as memory is short."""

    def __init__(self) -> None:
        self._choices: deque[Choice] = deque()

    def add(self, choice: Choice) -> None:
        """Let an answer begin anew that has tokens; nothing is under way for it."""
        choice.lose_states()
        if choice not in self._choices:
            self._choices.append(choice)

    def deal(self, max_len: int) -> list[Reread]:
        """Deal at most `max_len` tokens a row to the next answer; nothing without one."""
        while self._choices and not self._choices[0].is_live:
            self._choices.popleft()
        if not self._choices:
            return []
        choice = self._choices[0]
        start = choice.num_reread
        assert start is not None
        # The last token is read in the step that decodes the next one.
        request = choice.owner.request
        tokens = [*request.prompt, *choice.answer[:-1]]
        stop = next_stop(request.reinjections, start, start + max_len)
        piece = Reread(choice, start, tokens[start:stop], is_first=choice.is_stateless)
        choice.num_reread = start + len(piece.tokens)
        choice.is_stateless = False
        if choice.num_reread == len(tokens):
            choice.num_reread = None
            self._choices.popleft()
        return [piece]
