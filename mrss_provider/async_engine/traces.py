"""Traces in words: rows become names of states, ids become text; and the sums of an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from mrss_provider.backend import AGREED, TokenTrace, TraceSummary
from mrss_provider.engine.trace import RowsTrace

T = TypeVar("T")

# Below it a divergence is rounding noise, whose logarithm would bend every line.
_LEAST_DIVERGENCE = 1e-4
# A line through fewer points tells nothing.
_FEWEST_POINTS = 8


class Tracer:
    """Words the traces of one answer and sums them up; memory does not grow with the answer.

    Args:
        names: of the mixture's rows. A token's trace may have fewer: a row without any weight need
            not be computed.
        token_bytes: id -> its bytes.
    """

    def __init__(self, names: Sequence[str], token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._num_tokens = 0
        self._spoken = dict.fromkeys((*names, AGREED), 0)
        self._fades = {name: HalfLife() for name in names}

    def add(self, trace: RowsTrace) -> TokenTrace:
        """Count a token, and return its trace in words, its numbers in 5 significant digits."""
        names = trace.names
        who = names[trace.who]
        self._spoken[AGREED if trace.agreed else who] += 1
        for name, divergence in zip(names, trace.from_base or (), strict=False):
            self._fades[name].add(self._num_tokens, divergence)
        self._num_tokens += 1
        return TokenTrace(
            token_id=trace.token_id,
            token=self._token_bytes(trace.token_id),
            who=who,
            agreed=trace.agreed,
            weights=_numbers(names, trace.weights),
            logprob=_numbers(names, trace.log_probs),
            merged_logprob=_short(trace.merged_log_prob),
            r=_numbers(names, trace.responsibilities),
            r_is_exact=trace.is_exact,
            additive=None if trace.additive is None else _numbers(names, trace.additive),
            log_z=None if trace.log_z is None else _short(trace.log_z),
            loo=_known_numbers(names, trace.leave_one_out),
            kl=_known_numbers(names, trace.divergences),
            kl_base=None if trace.from_base is None else _numbers(names, trace.from_base),
            entropy=_numbers(names, trace.entropies),
            merged_entropy=_short(trace.merged_entropy),
            disagreement=_short(trace.disagreement),
            would_say=_by_name(names, [self._token_bytes(i) for i in trace.would_say]),
        )

    def summary(self) -> TraceSummary:
        """Return what the tokens so far come to."""
        total = max(1, self._num_tokens)
        shares = {name: _short(count / total) for name, count in self._spoken.items()}
        fades = [fade.tokens() for fade in self._fades.values()]
        return TraceSummary(shares, _known_numbers(tuple(self._fades), fades))


class HalfLife:
    """The half-life of a value that fades: least squares of its logarithm, from running sums."""

    def __init__(self) -> None:
        self._count = 0
        self._sum_t = self._sum_y = self._sum_tt = self._sum_ty = 0.0

    def add(self, t: int, value: float) -> None:
        """Take the value at time `t`."""
        y = math.log(max(value, _LEAST_DIVERGENCE))
        self._count += 1
        self._sum_t += t
        self._sum_y += y
        self._sum_tt += t * t
        self._sum_ty += t * y

    def tokens(self) -> float | None:
        """Return the steps in which the value halves; None if it does not fall, or is unknown."""
        if self._count < _FEWEST_POINTS:
            return None
        spread = self._count * self._sum_tt - self._sum_t**2
        slope = (self._count * self._sum_ty - self._sum_t * self._sum_y) / spread
        # A slope of rounding noise is none.
        return -math.log(2.0) / slope if slope < -1e-9 else None


def _numbers(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return _by_name(names, [_short(value) for value in values])


def _known_numbers(names: Sequence[str], values: Sequence[float | None]) -> dict[str, float | None]:
    return _by_name(names, [None if value is None else _short(value) for value in values])


def _by_name(names: Sequence[str], values: Sequence[T]) -> dict[str, T]:
    return dict(zip(names, values, strict=True))


def _short(value: float) -> float:
    return float(f"{value:.5g}")
