"""JSON schemas of what goes over the wire, for the OpenAPI document.

Built from the tables and limits that the parsers use. null stands for absent everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from mrss_provider.backend import Reinject
from mrss_provider.openai_schema import (
    CHAT_KEYS,
    COMPLETION_KEYS,
    MAX_CHARS,
    MAX_MESSAGES,
    MAX_N,
    MAX_PROMPTS,
    MRSS_KEYS,
    KeyTable,
)
from mrss_provider.openai_schema.grammars import FORMATS
from mrss_provider.openai_schema.keys import (
    FORMAT_KEYS,
    JSON_SCHEMA_KEYS,
    STREAM_KEYS,
    message_keys,
)
from mrss_provider.openai_schema.values import MAX_MODEL_CHARS, MAX_TIMEOUT_S, ROLES
from mrss_provider.sampling_params import (
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    SamplingOrder,
)
from mrss_provider.server import tool_schemas

Schema = dict[str, Any]

BOOLEAN: Schema = {"type": ["boolean", "null"]}
STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
# Whatever it is, it is not looked at.
ANYTHING: Schema = {}


def text(**limits: Any) -> Schema:
    """Return the schema of an optional text."""
    return {"type": ["string", "null"], **limits}


def method(*examples: str) -> Schema:
    """Return the schema of an optional merge rule or gate: as in a name, or an object."""
    return {
        "type": ["string", "object", "null"],
        "properties": {"name": {"type": "string"}},
        "required": ["name"],
        "examples": list(examples),
    }


def number(**limits: float) -> Schema:
    """Return the schema of an optional number."""
    return {"type": ["number", "null"], **limits}


def integer(low: int, high: int) -> Schema:
    """Return the schema of an optional integer."""
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def fields(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """Return the schema of an object that has no other fields."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def answer(**properties: Schema) -> Schema:
    """Return the schema of an object of ours, all of whose fields are there; more may come."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def items(schema: Schema, **limits: int) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": schema, **limits}


def ref(name: str) -> Schema:
    """Refer to a schema of `schemas()`."""
    return {"$ref": f"#/components/schemas/{name}"}


def of_table(table: KeyTable, known: Mapping[str, Schema], required: Sequence[str] = ()) -> Schema:
    """Return the schema of an object whose keys a table tells, with those in `known` honoured.

    A refused key may have the values that ask for nothing.
    """
    properties = {key: known.get(key, ANYTHING) for key in sorted(table.honoured)}
    properties |= dict.fromkeys(sorted(table.accepted), ANYTHING)
    for key, refusal in sorted(table.refused.items()):
        properties[key] = {"enum": [None, *refusal.neutral], "description": refusal.reason}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_WEIGHTS = {"type": ["object", "null"], "additionalProperties": NUMBER}
TOKEN_IDS = items({"type": "integer", "minimum": 0}, minItems=1)

SAMPLING: dict[str, Schema] = {
    "temperature": number(minimum=0, maximum=100),
    "top_p": number(exclusiveMinimum=0, maximum=1),
    "top_k": integer(-1, 2**31 - 1),
    "min_p": number(minimum=0, maximum=1),
    "presence_penalty": number(minimum=-2, maximum=2),
    "frequency_penalty": number(minimum=-2, maximum=2),
    "repetition_penalty": number(exclusiveMinimum=0, maximum=10),
    "penalty_decay": number(exclusiveMinimum=0, maximum=1),
    "seed": integer(-(2**63), 2**64 - 1),
    "ignore_eos": BOOLEAN,
    "max_tokens": integer(1, 2**31 - 1),
}

MRSS: dict[str, Schema] = {
    "weights": _WEIGHTS,
    "merge": method("linear", "power:2"),
    "gate": method("fixed", "novelty:0.1"),
    "cut": number(minimum=0, exclusiveMaximum=1),
    "reinject": {"enum": [None, *get_args(Reinject)]},
    "sampling_order": {"enum": [None, *get_args(SamplingOrder)]},
    "trace": BOOLEAN,
    "given": text(maxLength=MAX_CHARS),
    "session": text(),
    "save": BOOLEAN,
    "regex": text(minLength=1, examples=["yes|no"]),
    "grammar": text(minLength=1, examples=['start: "yes" | "no"']),
}

STREAM_OPTIONS: dict[str, Schema] = {"include_usage": BOOLEAN, "include_num_tokens": BOOLEAN}

_JSON_SCHEMA: dict[str, Schema] = {
    "name": text(),
    "description": text(),
    "schema": {"type": "object"},
    "strict": BOOLEAN,
}
_FORMAT: dict[str, Schema] = {
    "type": {"enum": list(FORMATS)},
    "json_schema": of_table(JSON_SCHEMA_KEYS, _JSON_SCHEMA, ["schema"])
    | {"type": ["object", "null"]},
}

_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}

SHARED: dict[str, Schema] = {
    **SAMPLING,
    "model": {
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_MODEL_CHARS,
        "examples": ["base", "knowledge+tone:0.5~delta"],
    },
    "stop": {"anyOf": [{"type": "null"}, _STOP, items(_STOP, maxItems=MAX_STOPS)]},
    "logit_bias": {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "n": integer(1, MAX_N),
    "response_format": of_table(FORMAT_KEYS, _FORMAT, ["type"]) | {"type": ["object", "null"]},
    "stream": BOOLEAN,
    "stream_options": of_table(STREAM_KEYS, STREAM_OPTIONS) | {"type": ["object", "null"]},
    "timeout": number(exclusiveMinimum=0, maximum=MAX_TIMEOUT_S),
    "mrss": of_table(MRSS_KEYS, MRSS) | {"type": ["object", "null"]},
    "mrss_gatingweight": {
        "type": ["array", "null"],
        "items": {"type": ["number", "string"]},
        "description": "RWKV-Infer's name for weights; its numbers may be strings.",
    },
}

CHAT: dict[str, Schema] = {
    **SHARED,
    "messages": items(ref("Message"), maxItems=MAX_MESSAGES),
    "max_completion_tokens": SAMPLING["max_tokens"],
    "logprobs": BOOLEAN,
    "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
    **tool_schemas.REQUEST,
}

TEXT: dict[str, Schema] = {
    **SHARED,
    "prompt": {
        "anyOf": [
            STRING,
            TOKEN_IDS,
            items({"anyOf": [STRING, TOKEN_IDS]}, minItems=1, maxItems=MAX_PROMPTS),
        ]
    },
    "logprobs": integer(0, MAX_TOP_LOGPROBS),
    "best_of": integer(1, MAX_N),
    "echo": BOOLEAN,
    # 0 with echo only.
    "max_tokens": integer(0, 2**31 - 1),
}


def requests() -> dict[str, Schema]:
    """Return the schemas of bodies that ask for an answer."""
    part = fields({"type": {"const": "text"}, "text": STRING})
    message: dict[str, Schema] = {
        "role": {"enum": list(ROLES)},
        # null beside calls only.
        "content": {"anyOf": [{"type": "null"}, STRING, items(part)]},
        **tool_schemas.MESSAGE,
    }
    return {
        "Message": of_table(message_keys(0), message, ["role"]),
        "ChatRequest": _with_params(of_table(CHAT_KEYS, CHAT, ["model", "messages"])),
        "TextRequest": _with_params(of_table(COMPLETION_KEYS, TEXT, ["model", "prompt"])),
        "Feedback": _feedback(),
    }


def _feedback() -> Schema:
    optional: dict[str, Schema] = {
        "score": number(minimum=-1, maximum=1),
        "vote": {"enum": ["a", "b", "c", "d", "tie", None]},
        "models": {"type": ["array", "null"], "items": STRING, "maxItems": 4},
        "ids": {"type": ["array", "null"], "items": STRING, "maxItems": 4},
        "note": text(maxLength=2000),
    }
    of_answer = {"type": "string", "minLength": 1, "maxLength": 256}
    return {
        **fields({"id": of_answer}, optional),
        "description": "One of score and vote; a vote needs models, the first of which is a.",
    }


def _with_params(schema: Schema) -> Schema:
    nested = {"type": ["object", "null"], "description": "More fields; those above win."}
    return {**schema, "properties": {**schema["properties"], "params": nested}}


def responses() -> dict[str, Schema]:
    """Return the schemas of answers."""
    mrss = answer(mixture=STRING, rows=INTEGER)
    head = {
        "id": STRING,
        "created": INTEGER,
        "model": STRING,
        "system_fingerprint": STRING,
        "usage": ref("Usage"),
        "mrss": mrss,
    }
    reason = {"enum": ["stop", "length", "tool_calls"]}
    choice = {"index": INTEGER, "finish_reason": reason, "logprobs": {"type": ["object", "null"]}}
    said = answer(role={"const": "assistant"}, content=text(), provider_specific_fields=ANYTHING)
    said = {**said, "properties": {**said["properties"], **tool_schemas.SAID}}
    error = answer(message=STRING, type=STRING, param=text(), code=STRING)
    return {
        "Error": {
            **answer(error=error),
            "description": "OpenAI's error; administration also says it as RWKV-Infer's `detail`.",
        },
        "Usage": answer(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER),
        "ChatResponse": answer(
            **head,
            object={"const": "chat.completion"},
            choices=items(answer(**choice, message=said)),
        ),
        "TextResponse": answer(
            **head,
            object={"const": "text_completion"},
            choices=items(answer(**choice, text=STRING)),
        ),
        "Session": answer(
            object={"const": "session"},
            id=STRING,
            mixture=STRING,
            num_tokens=INTEGER,
            num_bytes=INTEGER,
            created=NUMBER,
            updated=NUMBER,
        ),
        "Model": answer(id=STRING, object={"const": "model"}, created=INTEGER, owned_by=STRING),
    }
