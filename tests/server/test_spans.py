"""Spans for OpenTelemetry. Oracle: its own SDK, in memory."""

import pytest
from fakes import PROMPT_TOKENS, ROWS, FakeBackend, text
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from mrss_provider.config import ServerConfig
from mrss_provider.errors import QueueFullError
from mrss_provider.server import service as service_module
from mrss_provider.server.app import create_app
from mrss_provider.server.spans import Spans, make_spans

SECRET = "Xylophon-geheim"
CHAT = {"model": "tone", "messages": [{"role": "user", "content": SECRET}]}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(service_module, "make_spans", lambda: Spans(provider))
    return exporter


def ask(backend, body, path="/v1/chat/completions", **headers):
    app = create_app(backend, ServerConfig(otel=True))
    with TestClient(app, base_url="http://127.0.0.1:9000") as client:
        return client.post(path, json=body, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_a_span_in_the_conventions_form(exporter, stream):
    body = {**CHAT, "stream": stream, "max_tokens": 5, "temperature": 0.5, "stop": [SECRET]}
    ask(FakeBackend([text(SECRET), text("b")]), body, traceparent=PARENT)
    (span,) = exporter.get_finished_spans()
    assert span.name == "chat tone"
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mrss",
        "gen_ai.request.model": "tone",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.model": "tone",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": PROMPT_TOKENS,
        "gen_ai.usage.output_tokens": 2,
        "mrss.rows": ROWS,
    }
    assert expected.items() <= dict(span.attributes).items()
    assert span.attributes["gen_ai.response.id"].startswith("chatcmpl-")


def test_no_span_holds_what_was_asked_or_answered(exporter):
    ask(FakeBackend([text(SECRET)]), {**CHAT, "stop": [SECRET]})
    ask(FakeBackend([text(SECRET)]), {"model": "tone", "prompt": SECRET}, "/v1/completions")
    for span in exporter.get_finished_spans():
        assert SECRET not in span.to_json()


def test_an_error_is_told_by_its_code(exporter):
    response = ask(FakeBackend(open_error=QueueFullError("full")), CHAT)
    assert response.status_code == 429
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "queue_full"
    assert "gen_ai.response.id" not in span.attributes


def test_without_the_option_there_are_none(exporter):
    with TestClient(create_app(FakeBackend()), base_url="http://127.0.0.1:9000") as client:
        client.post("/v1/chat/completions", json=CHAT)
    assert not exporter.get_finished_spans()


def test_the_real_exporter_can_be_made():
    make_spans().close()
