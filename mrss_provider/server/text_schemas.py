"""JSON schemas of embeddings and tokens, for the OpenAPI document."""

from __future__ import annotations

from typing import get_args

from mrss_provider.openai_schema import EMBEDDING_KEYS, EMBEDDING_MRSS_KEYS, MAX_INPUTS
from mrss_provider.openai_schema.embeddings import Encoding, Pooling
from mrss_provider.server.schemas import (
    ANYTHING,
    INTEGER,
    NUMBER,
    SHARED,
    STRING,
    TEXT,
    TOKEN_IDS,
    Schema,
    answer,
    items,
    of_table,
    ref,
    text,
)

EMBEDDING_MRSS: dict[str, Schema] = {"pooling": {"enum": [None, *get_args(Pooling)]}}

_WORDS: Schema = {"type": "string", "minLength": 1}

EMBEDDING: dict[str, Schema] = {
    "model": SHARED["model"],
    "input": {
        "anyOf": [
            _WORDS,
            TOKEN_IDS,
            items({"anyOf": [_WORDS, TOKEN_IDS]}, minItems=1, maxItems=MAX_INPUTS),
        ]
    },
    "encoding_format": {"enum": [None, *get_args(Encoding)]},
    "dimensions": {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31 - 1},
    "timeout": SHARED["timeout"],
    "mrss": of_table(EMBEDDING_MRSS_KEYS, EMBEDDING_MRSS) | {"type": ["object", "null"]},
}


def requests() -> dict[str, Schema]:
    """Return the schemas of bodies."""
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    return {
        "EmbeddingRequest": of_table(EMBEDDING_KEYS, EMBEDDING, ["model", "input"]),
        "TokenizeRequest": {
            "type": "object",
            "properties": {
                "model": text(),
                "prompt": {"anyOf": [*TEXT["prompt"]["anyOf"], {"type": "null"}]},
                "messages": {"type": ["array", "null"], "items": ref("Message")},
                "add_special_tokens": ANYTHING,
            },
            "description": "The body of the completion or chat that is to be counted.",
        },
        "DetokenizeRequest": {
            "type": "object",
            "properties": {"model": ANYTHING, "tokens": ids},
            "required": ["tokens"],
            "additionalProperties": False,
        },
    }


def responses() -> dict[str, Schema]:
    """Return the schemas of answers."""
    vector = {"anyOf": [items(NUMBER), STRING]}
    embedding = answer(object={"const": "embedding"}, index=INTEGER, embedding=vector)
    return {
        "EmbeddingResponse": answer(
            object={"const": "list"},
            data=items(embedding),
            model=STRING,
            system_fingerprint=STRING,
            usage=answer(prompt_tokens=INTEGER, total_tokens=INTEGER),
            mrss=answer(mixture=STRING, rows=INTEGER),
        ),
        "Tokens": answer(tokens=items(INTEGER), count=INTEGER, max_model_len=INTEGER),
    }
