"""`/tokenize` and `/detokenize`, in vLLM's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from mrss_provider.backend import GenerateRequest, Tokens
from mrss_provider.errors import EngineError, InvalidRequestError
from mrss_provider.openai_schema.checks import expect
from mrss_provider.openai_schema.keys import KeyTable, Refusal
from mrss_provider.openai_schema.prompts import parse_token_ids
from mrss_provider.openai_schema.requests import (
    parse_chat_request,
    parse_completion_request,
)

DEFAULT_MODEL = "base"
"""All names share a vocabulary, so that clients of vLLM need not send one."""

DETOKENIZE_KEYS = KeyTable(
    where="",
    honoured=frozenset({"tokens"}),
    accepted=frozenset({"model"}),
    refused={},
)

# vLLM's own. RWKV's vocabularies have no tokens that are put before a text.
_VLLM_KEYS = KeyTable(
    where="",
    honoured=frozenset(),
    accepted=frozenset({"add_special_tokens"}),
    refused={
        "return_token_strs": Refusal("send the ids to /detokenize", neutral=(False,)),
        "add_generation_prompt": Refusal(
            "a chat is counted as it would be answered", neutral=(True,)
        ),
        "continue_final_message": Refusal(
            "the last message is continued where it is the assistant's", neutral=(False,)
        ),
    },
)


def parse_tokenize_request(body: object) -> GenerateRequest:
    """Parse the body of `POST /tokenize`: that of a request that is to be counted.

    Raises:
        InvalidRequestError: naming the key at fault in `param`.
    """
    fields = dict(expect(body, dict, "the body", "a JSON object"))
    vllm = _VLLM_KEYS.accepted | _VLLM_KEYS.refused.keys()
    _VLLM_KEYS.select({key: fields.pop(key) for key in sorted(vllm & fields.keys())})
    if fields.get("model") is None:
        fields["model"] = DEFAULT_MODEL
    is_chat = fields.get("messages") is not None
    parsed = parse_chat_request(fields) if is_chat else parse_completion_request(fields)
    if len(parsed.requests) != 1:
        raise InvalidRequestError(
            f"one prompt is tokenised at a time, got {len(parsed.requests)}", param="prompt"
        )
    if parsed.request.session is not None:
        raise InvalidRequestError(
            "mrss.session is refused: what a session has read is not counted again; leave it out",
            param="mrss.session",
        )
    return parsed.request


def parse_detokenize_request(body: object) -> tuple[int, ...]:
    """Parse the body of `POST /detokenize`; return the tokens.

    Raises:
        InvalidRequestError: naming the key at fault in `param`.
    """
    known = DETOKENIZE_KEYS.select(expect(body, dict, "the body", "a JSON object"))
    raw = expect(known.get("tokens"), list, "tokens", "a list of token ids")
    return parse_token_ids(raw, "tokens", "tokens")


def tokens_object(tokens: Tokens) -> dict[str, Any]:
    """Write the answer of `POST /tokenize`."""
    ids = list(tokens.token_ids)
    return {"tokens": ids, "count": len(ids), "max_model_len": tokens.context_len}


def read_tokens(body: object) -> Tokens:
    """Read what `tokens_object` wrote.

    Raises:
        EngineError: it is not such an object.
    """
    try:
        raw = cast(Mapping[str, Any], body)
        return Tokens(tuple(raw["tokens"]), raw["max_model_len"])
    except (KeyError, TypeError) as exc:
        raise EngineError(f"the engine sent tokens that cannot be read ({exc!r})") from exc


def detokenize_body(token_ids: Sequence[int]) -> dict[str, Any]:
    """Write the body of `POST /detokenize`."""
    return {"tokens": list(token_ids)}


def read_detokenized(body: object) -> str:
    """Read the answer of `POST /detokenize`.

    Raises:
        EngineError: it has no text.
    """
    text = body.get("prompt") if isinstance(body, dict) else None
    if not isinstance(text, str):
        raise EngineError("the engine sent no text for the tokens")
    return text
