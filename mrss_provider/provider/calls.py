"""What LiteLLM hands a provider, understood: arguments to `GenerateRequest`s and a deadline.

Values are judged in one place, `openai_schema`; here LiteLLM's own additions are taken off and what
it moved elsewhere is put back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from mrss_provider.backend import GenerateRequest
from mrss_provider.errors import InvalidRequestError
from mrss_provider.openai_schema import parse_chat_request, parse_completion_request
from mrss_provider.provider.error_map import PROVIDER

# LiteLLM's own: it adds them, and sees to them.
LITELLM_KEYS = ("stream", "stream_options", "max_retries")

DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Call:
    """One call of LiteLLM.

    Attributes:
        requests: one, or for `/v1/completions` one for each prompt.
        model: what LiteLLM calls the model, for errors: `mrss/` and the mixture as typed.
        chunk_model: what a stream's chunks call it. LiteLLM's own last chunk leaves the `mrss/`
            out, but the proxy copies each chunk whose name is not the one the client sent.
        is_text: a text completion, not a chat.
        address: of the engine; None is the provider's own choice.
        api_key: for the engine.
        timeout_s: LiteLLM's timeout, seconds.
        model_id: the deployment's id in the proxy.
    """

    requests: tuple[GenerateRequest, ...]
    model: str
    chunk_model: str
    is_text: bool
    address: str | None
    api_key: str | None
    timeout_s: float
    model_id: str | None


def read_call(
    *,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    optional_params: Mapping[str, Any],
    litellm_params: Mapping[str, Any] | None,
    api_base: str | None,
    api_key: str | None,
    timeout: object,
    logging_obj: Any,
) -> Call:
    """Read the arguments of one call.

    Raises:
        InvalidRequestError: a parameter that cannot be honoured, as `openai_schema` says.
    """
    extras = litellm_params or {}
    body = own_parameters(optional_params, logging_obj)
    body["model"] = model
    is_text = extras.get("text_completion") is True
    if is_text:
        # LiteLLM made each prompt a user message; it is taken as it is, without a template.
        body["prompt"] = [message.get("content", "") for message in messages]
        parsed = parse_completion_request(body)
    else:
        body["messages"] = list(messages)
        parsed = parse_chat_request(body)
    full_name = f"{PROVIDER}/{model}"
    asked_name = (extras.get("metadata") or {}).get("model_group")
    return Call(
        requests=parsed.requests,
        model=full_name,
        chunk_model=full_name if asked_name == full_name else model,
        is_text=is_text,
        address=api_base or None,
        api_key=api_key or None,
        timeout_s=seconds(timeout),
        model_id=(extras.get("model_info") or {}).get("id"),
    )


def check_streamable(call: Call) -> None:
    """Refuse what LiteLLM would drop from a streamed text completion.

    Raises:
        InvalidRequestError: several answers, the best of several, logprobs or a trace in a streamed
            completion.
    """
    if not call.is_text:
        return
    if len(call.requests) > 1 or call.requests[0].n > 1:
        raise InvalidRequestError(
            "a streamed completion has one answer behind LiteLLM, which drops the others' finish "
            "reasons; send one prompt with n=1, leave stream out, or ask /v1/chat/completions",
            param="stream",
        )
    if call.requests[0].best_of is not None:
        raise InvalidRequestError(
            "best_of above n cannot be streamed, as which answers are best is known at their end; "
            f"leave stream or best_of out, got {call.requests[0].best_of}",
            param="best_of",
        )
    if call.requests[0].sampling.logprobs:
        raise InvalidRequestError(
            "logprobs of a streamed completion are dropped by LiteLLM; leave stream out, or ask "
            "/v1/chat/completions",
            param="logprobs",
        )
    if call.requests[0].mixture.trace:
        raise InvalidRequestError(
            "the trace of a streamed completion is dropped by LiteLLM; leave stream out, or ask "
            "/v1/chat/completions",
            param="mrss.trace",
        )


def own_parameters(optional_params: Mapping[str, Any], logging_obj: Any) -> dict[str, Any]:
    """Return the request's own parameters; a flat one wins over the same in `extra_body`.

    In the proxy `extra_body` is the deployment's preset, and a client's parameters are flat.
    """
    extra_body = optional_params.get("extra_body") or {}
    if not isinstance(extra_body, Mapping):
        raise InvalidRequestError(
            f"extra_body must be an object, got {extra_body!r}", param="extra_body"
        )
    body = {**extra_body, **optional_params}
    for key in ("extra_body", *LITELLM_KEYS):
        body.pop(key, None)
    # LiteLLM takes `user` off the parameters and keeps it for its log.
    user = getattr(logging_obj, "model_call_details", {}).get("user")
    if user is not None:
        body["user"] = user
    return body


def seconds(timeout: object) -> float:
    """Return LiteLLM's timeout in seconds.

    Raises:
        InvalidRequestError: it is no number above 0.
    """
    if isinstance(timeout, httpx.Timeout):
        timeout = timeout.read
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    try:
        value = float(timeout)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not value > 0:
        raise InvalidRequestError(
            f"timeout must be a number of seconds above 0, got {timeout!r}", param="timeout"
        )
    return value
