"""`/v1/embeddings`: bodies to `EmbedRequest` and back, vectors to answers and back."""

from __future__ import annotations

import base64
import json
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from mrss_provider.backend import Embeddings, EmbedRequest
from mrss_provider.errors import EngineError, InvalidRequestError
from mrss_provider.openai_schema import values
from mrss_provider.openai_schema.checks import expect, shown
from mrss_provider.openai_schema.keys import ACCEPTED, KeyTable, Refusal
from mrss_provider.openai_schema.prompts import parse_texts

Encoding = Literal["float", "base64"]
Pooling = Literal["mean", "last"]

MAX_INPUTS = 2048
"""Of one request, as OpenAI has it."""

EMBEDDING_KEYS = KeyTable(
    where="",
    honoured=frozenset(
        {"model", "input", "encoding_format", "dimensions", "timeout", "mrss"},
    ),
    accepted=ACCEPTED,
    refused={"extra_body": Refusal("put its entries at the top of the body", neutral=({},))},
)

EMBEDDING_MRSS_KEYS = KeyTable(
    where="mrss", honoured=frozenset({"pooling"}), accepted=frozenset(), refused={}
)


@dataclass(frozen=True)
class ParsedEmbedRequest:
    """A body, understood."""

    request: EmbedRequest
    encoding: Encoding


def parse_embed_request(body: object) -> ParsedEmbedRequest:
    """Parse the body of `POST /v1/embeddings`.

    Raises:
        InvalidRequestError: naming the key at fault in `param`.
    """
    known = EMBEDDING_KEYS.select(expect(body, dict, "the body", "a JSON object"))
    mrss = EMBEDDING_MRSS_KEYS.select(expect(known.get("mrss", {}), dict, "mrss", "an object"))
    request = EmbedRequest(
        model=values.parse_model(known),
        inputs=tuple(parse_texts(known.get("input"), "input", MAX_INPUTS, may_be_empty=False)),
        pooling=_choice(mrss.get("pooling", "mean"), get_args(Pooling), "mrss.pooling"),
        dimensions=_parse_dimensions(known.get("dimensions")),
        timeout_s=values.parse_timeout(known),
    )
    encoding = known.get("encoding_format", "float")
    return ParsedEmbedRequest(request, _choice(encoding, get_args(Encoding), "encoding_format"))


def embed_request_to_body(request: EmbedRequest, encoding: Encoding) -> dict[str, Any]:
    """Write the body that parses back to `request`."""
    inputs = [text if isinstance(text, str) else list(text) for text in request.inputs]
    body: dict[str, Any] = {"model": request.model, "input": inputs, "encoding_format": encoding}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    if request.pooling != "mean":
        body["mrss"] = {"pooling": request.pooling}
    if request.timeout_s is not None:
        body["timeout"] = request.timeout_s
    return body


def embeddings_pieces(found: Embeddings, encoding: Encoding) -> Iterator[bytes]:
    """Yield the text of an `embedding` list, a vector at a time: all of them may take a second."""
    yield b'{"object":"list","data":['
    for index, vector in enumerate(found.vectors):
        spelled = _base64(vector) if encoding == "base64" else _floats(vector)
        before = "," if index else ""
        yield f'{before}{{"object":"embedding","index":{index},"embedding":{spelled}}}'.encode()
    usage = {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens}
    rest = {
        "model": found.mixture,
        "system_fingerprint": found.fingerprint,
        "usage": usage,
        "mrss": {"mixture": found.mixture, "rows": 1},
    }
    yield b"]," + json.dumps(rest, ensure_ascii=False)[1:].encode()


def read_embeddings(body: object) -> Embeddings:
    """Read an answer whose vectors are base64.

    Raises:
        EngineError: it is not such an answer.
    """
    try:
        raw = cast(Mapping[str, Any], body)
        entries = sorted(raw["data"], key=lambda entry: int(entry["index"]))
        return Embeddings(
            mixture=raw["model"],
            fingerprint=raw["system_fingerprint"],
            vectors=tuple(_from_base64(entry["embedding"]) for entry in entries),
            num_tokens=raw["usage"]["prompt_tokens"],
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise EngineError(f"the engine sent embeddings that cannot be read ({exc!r})") from exc


def _parse_dimensions(value: object) -> int | None:
    if value is not None and (type(value) is not int or not 1 <= value < 2**31):
        raise InvalidRequestError(
            f"dimensions must be an integer above 0, got {shown(value)}", param="dimensions"
        )
    return value


def _choice(value: object, allowed: tuple[str, ...], where: str) -> Any:
    if value not in allowed:
        raise InvalidRequestError(
            f"{where} must be {' or '.join(map(repr, allowed))}, got {shown(value)}",
            param=where,
        )
    return value


def _floats(vector: array[float]) -> str:
    # Nine digits say which fp32 number it is, and no more.
    return "[" + ",".join([f"{value:.9g}" for value in vector]) + "]"


def _base64(vector: array[float]) -> str:
    return f'"{base64.b64encode(_little_endian(vector).tobytes()).decode()}"'


def _from_base64(text: str) -> array[float]:
    return _little_endian(array("f", base64.b64decode(text, validate=True)))


def _little_endian(vector: array[float]) -> array[float]:
    """Return C floats of this machine as little-endian ones, or the reverse."""
    if sys.byteorder == "little":
        return vector
    swapped = array("f", vector)
    swapped.byteswap()
    return swapped
