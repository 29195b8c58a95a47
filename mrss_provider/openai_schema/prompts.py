"""Texts and token ids, alone or in lists: `prompt`, `input`, and what only prompts have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrss_provider.errors import ContextLengthError, InvalidRequestError
from mrss_provider.openai_schema.checks import check_text, expect, shown
from mrss_provider.openai_schema.values import MAX_CHARS, MAX_N, MAX_PROMPTS, StreamOptions

Text = str | tuple[int, ...]


def parse_prompts(known: Mapping[str, Any]) -> list[Text]:
    """Return `prompt` as a list; an empty text is a prompt, too."""
    return parse_texts(known.get("prompt"), "prompt", MAX_PROMPTS)


def parse_texts(value: object, where: str, most: int, *, may_be_empty: bool = True) -> list[Text]:
    """Return a text, token ids, or a list of these, as a list.

    Args:
        value: what was sent.
        where: its key.
        most: entries of the list.
        may_be_empty: whether a text may be.

    Raises:
        InvalidRequestError: it is none of these.
        ContextLengthError: more characters than are read.
    """
    is_ids = False
    if isinstance(value, str):
        texts: list[Any] = [value]
    else:
        raw = expect(value, list, where, "text, token ids, or a list of these")
        # A list of token ids is told by its first one: looking at all of them takes a while. Other
        # numbers are token ids gone wrong.
        is_ids = bool(raw) and isinstance(raw[0], int | float)
        texts = [raw] if is_ids else raw
    if not 0 < len(texts) <= most:
        raise InvalidRequestError(
            f"{where} must hold 1 to {most} {where}s, got {len(texts)}", param=where
        )
    places = [where] if is_ids else [f"{where}[{i}]" for i in range(len(texts))]
    parsed = [_parse_text(item, at, where) for item, at in zip(texts, places, strict=True)]
    if not may_be_empty and "" in parsed:
        raise InvalidRequestError(
            f"{where}[{parsed.index('')}] must be a text that is not empty, got ''", param=where
        )
    total = sum(map(len, parsed))
    if total > MAX_CHARS:
        raise ContextLengthError(
            f"{where} may hold {MAX_CHARS} characters in all, got {total}; shorten it", param=where
        )
    return parsed


def parse_token_ids(ids: list[Any], where: str, param: str) -> tuple[int, ...]:
    """Return token ids.

    Raises:
        InvalidRequestError: one of them is none.
    """
    # Not one by one: a long prompt must not hold up the answers that are being written.
    if ids and (set(map(type, ids)) != {int} or min(ids) < 0):
        bad = next(i for i in ids if type(i) is not int or i < 0)
        raise InvalidRequestError(
            f"{where}: a token id is an integer >= 0, got {shown(bad)}", param=param
        )
    return tuple(ids)


def parse_best_of(known: Mapping[str, Any], n: int, stream: StreamOptions) -> int | None:
    """Return how many answers the `n` are chosen from; None where all of them are given."""
    best_of = known.get("best_of")
    if best_of is None:
        return None
    if type(best_of) is not int or not n <= best_of <= MAX_N:
        raise InvalidRequestError(
            f"best_of must be an integer in [n, {MAX_N}], where n is {n}, got {shown(best_of)}",
            param="best_of",
        )
    # Our own client reads whole answers as events, too.
    if best_of > n and stream.stream and not stream.include_num_tokens:
        raise InvalidRequestError(
            "best_of above n cannot be streamed, as which answers are best is known at their end; "
            f"leave stream or best_of out, got {best_of}",
            param="best_of",
        )
    return best_of if best_of > n else None


def _parse_text(item: object, where: str, param: str) -> Text:
    if isinstance(item, str):
        return check_text(item, where)
    ids = expect(item, list, where, "text or a list of token ids")
    if not ids:
        raise InvalidRequestError(
            f"{where} is an empty list; send token ids"
            + (", or '' to start from nothing" if param == "prompt" else ""),
            param=param,
        )
    return parse_token_ids(ids, where, param)
