"""CountRequests: requests by route and status."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mrss_provider.server.metrics import Metrics

_NO_ROUTE = "none"


class CountRequests:
    """Counts what is answered (ASGI). A label is a route as it is written, never a caller's path.

    Args:
        app: answers.
        metrics: where it is counted.
        routes: of the application; of those with one endpoint, the first names it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._requests = metrics.requests
        self._labels: dict[object, str] = {}
        for route in routes:
            if isinstance(route, Route):
                self._labels.setdefault(route.endpoint, route.path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count it when its status is known."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        # No coroutine of its own: a stream comes by here with each event.
        def send_counted(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._count(scope, status)
            return send(message)

        try:
            await self._app(scope, receive, send_counted)
        except Exception:
            if not status:
                self._count(scope, 500)
            raise

    def _count(self, scope: Scope, status: int) -> None:
        self._requests[self._labels.get(scope.get("endpoint"), _NO_ROUTE), status] += 1
