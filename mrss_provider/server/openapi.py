"""`/openapi.json`: the OpenAPI 3.1 document of all routes; a test holds it to those there are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mrss_provider import __version__
from mrss_provider.server import admin_schemas, schemas, text_schemas
from mrss_provider.server.auth import OPEN_PATHS
from mrss_provider.server.schemas import INTEGER, NUMBER, STRING, Schema, answer, items, ref, text

JSON = "application/json"
PLAIN = "text/plain"
EVENTS = "text/event-stream"
OCTETS = "application/octet-stream"
BINARY: Schema = {"type": "string", "format": "binary"}


@dataclass(frozen=True)
class Operation:
    """One route and method.

    Attributes:
        body: content types that it takes -> schemas; empty takes none.
        answers: status -> content types -> schemas.
        query: parameters -> schemas; none is required.
        is_admin: whether it needs an admin key, where keys are on.
    """

    method: str
    path: str
    summary: str
    answers: Mapping[int, Mapping[str, Schema]]
    body: Mapping[str, Schema] = field(default_factory=dict)
    query: Mapping[str, Schema] = field(default_factory=dict)
    is_admin: bool = False


def _json(schema: Schema, status: int = 200) -> dict[int, dict[str, Schema]]:
    return {status: {JSON: schema}}


def _watching() -> list[Operation]:
    status = answer(status=STRING)
    version = answer(protocol=INTEGER, version=STRING, pid=INTEGER, model=STRING, playground=text())
    healthcheck = answer(message=STRING, status_code=INTEGER)
    document = {"type": "object"}
    return [
        Operation("GET", "/health", "Whether the process is alive", _json(status)),
        Operation("GET", "/ready", "Whether a request would be answered at once", _json(status)),
        Operation("GET", "/healthcheck", "RWKV-Infer's /health", _json(healthcheck)),
        Operation("GET", "/version", "Who answers", _json(version)),
        Operation("GET", "/openapi.json", "This document", _json(document)),
        Operation(
            "GET",
            "/metrics",
            "What was done, in Prometheus's form",
            {200: {PLAIN: STRING}},
            is_admin=True,
        ),
        Operation(
            "GET",
            "/v1/lease",
            "Hold an engine that leaves when unused; ends with the connection",
            {200: {PLAIN: STRING}},
        ),
    ]


def _generating() -> list[Operation]:
    found: list[Operation] = []
    for prefix in ("/v1", ""):
        found += [
            _generation(f"{prefix}/chat/completions", "Answer a chat", "Chat"),
            _generation(f"{prefix}/completions", "Complete prompts, or answer a chat", "Text"),
            Operation("GET", f"{prefix}/models/{{id}}", "One name", _json(ref("Model"))),
        ]
    listed = answer(object={"const": "list"}, data=items(ref("Model")))
    ids = items(answer(object={"const": "models"}, id=STRING))
    methods = items(answer(name=STRING, parameters=items({"type": "object"})))
    default = answer(merge=STRING, gate=STRING, cut=NUMBER)
    known = answer(object={"const": "mrss.methods"}, merges=methods, gates=methods, default=default)
    found += [
        Operation("GET", "/v1/models", "The names that requests may have", _json(listed)),
        Operation("GET", "/v1/mrss/methods", "Merge rules and gates, what they take", _json(known)),
        Operation("GET", "/models", "The same as RWKV-Infer lists them", _json(ids)),
    ]
    return found


def _generation(path: str, summary: str, kind: str) -> Operation:
    wanted, given = ref(f"{kind}Request"), ref(f"{kind}Response")
    if kind == "Text":
        wanted = {"anyOf": [wanted, ref("ChatRequest")]}
        given = {"anyOf": [given, ref("ChatResponse")]}
    return Operation("POST", path, summary, {200: {JSON: given, EVENTS: STRING}}, {JSON: wanted})


def _reading() -> list[Operation]:
    marks = {name: {"type": "null"} for name in ("bos_token", "eos_token", "pad_token")}
    info = _json(answer(tokenizer_class=STRING, **marks))
    found = [Operation("GET", "/tokenizer_info", "That tokens are to be had here", info)]
    given = _json(ref("EmbeddingResponse"))
    counted = _json(ref("Tokens"))
    spelled = _json(answer(prompt=STRING))
    calls = [
        ("embeddings", "Turn texts into vectors", given, "EmbeddingRequest"),
        ("tokenize", "The tokens of a prompt, or of a chat as it is answered", counted, None),
        ("detokenize", "The text of tokens", spelled, None),
    ]
    for prefix in ("/v1", ""):
        for path, summary, answers, body in calls:
            body = body or f"{path.capitalize()}Request"
            found.append(Operation("POST", f"{prefix}/{path}", summary, answers, {JSON: ref(body)}))
    return found


def _keeping() -> list[Operation]:
    session = ref("Session")
    listed = answer(object={"const": "list"}, data=items(session))
    deleted = answer(object={"const": "session"}, id=STRING, deleted={"const": True})
    begins = {JSON: {"anyOf": [ref("ChatRequest"), ref("TextRequest")]}}
    one = "/v1/sessions/{id}"
    return [
        Operation("GET", "/v1/sessions", "The caller's saved conversations", _json(listed)),
        Operation(
            "POST",
            "/v1/sessions",
            "Read a chat or a prompt and save it",
            _json(session, 201),
            begins,
        ),
        Operation(
            "POST",
            "/v1/sessions/import",
            "Save what was exported",
            _json(session, 201),
            {OCTETS: BINARY},
        ),
        Operation("GET", one, "One of them", _json(session)),
        Operation("DELETE", one, "Forget one", _json(deleted)),
        Operation("POST", f"{one}/fork", "Save one once more", _json(session, 201)),
        Operation("GET", f"{one}/export", "One as a file", {200: {OCTETS: BINARY}}),
    ]


def _judging() -> list[Operation]:
    feedback = answer(object={"const": "feedback"}, id=STRING, created=INTEGER)
    listed = answer(object={"const": "list"}, data=items({"type": "object"}))
    path = "/v1/feedback"
    return [
        Operation(
            "POST",
            path,
            "Keep a score of an answer, or a vote between answers",
            _json(feedback, 201),
            {JSON: ref("Feedback")},
        ),
        Operation(
            "GET",
            path,
            "The latest of them",
            _json(listed),
            query={"limit": INTEGER},
            is_admin=True,
        ),
    ]


def _administering() -> list[Operation]:
    state = _json(ref("State"))
    mixture = _json(ref("Mixture"))
    model = _json(ref("LoadedModel"))
    deleted = _json(ref("Deleted"))
    replaced = mixture | _json(ref("Mixture"), 201)
    upload = {JSON: ref("StateFile"), OCTETS: BINARY}
    query = {"name": STRING, "format": {"enum": ["safetensors", "pth", "st"]}}
    body = {JSON: ref("MixtureBody")}
    states = _json(answer(object={"const": "list"}, data=items(ref("State"))))
    mixtures = _json(answer(object={"const": "list"}, data=items(ref("Mixture"))))
    calls: list[tuple[str, str, str, Any, Any, Any]] = [
        ("GET", "/v1/states", "The loaded states", states, {}, {}),
        ("POST", "/v1/states", "Load a state", _json(ref("State"), 201), upload, query),
        ("GET", "/v1/states/{name}", "One state", state, {}, {}),
        ("DELETE", "/v1/states/{name}", "Unload a state", deleted, {}, {}),
        ("GET", "/v1/mixtures", "The named mixtures", mixtures, {}, {}),
        ("POST", "/v1/mixtures", "Create a mixture", _json(ref("Mixture"), 201), body, {}),
        ("GET", "/v1/mixtures/{name}", "One mixture", mixture, {}, {}),
        ("PUT", "/v1/mixtures/{name}", "Create or replace a mixture", replaced, body, {}),
        ("DELETE", "/v1/mixtures/{name}", "Remove a mixture", deleted, {}, {}),
        ("GET", "/v1/model", "What is loaded", model, {}, {}),
        ("POST", "/v1/model", "Load another model", model, {JSON: ref("ModelBody")}, {}),
        ("DELETE", "/v1/model", "Unload the model", deleted, {}, {}),
    ]
    success = _json(answer(status={"const": "success"}))
    calls += [
        ("POST", path, f"RWKV-Infer's {path}", success, {JSON: schema}, {})
        for path, schema in admin_schemas.rwkv_infer().items()
    ]
    return [Operation(*call, is_admin=True) for call in calls]


def operations() -> list[Operation]:
    """Return all that the server does."""
    return [*_watching(), *_generating(), *_reading(), *_keeping(), *_judging(), *_administering()]


@cache
def document() -> dict[str, Any]:
    """Return the document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations():
        paths.setdefault(operation.path, {})[operation.method.lower()] = _write(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mrss",
            "version": __version__,
            "description": "Gated mixtures of recurrent states, by OpenAI's API.",
        },
        "paths": paths,
        "security": [{}, {"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                **schemas.requests(),
                **schemas.responses(),
                **text_schemas.requests(),
                **text_schemas.responses(),
                **admin_schemas.bodies(),
                **admin_schemas.answers(),
            },
        },
    }


def openapi_routes() -> list[Route]:
    """Return the route of the document."""

    async def openapi(request: Request) -> Response:
        return JSONResponse(document())

    return [Route("/openapi.json", openapi)]


def _write(operation: Operation) -> dict[str, Any]:
    answers: dict[str, Any] = {
        str(status): {"description": "As asked.", "content": _content(content)}
        for status, content in operation.answers.items()
    }
    for status in ("4XX", "5XX"):
        answers[status] = {"description": "An error.", "content": _content({JSON: ref("Error")})}
    written: dict[str, Any] = {
        "operationId": _id_of(operation),
        "summary": operation.summary,
        "responses": answers,
        "parameters": _parameters(operation),
    }
    if operation.body:
        written["requestBody"] = {"required": True, "content": _content(operation.body)}
    if operation.path in OPEN_PATHS:
        written["security"] = []
    if operation.is_admin:
        written["description"] = "Needs an admin key, where keys are on."
    return written


def _parameters(operation: Operation) -> Sequence[dict[str, Any]]:
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    in_query = [
        {"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()
    ]
    return [*in_path, *in_query]


def _content(content: Mapping[str, Schema]) -> dict[str, Any]:
    return {kind: {"schema": schema} for kind, schema in content.items()}


def _id_of(operation: Operation) -> str:
    words = re.findall(r"\w+", operation.path)
    return "_".join([operation.method.lower(), *words])
