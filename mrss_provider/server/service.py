"""Service: what all requests to one server share."""

from __future__ import annotations

from dataclasses import dataclass

from mrss_provider.backend import Backend
from mrss_provider.config import ServerConfig
from mrss_provider.server.lifecycle import Lifecycle
from mrss_provider.server.limits import Allowances
from mrss_provider.server.metrics import Metrics
from mrss_provider.server.pacing import Pacer
from mrss_provider.server.spans import Spans, make_spans
from mrss_provider.server.stalls import Stalls


@dataclass(frozen=True)
class Service:
    """The parts of one server. Belongs to one event loop.

    Attributes:
        backend: where answers come from.
        config: limits and the address.
        lifecycle: whether new work is taken, and how much is under way.
        pacer: says when a stream's next event may be written.
        metrics: what was done.
        allowances: what each key has left.
        stalls: looks after clients that do not read.
        spans: tells OpenTelemetry of each request; None where nobody asked for it.
    """

    backend: Backend
    config: ServerConfig
    lifecycle: Lifecycle
    pacer: Pacer
    metrics: Metrics
    allowances: Allowances
    stalls: Stalls
    spans: Spans | None

    @classmethod
    def of(cls, backend: Backend, config: ServerConfig, lifecycle: Lifecycle) -> Service:
        """Make the parts that a configuration describes.

        Raises:
            ConfigError: what it asks for is not installed.
        """
        metrics = Metrics()

        def count_stalled() -> None:
            metrics.num_stalled += 1

        return cls(
            backend,
            config,
            lifecycle,
            Pacer(config.pacing_ms / 1e3),
            metrics,
            Allowances(),
            Stalls(config.stall_s, count_stalled),
            make_spans() if config.otel else None,
        )
