"""What a server has done, counted in plain numbers on its event loop.

A delta costs a clock and two additions; names and labels are for whoever asks (`exposition.py`).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mrss_provider.backend import Delta, StreamInfo, Usage
from mrss_provider.errors import MRSSError

OTHER = "other"

# Mixtures that have a label of their own; a name can be anything that a caller types.
MAX_MIXTURES = 32
# Names that are remembered to find those: one that is not used again makes room.
_MAX_NAMES = 256

_FIRST_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_GAP_S = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 5.0)
_WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 600.0)


class Histogram:
    """Counts of values up to each of `bounds`, and of those above the last."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Metrics:
    """The counters of one server. Belongs to one event loop.

    Attributes:
        requests: by route and status.
        ends: of answers, by finish reason, error code, or "gone" where the client left.
        usage: tokens of answers that have ended, of broken ones too.
        first: seconds from a request to its first token.
        gap: seconds between two tokens of an answer.
        whole: seconds from a request to the end of its answer.
        num_stalled: clients that were dropped because they did not read.
        rows: rows that running answers have, by mixture.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.requests: Counter[tuple[str, int]] = Counter()
        self.ends: Counter[str] = Counter()
        self.usage = Usage(0, 0)
        self.first = Histogram(_FIRST_S)
        self.gap = Histogram(_GAP_S)
        self.whole = Histogram(_WHOLE_S)
        self.num_stalled = 0
        self.rows: Counter[str] = Counter()
        self._uses: Counter[str] = Counter()

    @contextmanager
    def answer(self) -> Iterator[Meter]:
        """Measure one answer, from its request to its end."""
        meter = Meter(self)
        try:
            yield meter
        finally:
            meter.end()

    def rows_by_mixture(self) -> dict[str, int]:
        """Return the rows of the mixtures that are used most, and of all others together."""
        named = {name for name, _ in self._uses.most_common(MAX_MIXTURES)}
        rows = dict.fromkeys(sorted(named), 0) | {OTHER: 0}
        for name, num in self.rows.items():
            rows[name if name in named else OTHER] += num
        return rows

    def use(self, mixture: str) -> None:
        """Count a use of a mixture's name."""
        if mixture not in self._uses and len(self._uses) >= _MAX_NAMES:
            # Space-saving (Metwally et al., 2005): the newcomer takes the place, and the count, of
            # the least used, so one that is used often is never forgotten.
            name, num = min(self._uses.items(), key=lambda item: item[1])
            del self._uses[name]
            self._uses[mixture] = num
        self._uses[mixture] += 1


class Meter:
    """Measures one answer.

    Attributes:
        info: what was known on admission; None before it.
        usage: as far as the answer has come.
        answer_id: what the answer is called; "" before it is admitted.
        error_code: of the error that ended it; "" without one.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.info: StreamInfo | None = None
        self.answer_id = ""
        self.error_code = ""
        self._metrics = metrics
        self._began = metrics.clock()
        self._rows = 0
        self._num_tokens = 0
        self._told: Usage | None = None
        self._finish_reason = ""
        self._last: dict[int, float] = {}

    @property
    def end_reason(self) -> str:
        """A finish reason, an error's code, or "gone" where nobody waited for the end."""
        # The usage is the last that a stream tells.
        return self.error_code or ("gone" if self._told is None else self._finish_reason)

    @property
    def usage(self) -> Usage:
        """Tokens so far: what the stream said, else what was counted."""
        if self._told is not None:
            return self._told
        return Usage(self.info.prompt_tokens if self.info else 0, self._num_tokens)

    def admit(self, info: StreamInfo, n: int, answer_id: str) -> None:
        """Note that the answer's `n` choices have their place."""
        self.info = info
        self.answer_id = answer_id
        self._rows = info.rows * n
        self._metrics.use(info.mixture)
        self._metrics.rows[info.mixture] += self._rows

    def add(self, delta: Delta) -> None:
        """Note a piece of the answer."""
        if delta.num_tokens:
            self.add_tokens(delta.index, delta.num_tokens)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
        if delta.usage is not None:
            self._told = delta.usage

    def add_tokens(self, index: int, num_tokens: int) -> None:
        """Note a piece of the answer that has tokens and is text only."""
        now = self._metrics.clock()
        last = self._last.get(index)
        if last is not None:
            self._metrics.gap.add((now - last) / num_tokens, num_tokens)
        elif not self._last:
            self._metrics.first.add(now - self._began)
        self._last[index] = now
        self._num_tokens += num_tokens

    def fail(self, error: MRSSError) -> None:
        """Note what ends the answer."""
        self.error_code = error.code

    def end(self) -> None:
        """Note the end, whatever it was."""
        metrics = self._metrics
        metrics.ends[self.end_reason] += 1
        if self.info is not None:
            metrics.whole.add(metrics.clock() - self._began)
            metrics.usage += self.usage
            metrics.rows[self.info.mixture] -= self._rows
            if not metrics.rows[self.info.mixture]:
                del metrics.rows[self.info.mixture]
