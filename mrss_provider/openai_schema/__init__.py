"""The OpenAI wire, both directions: the only place that knows it. A leaf: standard library only.

Requests: `parse_chat_request` and `parse_completion_request` turn a JSON body into
`GenerateRequest`s; `request_to_body` turns one back. Answers: `ChunkWriter` and `read_chunk` for
streams, `Answer` and `chat_response` / `completion_response` for whole answers. Headers carry
what is known on admission (`info_to_headers`, `info_from_headers`).
"""

from __future__ import annotations

from mrss_provider.openai_schema.answers import (
    PROTOCOL,
    Answer,
    AnswerHead,
    Choice,
    chat_response,
    check_protocol,
    completion_response,
    info_from_headers,
    info_to_headers,
    mrss_fields,
    new_head,
    usage_to_dict,
)
from mrss_provider.openai_schema.chunks import (
    ChunkWriter,
    error_from_event,
    error_to_event,
    read_chunk,
)
from mrss_provider.openai_schema.embeddings import (
    EMBEDDING_KEYS,
    EMBEDDING_MRSS_KEYS,
    MAX_INPUTS,
    ParsedEmbedRequest,
    embed_request_to_body,
    embeddings_pieces,
    parse_embed_request,
    read_embeddings,
)
from mrss_provider.openai_schema.keys import CHAT_KEYS, COMPLETION_KEYS, MRSS_KEYS, KeyTable
from mrss_provider.openai_schema.listing import (
    error_headers,
    model_list,
    model_object,
    read_model_list,
)
from mrss_provider.openai_schema.methods import methods_object
from mrss_provider.openai_schema.requests import (
    ParsedRequest,
    parse_chat_request,
    parse_completion_request,
    request_to_body,
)
from mrss_provider.openai_schema.tokens import (
    DETOKENIZE_KEYS,
    detokenize_body,
    parse_detokenize_request,
    parse_tokenize_request,
    read_detokenized,
    read_tokens,
    tokens_object,
)
from mrss_provider.openai_schema.values import (
    MAX_CHARS,
    MAX_MESSAGES,
    MAX_N,
    MAX_PROMPTS,
    StreamOptions,
)

__all__ = [
    "CHAT_KEYS",
    "COMPLETION_KEYS",
    "DETOKENIZE_KEYS",
    "EMBEDDING_KEYS",
    "EMBEDDING_MRSS_KEYS",
    "MAX_CHARS",
    "MAX_INPUTS",
    "MAX_MESSAGES",
    "MAX_N",
    "MAX_PROMPTS",
    "MRSS_KEYS",
    "PROTOCOL",
    "Answer",
    "AnswerHead",
    "Choice",
    "ChunkWriter",
    "KeyTable",
    "ParsedEmbedRequest",
    "ParsedRequest",
    "StreamOptions",
    "chat_response",
    "check_protocol",
    "completion_response",
    "detokenize_body",
    "embed_request_to_body",
    "embeddings_pieces",
    "error_from_event",
    "error_headers",
    "error_to_event",
    "info_from_headers",
    "info_to_headers",
    "methods_object",
    "model_list",
    "model_object",
    "mrss_fields",
    "new_head",
    "parse_chat_request",
    "parse_completion_request",
    "parse_detokenize_request",
    "parse_embed_request",
    "parse_tokenize_request",
    "read_chunk",
    "read_detokenized",
    "read_embeddings",
    "read_model_list",
    "read_tokens",
    "request_to_body",
    "tokens_object",
    "usage_to_dict",
]
