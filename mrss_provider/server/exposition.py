"""The numbers of a server in Prometheus's text form, put together when somebody asks."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mrss_provider import __version__
from mrss_provider.backend import Backend, EngineStats, Observable
from mrss_provider.server.metrics import Histogram, Metrics

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Exposition(Collector):
    """Collects the metrics of one server.

    Args:
        metrics: what the server counts.
        backend: asked for its `stats`, if it has any.
        model: what the loaded model is called.
    """

    def __init__(self, metrics: Metrics, backend: Backend, model: str) -> None:
        self._metrics = metrics
        self._backend = backend
        self._model = model
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """Return everything."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield each family (prometheus_client's `Collector`)."""
        yield self._build()
        yield from self._of_answers()
        stats = self._backend.stats() if isinstance(self._backend, Observable) else None
        if stats is not None:
            yield from _of_engine(stats)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the registry need not collect to know our names."""
        return []

    def _build(self) -> Metric:
        labels = {
            "version": __version__,
            "model": self._model,
            "python": platform.python_version(),
        }
        return InfoMetricFamily("mrss_build", "What is running.", value=labels)

    def _of_answers(self) -> Iterator[Metric]:
        metrics = self._metrics
        requests = CounterMetricFamily(
            "mrss_http_requests", "Requests answered.", labels=["route", "status"]
        )
        for (route, status), num in sorted(metrics.requests.items()):
            requests.add_metric([route, str(status)], num)
        yield requests
        ends = CounterMetricFamily(
            "mrss_answers", "Answers that ended, by why they did.", labels=["reason"]
        )
        for reason, num in sorted(metrics.ends.items()):
            ends.add_metric([reason], num)
        yield ends
        tokens = CounterMetricFamily(
            "mrss_tokens",
            "Tokens of ended answers: of prompts, of those from the cache, and of answers.",
            labels=["kind"],
        )
        tokens.add_metric(["prompt"], metrics.usage.prompt_tokens)
        tokens.add_metric(["cached"], metrics.usage.cached_tokens)
        tokens.add_metric(["completion"], metrics.usage.completion_tokens)
        yield tokens
        yield CounterMetricFamily(
            "mrss_stalled_clients", "Clients dropped, as they did not read.", metrics.num_stalled
        )
        rows = GaugeMetricFamily(
            "mrss_mixture_rows",
            "Rows asked for by answers that are under way, waiting ones too.",
            labels=["mixture"],
        )
        for name, num in metrics.rows_by_mixture().items():
            rows.add_metric([name], num)
        yield rows
        yield _histogram(
            "mrss_time_to_first_token_seconds", "From request to first token.", metrics.first
        )
        yield _histogram(
            "mrss_inter_token_seconds", "Between two tokens of an answer.", metrics.gap
        )
        yield _histogram(
            "mrss_answer_seconds", "From request to the end of the answer.", metrics.whole
        )


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.total)


def _of_engine(stats: EngineStats) -> Iterator[Metric]:
    for name, text, value in (
        ("requests_waiting", "Requests that wait for rows.", stats.num_waiting),
        ("requests_running", "Requests that have rows.", stats.num_running),
        ("rows_used", "Rows that are held.", stats.num_rows),
        ("rows_free", "Rows that nobody holds.", stats.num_free_rows),
        ("device_bytes", "Memory of the device that we hold.", stats.device_bytes),
        ("device_total_bytes", "Memory that the device has.", stats.device_bytes_total),
    ):
        yield GaugeMetricFamily(f"mrss_{name}", text, value)
    for name, text, value in (
        ("steps", "Steps of the engine.", stats.num_steps),
        ("prompt_tokens_read", "Prompt tokens that the engine read.", stats.num_prompt_tokens),
        ("tokens_sampled", "Tokens that the engine drew.", stats.num_sampled_tokens),
    ):
        yield CounterMetricFamily(f"mrss_{name}", text, value)
    cache = stats.cache
    if cache is None:
        return
    for name, text, value in (
        ("cache_hits", "Requests that began with cached states.", cache.hits),
        ("cache_misses", "Requests that might have, and did not.", cache.misses),
        ("cache_hit_tokens", "Prompt tokens that were not read again.", cache.hit_tokens),
    ):
        yield CounterMetricFamily(f"mrss_{name}", text, value)
    held = GaugeMetricFamily("mrss_cache_bytes", "What the cache holds.", labels=["tier"])
    held.add_metric(["device"], cache.device_bytes)
    held.add_metric(["ram"], cache.ram_bytes)
    held.add_metric(["disk"], cache.disk_bytes)
    yield held
    yield GaugeMetricFamily("mrss_cache_entries", "States that it holds.", cache.num_entries)
