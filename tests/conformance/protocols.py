"""The clients of other wires: Anthropic's, and plain HTTP for what no client has."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import anthropic
import httpx
from conformance.clients import TIMEOUT_S
from conformance.routes import KEY, Route


class Others:
    """`anthropic.Anthropic`, and `httpx`."""

    def __init__(self, route: Route) -> None:
        self.route = route

    @cached_property
    def _api(self) -> anthropic.Anthropic:
        url = self.route.url.removesuffix("/v1")
        return anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0, timeout=TIMEOUT_S)

    def message(self, **params: Any) -> Any:
        """Ask for a whole message."""
        return self._api.messages.create(**params, model=self.route.model("tone"))

    def message_stream(self, **params: Any) -> Any:
        """Stream a message, and let the client put it together."""
        with self._api.messages.stream(**params, model=self.route.model("tone")) as events:
            return events.get_final_message()

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Post to a path outside /v1, by plain HTTP."""
        url = self.route.url.removesuffix("/v1") + path
        answer = httpx.post(url, json=body, timeout=TIMEOUT_S)
        answer.raise_for_status()
        return answer
