"""LazyRows: which rows of an answer the next token needs, and what the others have missed.

A row that has no weight sleeps: it keeps its slot and its state, and reads what was said meanwhile
when it is needed again, many tokens at a time. That is possible where the weights are known without
the rows: under the gates of `GATES`, and under the merge rule `route` between two probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mrss_provider.engine.merges import make_merge
from mrss_provider.engine.request import EngineRequest, ResolvedMixture

GATES = ("fixed", "schedule", "posterior")
"""Gates whose weights are known before any row of the token is computed."""

MIN_SHARE = 1e-3
"""Under `linear` a row with less of the weights' sum sleeps: the merged distribution moves by no
more than what sleeps (total variation). Under the other rules nothing but 0 is small enough."""


@dataclass(frozen=True)
class LazyPolicy:
    """When rows may sleep.

    Attributes:
        probe_len: tokens after which `route` computes all rows and lets a gate that looks at them
            choose anew; 0 is every token, with no row asleep.
        min_share: see `MIN_SHARE`.
    """

    probe_len: int = 0
    min_share: float = MIN_SHARE


class LazyRows:
    """The rows of one answer.

    Attributes:
        awake: rows of the step that was planned last, ascending.
        tokens: the answer's committed tokens.
    """

    def __init__(self, mixture: ResolvedMixture, policy: LazyPolicy) -> None:
        """Begin with all rows awake, at the end of the prompt; see `make_lazy_rows`."""
        self.awake: tuple[int, ...] = tuple(range(mixture.rows))
        self.tokens: list[int] = []
        self._policy = policy
        self._probe_len = 0 if mixture.gate.name in GATES else policy.probe_len
        self._chosen = 0
        self._num_read = [0] * mixture.rows
        self._last: tuple[ResolvedMixture, ResolvedMixture] = (mixture, mixture)

    def is_probe(self, position: int) -> bool:
        """Tell whether the gate chooses a row at this position of the answer."""
        return self._probe_len > 0 and position % self._probe_len == 0

    def choose(self, mixture: ResolvedMixture, position: int) -> ResolvedMixture:
        """Decide which rows are awake for the token at `position`.

        Args:
            mixture: all rows, with the weights of the moment.
            position: in the answer. At 0 the prompt has been read by all rows, and all speak.

        Returns:
            The mixture of those rows.
        """
        if position == 0 or self.is_probe(position):
            awake = tuple(range(mixture.rows))
        elif self._probe_len:
            awake = (self._chosen,)
        else:
            awake = needed_rows(mixture, self._policy.min_share)
        if self._last[0] is not mixture or self.awake != awake:
            self._last = (mixture, only(mixture, awake))
        self.awake = awake
        return self._last[1]

    def missed(self, position: int) -> list[tuple[int, int, int]]:
        """Return (row, start, stop) of what awake rows must read before they decode `position`.

        The token before that one is read in the step itself.
        """
        stop = position - 1
        return [(k, self._num_read[k], stop) for k in self.awake if self._num_read[k] < stop]

    def has_read(self, row: int, num_tokens: int) -> None:
        """Note that after the steps planned a row will have read so much of the answer."""
        self._num_read[row] = num_tokens

    def decode(self, position: int) -> None:
        """Note that the awake rows read one token more, and pick the one at `position`."""
        for row in self.awake:
            self._num_read[row] = position

    def is_level(self, num_tokens: int) -> bool:
        """Tell whether all rows have read so much of the answer after the steps planned."""
        return all(read == num_tokens for read in self._num_read)

    def take_up(self, answer: Sequence[int]) -> None:
        """Go on with an answer that all rows have read but for its last token."""
        self.tokens = list(answer)
        self._num_read = [len(answer) - 1] * len(self._num_read)

    def commit(self, token_id: int, loudest: int | None) -> None:
        """Take in a token, and the row that the gate chose if it was a probe."""
        self.tokens.append(token_id)
        if loudest is not None:
            self._chosen = loudest


def make_lazy_rows(request: EngineRequest, policy: LazyPolicy | None) -> LazyRows | None:
    """Return what keeps the rows of one answer to `request`; None if none may sleep.

    A trace tells of every row at every token. A cut listens to all named rows, with or without
    weight, and a posterior of its own samples to all of them. `novelty`, `confidence` and what is
    learned look at every row.
    """
    mixture = request.mixture
    if policy is None or mixture.rows == 1 or request.trace or mixture.cut > 0:
        return None
    if mixture.gate.parameters.get("own"):
        return None
    is_probed = mixture.merge.name == "route" and policy.probe_len > 1
    return LazyRows(mixture, policy) if mixture.gate.name in GATES or is_probed else None


def needed_rows(mixture: ResolvedMixture, min_share: float) -> tuple[int, ...]:
    """Return the rows without which the merged distribution would be another, ascending."""
    weights = mixture.weights
    if mixture.merge.name == "route":
        # The first of equals, as the rule has it.
        return (max(range(len(weights)), key=weights.__getitem__),)
    limit = min_share * sum(weights) if mixture.merge.name == "linear" else 0.0
    rule = make_merge(mixture.merge)
    needed = [
        k
        for k, w in enumerate(weights)
        if (w != 0 and abs(w) >= limit) or (k == 0 and rule.anchored)
    ]
    # One row alone comes back as it is, so without another it would lose an exponent above 1.
    is_bent = len(needed) == 1 and not (rule.anchored or rule.sums_to_one)
    if is_bent and weights[needed[0]] > 1:
        needed = sorted((needed[0], 0 if needed[0] else 1))
    return tuple(needed or range(len(weights)))


def only(mixture: ResolvedMixture, rows: Sequence[int]) -> ResolvedMixture:
    """Return the mixture of some of its rows; weights that sum to 1 do so again."""
    if len(rows) == mixture.rows:
        return mixture
    weights = [mixture.weights[k] for k in rows]
    dropped = sum(mixture.weights) - sum(weights)
    # Without need a division could change the last bit of every weight.
    if dropped and make_merge(mixture.merge).sums_to_one:
        weights = [weight / sum(weights) for weight in weights]
    return replace(
        mixture,
        states=tuple(mixture.states[k] for k in rows),
        names=tuple(mixture.names[k] for k in rows),
        groups=tuple(mixture.groups[k] for k in rows),
        ratios=tuple(mixture.ratios[k] for k in rows),
        weights=tuple(weights),
        base_row=0 if mixture.base_row == 0 and rows[0] == 0 else None,
    )
