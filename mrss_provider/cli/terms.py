"""States with weights, as several commands take them: what else a mixture's name has is refused."""

from __future__ import annotations

from collections.abc import Sequence

from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import Term, parse_mixture


def read_terms(texts: Sequence[str], what: str, param: str) -> tuple[Term, ...]:
    """Read `knowledge`, `tone:0.3`, ..., one term or more a text.

    Args:
        texts: at least one.
        what: takes them, for the message: an option or a command.
        param: of the error.

    Raises:
        InvalidRequestError: no terms, or a model, a merge rule or a gate behind them.
    """
    named = parse_mixture("+".join(texts))
    if named.model or named.merge or named.gate:
        raise InvalidRequestError(
            f"{what} takes states and weights only, such as knowledge:0.7, got {'+'.join(texts)!r}",
            param=param,
        )
    return named.terms
