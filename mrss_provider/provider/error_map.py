"""What each of our errors is called in LiteLLM: one table.

The class decides more than the status: whether LiteLLM's router tries again, takes another
deployment or cools this one down. So a mistake of the caller is never a 404 (which would cool a
deployment down for everybody), and an engine that is gone is a 503 (which lets the router move on).
"""

from __future__ import annotations

import logging
import math
import uuid
from concurrent.futures import CancelledError
from typing import Any

import httpx
import litellm

from mrss_provider import errors
from mrss_provider.errors import MRSSError, QueueFullError

PROVIDER = "mrss"

log = logging.getLogger(__name__)

TABLE: dict[type[MRSSError], type[Exception]] = {
    MRSSError: litellm.InternalServerError,
    errors.InvalidRequestError: litellm.BadRequestError,
    errors.UnknownNameError: litellm.BadRequestError,
    errors.ContextLengthError: litellm.ContextWindowExceededError,
    errors.AuthenticationError: litellm.AuthenticationError,
    errors.PermissionDeniedError: litellm.PermissionDeniedError,
    # What was not found is what the caller named, such as a session.
    errors.NotFoundError: litellm.BadRequestError,
    errors.RequestTimeoutError: litellm.Timeout,
    errors.ConflictError: litellm.BadRequestError,
    errors.PayloadTooLargeError: litellm.BadRequestError,
    errors.QueueFullError: litellm.RateLimitError,
    errors.RateLimitError: litellm.RateLimitError,
    errors.EngineUnavailableError: litellm.ServiceUnavailableError,
    errors.OverloadedError: litellm.ServiceUnavailableError,
    errors.EngineError: litellm.InternalServerError,
    errors.StorageError: litellm.InternalServerError,
    # A file or a flag is the operator's to mend: the caller's request was fine.
    errors.FileFormatError: litellm.InternalServerError,
    errors.ModelFileError: litellm.InternalServerError,
    errors.StateFileError: litellm.InternalServerError,
    errors.ConfigError: litellm.InternalServerError,
}

# These two classes want the response they stand for; the others make their own.
_WITH_RESPONSE = (litellm.RateLimitError, litellm.PermissionDeniedError)


class BrokenOff(Exception):
    """What ended an answer that had been admitted: `error`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def to_litellm(error: BaseException, model: str) -> Exception:
    """Return the LiteLLM exception that stands for `error`; raise it `from error`.

    What is not an `MRSSError` is a defect: the caller gets an id, the log the traceback.
    """
    if isinstance(error, BrokenOff):
        return _cooling_nothing(to_litellm(error.error, model))
    if isinstance(error, tuple(litellm.LITELLM_EXCEPTION_TYPES)):
        return error  # type: ignore[return-value]
    if isinstance(error, CancelledError):
        error = errors.EngineUnavailableError("the provider was closed before the answer's end")
    if not isinstance(error, MRSSError):
        error = _defect(error)
    target = TABLE[type(error)]
    fields: dict[str, Any] = {"message": error.message, "model": model, "llm_provider": PROVIDER}
    if issubclass(target, _WITH_RESPONSE):
        fields["response"] = _response(error)
    mapped = target(**fields)
    # The proxy writes these into the OpenAI error object.
    for name in ("code", "param", "type"):
        setattr(mapped, name, getattr(error, name))
    return mapped


def _cooling_nothing(mapped: Exception) -> Exception:
    """Ask LiteLLM not to cool a deployment down for an answer that broke off.

    It books such a failure late, when the request may be at its next deployment already, and then
    cools that one down: the one that is well. Who is refused by the engine that is gone is booked
    where it belongs. LiteLLM takes the time to cool down from this header, and 0 is none.
    """
    mapped.litellm_response_headers = httpx.Headers({"retry-after": "0"})  # type: ignore[attr-defined]
    return mapped


def _defect(error: BaseException) -> MRSSError:
    error_id = uuid.uuid4().hex[:12]
    log.error("internal error %s", error_id, exc_info=error)
    return errors.EngineError(
        f"internal error {error_id} ({type(error).__name__}); the log has the details under this id"
    )


def _response(error: MRSSError) -> httpx.Response:
    headers = {}
    if isinstance(error, QueueFullError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    request = httpx.Request("POST", "http://mrss/v1/chat/completions")
    return httpx.Response(error.status_code, headers=headers, request=request)
