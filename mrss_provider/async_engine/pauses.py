"""Pauses: the tokens at which an answer may turn out to have ended."""

from __future__ import annotations

import functools

from mrss_provider.tokenizer import Tokenizer


@functools.lru_cache(maxsize=8)
def pause_ids(tokenizer: Tokenizer, stops: tuple[str, ...]) -> frozenset[int]:
    """Return the tokens that hold a stop string or may begin one.

    What an answer was before such a token is what a conversation goes on from.

    Args:
        tokenizer: ids to bytes.
        stops: of the chat template.
    """
    texts = [stop.encode() for stop in stops]
    return frozenset(
        token_id
        for token_id, token in tokenizer.entries().items()
        if any(_meets(token, stop) for stop in texts)
    )


def _meets(token: bytes, stop: bytes) -> bool:
    """Tell whether a token holds `stop`, or ends with a beginning of it."""
    return stop in token or token.endswith(tuple(stop[:i] for i in range(1, len(stop) + 1)))
