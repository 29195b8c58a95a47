"""The OpenAPI document is true, of routes, keys and limits; and no request meets a defect."""

import contextlib
import re
import socket

import hypothesis
import pytest
import schemathesis
from admin_client import write_folders
from fakes import FakeBackend, serving
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.config import ServerConfig
from mrss_provider.errors import InvalidRequestError
from mrss_provider.openai_schema import (
    CHAT_KEYS,
    COMPLETION_KEYS,
    EMBEDDING_KEYS,
    EMBEDDING_MRSS_KEYS,
    MRSS_KEYS,
    parse_chat_request,
    parse_completion_request,
    parse_embed_request,
)
from mrss_provider.openai_schema.keys import STREAM_KEYS
from mrss_provider.server import admin, rwkv_infer, schemas, text_schemas
from mrss_provider.server.admin_schemas import bodies
from mrss_provider.server.admin_schemas import rwkv_infer as rwkv_infer_bodies
from mrss_provider.server.app import create_app
from mrss_provider.server.openapi import document

CHAT = {"model": "tone", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tone", "prompt": "hi"}
EMBEDDING = {"model": "tone", "input": "hi"}
# After these nothing is there that could answer; and the lease, which does not end.
LEFT_OUT = {("DELETE", "/v1/model"), ("POST", "/removemodel"), ("GET", "/v1/lease")}


def test_the_paths_are_those_of_the_application():
    routes = {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in create_app(FakeBackend()).routes
        # The playground's files are no part of the API.
        if route.include_in_schema
        for method in route.methods - {"HEAD"}
    }
    written = {
        (method.upper(), path)
        for path, operations in document()["paths"].items()
        for method in operations
    }
    assert written == routes


def test_the_document_is_served():
    with TestClient(create_app(FakeBackend()), "http://localhost") as client:
        assert client.get("/openapi.json").json() == document()


@pytest.mark.parametrize(
    ("table", "known"),
    [
        (CHAT_KEYS, schemas.CHAT),
        (COMPLETION_KEYS, schemas.TEXT),
        (EMBEDDING_KEYS, text_schemas.EMBEDDING),
        (EMBEDDING_MRSS_KEYS, text_schemas.EMBEDDING_MRSS),
        (MRSS_KEYS, schemas.MRSS),
        (STREAM_KEYS, schemas.STREAM_OPTIONS),
    ],
    ids=["chat", "text", "embedding", "embedding_mrss", "mrss", "stream_options"],
)
def test_every_honoured_key_is_described_and_no_other(table, known):
    assert set(known) == table.honoured


@pytest.mark.parametrize(
    ("schema", "known"),
    [
        (bodies()["MixtureBody"], admin._MIXTURE_FIELDS),
        (bodies()["ModelBody"], admin._MODEL_FIELDS),
        (rwkv_infer_bodies()["/loadmodel"], rwkv_infer._MODEL_FIELDS),
    ],
    ids=["mixture", "model", "loadmodel"],
)
def test_every_field_of_administration_is_described_and_no_other(schema, known):
    assert set(schema["properties"]) == set(known)


def is_taken(parse, body):
    try:
        parse(body)
    except InvalidRequestError:
        return False
    return True


def limits(known):
    """Yield (key, value, whether it may be had) at every limit of numbers."""
    for key, schema in known.items():
        step = 1 if "integer" in schema.get("type", ()) else 1e-6
        for name, sign, inside in (
            ("minimum", -1, True),
            ("maximum", 1, True),
            ("exclusiveMinimum", -1, False),
            ("exclusiveMaximum", 1, False),
        ):
            if name in schema:
                limit = schema[name]
                yield key, limit, inside
                # Of a large float the next one is further away.
                yield key, limit + sign * max(step, abs(limit) * 1e-6 * (step < 1)), False
                yield key, limit - sign * max(step, abs(limit) * 1e-6 * (step < 1)), True


def test_the_limits_are_those_of_the_parsers():
    extra = {"top_logprobs": {"logprobs": True}}
    for known, parse, base in (
        (schemas.CHAT, parse_chat_request, CHAT),
        (schemas.TEXT, parse_completion_request, {**TEXT, "echo": True}),
        (text_schemas.EMBEDDING, parse_embed_request, EMBEDDING),
    ):
        for key, value, expected in limits(known):
            body = {**base, **extra.get(key, {}), key: value}
            assert is_taken(parse, body) == expected, (key, value)
    for key, value, expected in limits(schemas.MRSS):
        assert is_taken(parse_chat_request, {**CHAT, "mrss": {key: value}}) == expected


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port, feedback = probe.getsockname()[1], folder / "feedback.jsonl"
        config = ServerConfig(port=port, request_timeout_s=10.0, feedback=feedback)
    with serving(AsyncEngine(write_folders(folder)), config):
        yield f"http://127.0.0.1:{config.port}"


def fuzz(address, num_examples):
    """Send every operation bodies that its schema allows, and some that it does not."""
    api = schemathesis.openapi.from_dict(document())
    api.config.update(base_url=address)
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    settings = hypothesis.settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    statuses = []
    for found in api.get_all_operations():
        operation = found.ok()
        # What has a twin below /v1 is the same route.
        has_twin = f"/v1{operation.path}" in document()["paths"] and operation.path != "/models"
        if has_twin or (operation.method.upper(), operation.path) in LEFT_OUT:
            continue
        # Nothing can be wrong about a route that takes nothing; in a path every name is a name.
        takes_something = operation.body or operation.query
        for mode in list(schemathesis.GenerationMode)[: 2 if takes_something else 1]:

            @settings
            @hypothesis.given(operation.as_strategy(generation_mode=mode))
            def send(case):
                name_something(case.body)
                statuses.append(case.call_and_validate(checks=checks, timeout=30).status_code)

            # Nor about a body that is not looked at.
            with contextlib.suppress(hypothesis.errors.Unsatisfiable):
                send()
    assert {200, 400, 404} <= set(statuses)


def name_something(body):
    """Let what a schema cannot know be a name that is served, more often than not."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        names = ("base", "tone", "knowledge+tone", "story", body["model"])
        body["model"] = names[len(body["model"]) % len(names)]


def test_no_request_meets_a_defect(address):
    fuzz(address, num_examples=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_request_of_many_meets_a_defect(address):
    fuzz(address, num_examples=150)
