"""The engine behind each address. Belongs to the I/O loop."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from mrss_provider.autostart import LocalEngine, engine_address
from mrss_provider.backend import DeltaStream, Embeddings, EmbedRequest, GenerateRequest
from mrss_provider.client import Client
from mrss_provider.errors import EngineUnavailableError

T = TypeVar("T")

# LiteLLM calls `astreaming` on one of a few pool threads that serve all its providers, so none of
# them may sit there until an engine has loaded its weights.
ADMISSION_WAIT_S = 2.0
FIRST_ADMISSION_WAIT_S = 0.25


class Engines:
    """Backends by address: the call's own, else `MRSS_SOCKET`, else an engine started for us."""

    def __init__(self) -> None:
        self._backends: dict[tuple[str | None, str | None], Client | LocalEngine] = {}
        self._answering: set[str | None] = set()

    def admission_wait_s(self, address: str | None) -> float:
        """Return how long a thread may wait for an admission (from any thread)."""
        is_warm = engine_address(address) in self._answering
        return ADMISSION_WAIT_S if is_warm else FIRST_ADMISSION_WAIT_S

    async def open(
        self, address: str | None, api_key: str | None, request: GenerateRequest
    ) -> DeltaStream:
        """Admit `request` at the engine behind `address`.

        Raises:
            EngineUnavailableError: nobody answers there, or no engine could be started.
            MRSSError: what the engine refused the request with.
        """
        address = engine_address(address)
        return await self._asked(address, self._backend(address, api_key).open(request))

    async def embed(
        self, address: str | None, api_key: str | None, request: EmbedRequest
    ) -> Embeddings:
        """Embed texts at the engine behind `address`; raises as `open`."""
        address = engine_address(address)
        return await self._asked(address, self._backend(address, api_key).embed(request))

    async def _asked(self, address: str | None, asking: Awaitable[T]) -> T:
        """Await what an engine was asked, and remember whether it answers."""
        try:
            answer = await asking
        except EngineUnavailableError:
            self._answering.discard(address)
            raise
        self._answering.add(address)
        return answer

    async def aclose(self) -> None:
        """Close every backend; idempotent."""
        while self._backends:
            _, backend = self._backends.popitem()
            await backend.aclose()

    def _backend(self, address: str | None, api_key: str | None) -> Client | LocalEngine:
        key = (address, api_key)
        if key not in self._backends:
            self._backends[key] = (
                LocalEngine() if address is None else Client(address, api_key=api_key)
            )
        return self._backends[key]
