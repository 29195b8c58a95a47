"""Spans: one for each answer, with OpenTelemetry's attributes for generative AI.

They tell numbers, names and how it ended, never what was asked or answered. Where they are sent is
for OpenTelemetry's own variables to say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, ...).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.types import Scope

from mrss_provider import __version__
from mrss_provider.backend import GenerateRequest
from mrss_provider.errors import ConfigError
from mrss_provider.openai_schema import ParsedRequest
from mrss_provider.server.metrics import Meter

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Value = str | int | float | tuple[str, ...]

_OPERATIONS = {"chat": "chat", "text": "text_completion"}


class Spans:
    """Makes the spans of one server.

    Args:
        provider: where they go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("mrss_provider", __version__)

    @contextmanager
    def span(self, parsed: ParsedRequest, scope: Scope, owner: str, meter: Meter) -> Iterator[None]:
        """Tell of the answer that is given within; a caller's `traceparent` is continued."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        request = parsed.requests[0]
        operation = _OPERATIONS[parsed.kind]
        span = self._tracer.start_span(
            f"{operation} {request.model}",
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes=_asked(request, operation, owner),
        )
        try:
            yield
        finally:
            span.set_attributes(_answered(meter))
            if meter.error_code:
                span.set_attribute("error.type", meter.error_code)
                span.set_status(StatusCode.ERROR)
            span.end()

    def close(self) -> None:
        """Send what has not been sent yet; waits for it."""
        self._provider.shutdown()


def make_spans() -> Spans:
    """Return spans that are sent by OTLP over HTTP.

    Raises:
        ConfigError: OpenTelemetry's SDK is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise ConfigError(
            "otel needs OpenTelemetry's SDK: pip install 'mrss-provider[otel]'", param="otel"
        ) from exc
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
    named = Resource({"service.name": "mrss", "service.version": __version__})
    provider = TracerProvider(resource=named.merge(Resource.create()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider)


def _asked(request: GenerateRequest, operation: str, owner: str) -> Mapping[str, Value]:
    sampling = request.sampling
    values = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "mrss",
        "gen_ai.output.type": "text",
        "gen_ai.request.model": request.model,
        "gen_ai.request.choice.count": request.n if request.n != 1 else None,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": sampling.seed,
        "mrss.owner": owner or None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _answered(meter: Meter) -> Mapping[str, Value]:
    if meter.info is None:
        return {}
    usage = meter.usage
    return {
        "gen_ai.response.id": meter.answer_id,
        "gen_ai.response.model": meter.info.mixture,
        "gen_ai.response.finish_reasons": (meter.end_reason,),
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "mrss.rows": meter.info.rows,
    }
