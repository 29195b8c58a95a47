"""A whole answer to LiteLLM's `ModelResponse` or `TextCompletionResponse`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from litellm.types.utils import ModelResponse, TextCompletionResponse, Usage

from mrss_provider.backend import StreamInfo
from mrss_provider.errors import EngineUnavailableError
from mrss_provider.openai_schema import (
    Answer,
    chat_response,
    completion_response,
    info_to_headers,
    new_head,
)
from mrss_provider.provider.error_map import PROVIDER


def to_chat(answer: Answer, infos: Sequence[StreamInfo], num_choices: int) -> ModelResponse:
    """Return a chat completion; the `mrss` object is on it and in every message.

    Raises:
        EngineUnavailableError: the answer stopped short.
    """
    info = infos[0]
    body = _finish(chat_response(new_head("chat", info), answer), num_choices)
    response = ModelResponse(**body)
    _add_headers(response, info)
    return response


def to_text(
    answer: Answer, infos: Sequence[StreamInfo], num_choices: int
) -> TextCompletionResponse:
    """Return a text completion; the choices of one prompt stand together.

    Raises:
        EngineUnavailableError: the answer stopped short.
    """
    info = replace(infos[0], prompt_tokens=sum(info.prompt_tokens for info in infos))
    body = _finish(completion_response(new_head("text", info), answer), num_choices)
    usage = Usage(**body["usage"])
    response = TextCompletionResponse(**{**body, "usage": usage})
    _add_headers(response, info)
    return response


def _finish(body: dict[str, Any], num_choices: int) -> dict[str, Any]:
    body["model"] = f"{PROVIDER}/{body['model']}"
    finished = [choice for choice in body["choices"] if choice["finish_reason"] is not None]
    if len(finished) < num_choices or body["usage"] is None:
        raise EngineUnavailableError("the engine closed the stream before the answer's end")
    return body


def _add_headers(response: Any, info: StreamInfo) -> None:
    # The proxy sends them on as `llm_provider-x-mrss-...`.
    response._hidden_params = {"additional_headers": info_to_headers(info)}
