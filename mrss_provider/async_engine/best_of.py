"""BestOf: several answers are made, and those given that the model finds likeliest."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from functools import reduce

from mrss_provider.backend import Delta, DeltaStream, GenerateRequest


def widened(request: GenerateRequest) -> GenerateRequest:
    """Return the request for all answers among which `BestOf` chooses."""
    assert request.best_of is not None
    sampling = replace(request.sampling, logprobs=True)
    return replace(request, n=request.best_of, best_of=None, sampling=sampling)


@dataclass
class _Made:
    """An answer as far as it has come.

    Attributes:
        deltas: all of it, in order.
        num_tokens: that were sampled.
        total: sum of their log-probabilities.
    """

    deltas: list[Delta] = field(default_factory=list)
    num_tokens: int = 0
    total: float = 0.0

    def add(self, delta: Delta) -> None:
        """Add a piece; the tokens of an echoed prompt, before the sampled ones, do not count."""
        self.deltas.append(delta)
        self.num_tokens += delta.num_tokens
        sampled = delta.logprobs[len(delta.logprobs) - delta.num_tokens :]
        self.total += sum(token.logprob or 0.0 for token in sampled)

    @property
    def mean(self) -> float:
        """The mean log-probability of its tokens, as OpenAI compares answers by."""
        return self.total / max(1, self.num_tokens)


class BestOf:
    """A `DeltaStream` of the `n` best of `best_of` answers, each in one delta, the best first.

    The usage counts the tokens of all of them.

    Args:
        stream: of what `widened` asks for.
        request: as it was asked.
    """

    def __init__(self, stream: DeltaStream, request: GenerateRequest) -> None:
        self.info = stream.info
        self._stream = stream
        self._request = request
        self._chosen: deque[Delta] | None = None

    def __aiter__(self) -> BestOf:
        return self

    async def __anext__(self) -> Delta:
        if self._chosen is None:
            self._chosen = await self._choose()
        if not self._chosen:
            raise StopAsyncIteration
        return self._chosen.popleft()

    def ready(self) -> bool:
        """Whether the next delta, or the end, is already here."""
        return self._chosen is not None

    async def aclose(self) -> None:
        """Abort what still runs; idempotent."""
        self._chosen = deque()
        await self._stream.aclose()

    async def _choose(self) -> deque[Delta]:
        made: dict[int, _Made] = {}
        last: list[Delta] = []
        async for delta in self._stream:
            if delta.usage is not None:
                last.append(Delta(usage=delta.usage))
            else:
                made.setdefault(delta.index, _Made()).add(delta)
        # Of equals the earlier, so that a seed gives the same answer again.
        ranked = sorted(made.values(), key=lambda answer: -answer.mean)
        best = [
            replace(self._asked(reduce(_joined, answer.deltas)), index=index)
            for index, answer in enumerate(ranked[: self._request.n])
        ]
        return deque([*best, *last])

    def _asked(self, delta: Delta) -> Delta:
        """Return an answer without log-probabilities that nobody asked for."""
        return delta if self._request.sampling.logprobs else replace(delta, logprobs=())


def _joined(first: Delta, second: Delta) -> Delta:
    """Return two pieces of one completion, which has neither thoughts nor calls, as one."""
    return replace(
        second,
        text=first.text + second.text,
        num_tokens=first.num_tokens + second.num_tokens,
        logprobs=first.logprobs + second.logprobs,
        trace=first.trace + second.trace,
    )
