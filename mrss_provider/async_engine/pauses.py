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
    beginnings = tuple(text[:i] for text in texts for i in range(1, len(text) + 1))
    # In one go each: a vocabulary has tens of thousands of tokens.
    found = {i for i, token in tokenizer.entries().items() if token.endswith(beginnings)}
    for text in texts:
        found |= {i for i, token in tokenizer.entries().items() if text in token}
    return frozenset(found)
