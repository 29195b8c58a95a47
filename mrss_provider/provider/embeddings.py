"""Embeddings: LiteLLM's arguments to an `EmbedRequest`, vectors to its `EmbeddingResponse`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litellm.types.utils import EmbeddingResponse, Usage

from mrss_provider.backend import Embeddings, EmbedRequest
from mrss_provider.openai_schema import ParsedEmbedRequest, embeddings_pieces, parse_embed_request
from mrss_provider.provider.calls import own_parameters, seconds
from mrss_provider.provider.error_map import PROVIDER


@dataclass(frozen=True)
class EmbedCall:
    """One call of LiteLLM for embeddings.

    Attributes:
        parsed: what is asked of the engine.
        address: of the engine; None is the provider's own choice.
        api_key: for the engine.
    """

    parsed: ParsedEmbedRequest
    address: str | None
    api_key: str | None

    @property
    def request(self) -> EmbedRequest:
        """What is asked of the engine, with LiteLLM's timeout."""
        return self.parsed.request


def read_embed_call(arguments: Mapping[str, Any]) -> EmbedCall:
    """Read the arguments that LiteLLM passes by keyword.

    Raises:
        InvalidRequestError: a parameter that cannot be honoured, as `openai_schema` says.
    """
    body = own_parameters(arguments["optional_params"], arguments.get("logging_obj"))
    body["model"] = arguments["model"]
    body["input"] = arguments["input"]
    body["timeout"] = seconds(arguments.get("timeout"))
    return EmbedCall(
        parsed=parse_embed_request(body),
        address=arguments.get("api_base") or None,
        api_key=arguments.get("api_key") or None,
    )


def to_embeddings(found: Embeddings, call: EmbedCall) -> EmbeddingResponse:
    """Return LiteLLM's answer, its vectors spelled as the server spells them."""
    body = json.loads(b"".join(embeddings_pieces(found, call.parsed.encoding)))
    response = EmbeddingResponse(
        model=f"{PROVIDER}/{body['model']}", data=body["data"], usage=Usage(**body["usage"])
    )
    response._hidden_params = {
        "additional_headers": {
            "x-mrss-mixture": found.mixture,
            "x-mrss-fingerprint": found.fingerprint,
        }
    }
    return response
