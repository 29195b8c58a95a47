"""The model list, and the headers that go with an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mrss_provider.backend import ModelCard
from mrss_provider.errors import (
    AuthenticationError,
    EngineError,
    EngineUnavailableError,
    MRSSError,
    QueueFullError,
    RateLimitError,
)


def model_object(card: ModelCard) -> dict[str, Any]:
    """Write a `model` object, what we know beyond OpenAI's fields under `mrss`."""
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "mrss",
        "mrss": {
            "kind": card.kind,
            "description": card.description,
            "context_len": card.context_len,
            "supports": list(card.supports),
            "reinject": card.reinject,
        },
    }


def model_list(cards: Sequence[ModelCard]) -> dict[str, Any]:
    """Write the answer of `GET /v1/models`."""
    return {"object": "list", "data": [model_object(card) for card in cards]}


def read_model_list(body: Mapping[str, Any]) -> list[ModelCard]:
    """Read what `model_list` wrote.

    Raises:
        EngineError: it is not such a list.
    """
    try:
        return [
            ModelCard(
                id=item["id"],
                kind=item["mrss"]["kind"],
                description=item["mrss"]["description"],
                created=item["created"],
                context_len=item["mrss"]["context_len"],
                supports=tuple(item["mrss"]["supports"]),
                reinject=item["mrss"].get("reinject", "never"),
            )
            for item in body["data"]
        ]
    except (KeyError, TypeError) as exc:
        raise EngineError(f"the engine sent a model list that cannot be read ({exc!r})") from exc


def error_headers(error: MRSSError) -> dict[str, str]:
    """Return the response headers of an error: when to try again, in whole seconds, or with what.

    A full queue says when, a server that starts or leaves says soon.
    """
    if isinstance(error, QueueFullError):
        limits = error.headers if isinstance(error, RateLimitError) else {}
        return {**limits, "retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, EngineUnavailableError):
        return {"retry-after": "1"}
    if isinstance(error, AuthenticationError):
        return {"www-authenticate": "Bearer"}
    return {}
