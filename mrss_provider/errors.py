"""Every error a user can meet. A leaf: standard library only.

    MRSSError
    ├── InvalidRequestError           400  a request that cannot be honoured as written
    │   ├── UnknownNameError          400  a state, mixture or model that is not loaded
    │   └── ContextLengthError        400  prompt and answer do not fit
    ├── AuthenticationError           401  no key, or a wrong one
    ├── PermissionDeniedError         403  a key that may not do this
    ├── NotFoundError                 404  a resource (never a model name: see UnknownNameError)
    ├── RequestTimeoutError           408  the caller's deadline passed
    ├── ConflictError                 409  a name that is taken, a state in use
    ├── PayloadTooLargeError          413  body or file over the limit
    ├── QueueFullError                429  no room: try again after `retry_after_s`
    │   └── RateLimitError            429  a key's own limit: others are not concerned
    ├── EngineUnavailableError        503  the engine is starting, draining or gone
    ├── OverloadedError               503  no memory for it beside what runs
    ├── EngineError                   500  a defect of ours
    ├── StorageError                  507  the server could not write a file (a full disk, ...)
    ├── FileFormatError               400  a file that is not what its use needs
    │   ├── ModelFileError
    │   └── StateFileError
    └── ConfigError                   400  a flag, variable or configuration file

Each class has a `status_code` and an OpenAI `code`; `to_dict` is the one wire form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


def shown(value: object) -> str:
    """Return a value as a message shows it: not all of a long one."""
    try:
        text = repr(value)
    except ValueError:
        # Python writes no integer of more than some thousand digits.
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


class MRSSError(Exception):
    """The root. `str(error)` is one sentence for the user."""

    status_code: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def to_dict(self) -> dict[str, object]:
        """Return the OpenAI error object: `{"error": {message, type, param, code}}`."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequestError(MRSSError):
    """A request that cannot be honoured as written; `param` names the field."""

    status_code = 400
    code = "invalid_request"
    type = "invalid_request_error"


class UnknownNameError(InvalidRequestError):
    """A name that nothing loaded has.

    400 and not 404, because a 404 makes LiteLLM cool the deployment down for every caller.
    """

    code = "model_not_found"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = "model",
        position: int | None = None,
        suggestions: Sequence[str] = (),
    ) -> None:
        super().__init__(message, param=param)
        self.position = position
        self.suggestions = tuple(suggestions)


class ContextLengthError(InvalidRequestError):
    """Prompt and answer are longer than the engine's limit."""

    code = "context_length_exceeded"


class AuthenticationError(MRSSError):
    """No API key, or a wrong one."""

    status_code = 401
    code = "invalid_api_key"
    type = "authentication_error"


class PermissionDeniedError(MRSSError):
    """A key that may not do this."""

    status_code = 403
    code = "permission_denied"
    type = "permission_error"


class NotFoundError(MRSSError):
    """A resource that does not exist."""

    status_code = 404
    code = "not_found"
    type = "invalid_request_error"


class RequestTimeoutError(MRSSError):
    """The caller's deadline passed before the answer was complete."""

    status_code = 408
    code = "timeout"
    type = "timeout_error"


class ConflictError(MRSSError):
    """A name that is taken, or a resource in use."""

    status_code = 409
    code = "conflict"
    type = "invalid_request_error"


class PayloadTooLargeError(MRSSError):
    """A body or file over the configured limit."""

    status_code = 413
    code = "payload_too_large"
    type = "invalid_request_error"


class QueueFullError(MRSSError):
    """The queue is full. `retry_after_s` is a hint, in seconds."""

    status_code = 429
    code = "queue_full"
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitError(QueueFullError):
    """A key has more under way, or used more tokens, than it may; `headers` tell its limits."""

    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float = 1.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.headers = dict(headers or {})


class EngineUnavailableError(MRSSError):
    """The engine is starting, draining or gone."""

    status_code = 503
    code = "engine_unavailable"


class OverloadedError(MRSSError):
    """The device has no memory for this request beside those that came before; try again later."""

    status_code = 503
    code = "overloaded"


class EngineError(MRSSError):
    """A defect of ours, met while serving a request."""

    status_code = 500
    code = "internal_error"


class StorageError(MRSSError):
    """The server could not write a file of its own; nothing was changed."""

    status_code = 507
    code = "storage_failed"


class FileFormatError(MRSSError):
    """A file that is not what its use needs."""

    status_code = 400
    code = "bad_file"
    type = "invalid_request_error"


class ModelFileError(FileFormatError):
    """Not a checkpoint that we can run; the message names what was found and what is needed."""


class StateFileError(FileFormatError):
    """Not a tuned state for the loaded model; the message names both shapes."""


class ConfigError(MRSSError):
    """A malformed flag, environment variable or configuration file."""

    status_code = 400
    code = "bad_config"
    type = "invalid_request_error"


def error_from_dict(status_code: int, body: object) -> MRSSError:
    """Rebuild the error that `to_dict` wrote, from a response's status and JSON body.

    The class is found by `code`, else by status; an unknown one is an `EngineError`.
    """
    error = body.get("error") if isinstance(body, dict) else None
    fields = error if isinstance(error, dict) else {}
    message = str(fields.get("message") or f"the engine answered with status {status_code}")
    param = fields.get("param")
    wanted = str(fields.get("code"))
    by_status: type[MRSSError] | None = None
    for cls in _all_errors(MRSSError):
        if cls.code == wanted and cls.status_code == status_code:
            return _rebuild(cls, message, param)
        if by_status is None and cls.status_code == status_code:
            by_status = cls
    return _rebuild(by_status or EngineError, message, param)


def _rebuild(cls: type[MRSSError], message: str, param: object) -> MRSSError:
    if issubclass(cls, QueueFullError):
        return cls(message)
    return cls(message, param=param if isinstance(param, str) else None)


def _all_errors(cls: type[MRSSError]) -> list[type[MRSSError]]:
    found = [cls] if cls is not MRSSError else []
    for child in cls.__subclasses__():
        found += _all_errors(child)
    return found
