"""JSON schemas of administration, RWKV-Infer's routes among it, for the OpenAPI document."""

from __future__ import annotations

from typing import get_args

from mrss_provider.backend import Reinject
from mrss_provider.chat import TEMPLATES
from mrss_provider.server.schemas import (
    ANYTHING,
    STRING,
    Schema,
    answer,
    fields,
    items,
    method,
    number,
    text,
)

# As RWKV-Infer's scripts write them.
_LOOSE_NUMBER: Schema = {"type": ["number", "string", "null"]}
_LOOSE_TRUTH: Schema = {"type": ["boolean", "integer", "string", "null"]}
_NUMBERS: Schema = {
    "anyOf": [_LOOSE_NUMBER, items({"type": ["number", "string"]}, maxItems=256)],
}
_TEXTS: Schema = {"anyOf": [STRING, items(STRING, maxItems=256)]}
_DEFAULTS: dict[str, Schema] = {
    "default_temperature": _LOOSE_NUMBER,
    "default_top_p": _LOOSE_NUMBER,
}

MIXTURE: dict[str, Schema] = {
    "merge": method("linear", "power:2"),
    "gate": method("fixed", "novelty:0.1"),
    "cut": number(minimum=0, exclusiveMaximum=1),
    "reinject": {"enum": [*get_args(Reinject), None]},
    "temperature": number(minimum=0, maximum=100),
    "top_p": number(exclusiveMinimum=0, maximum=1),
    "sampling_order": {"enum": ["openai", "rwkv", None]},
    "template": {"enum": [*TEMPLATES, None]},
    "description": text(),
    "display_name": text(),
}

MODEL: dict[str, Schema] = {
    "display_name": text(),
    "dtype": text(),
    "quantize": text(),
    "template": text(),
    "temperature": number(minimum=0, maximum=100),
    "top_p": number(exclusiveMinimum=0, maximum=1),
    "drain_s": number(minimum=0, maximum=3600),
}

RWKV_INFER_MODEL: dict[str, Schema] = {
    "model_viewname": text(),
    "model_strategy": text(),
    "template": text(),
    "endtoken": text(),
    "adapter_filename": text(),
    "adapter_mode": ANYTHING,
    "adapter_scaling": ANYTHING,
    **_DEFAULTS,
}


def bodies() -> dict[str, Schema]:
    """Return the schemas of what administrators send."""
    return {
        "StateFile": fields({"path": STRING}, {"name": text()}),
        # The name is in the path or in the body.
        "MixtureBody": fields({"terms": STRING}, {"name": text(), **MIXTURE}),
        "ModelBody": fields({"path": STRING}, MODEL),
    }


def answers() -> dict[str, Schema]:
    """Return the schemas of what they get."""
    return {
        "State": answer(
            object={"const": "state"},
            name=STRING,
            display_name=STRING,
            group=STRING,
            sha256=STRING,
            file=STRING,
            added={"type": "boolean"},
        ),
        "Mixture": answer(object={"const": "mixture"}, name=STRING, terms=STRING),
        "LoadedModel": answer(
            object={"const": "model"},
            name=STRING,
            display_name=STRING,
            file=STRING,
            shape=STRING,
        ),
        "Deleted": answer(object=STRING, name=STRING, deleted={"const": True}),
    }


def rwkv_infer() -> dict[str, Schema]:
    """Return the bodies of RWKV-Infer's routes, by path."""
    view = {"state_viewname": STRING}
    return {
        "/loadmodel": fields({"model_filename": STRING}, RWKV_INFER_MODEL),
        "/removemodel": {},
        "/loadstatemodel": fields({"state_filename": STRING, **view}, _DEFAULTS),
        "/mrss_loadstatemodel": fields(
            {"state_filenames": _TEXTS, **view},
            {
                "contain_originalstate": _LOOSE_TRUTH,
                "state_gatingweight": _NUMBERS,
                **_DEFAULTS,
            },
        ),
        "/mrss_set_gatingweight": fields({**view, "state_gatingweight": _NUMBERS}, _DEFAULTS),
        "/removestatemodel": {},
    }
