"""Placeholder."""

from __future__ import annotations

from mrss_provider.backend import DeltaStream, GenerateRequest


class Engines:
    def admission_wait_s(self, address: str | None) -> float:
        return 2.0

    async def open(
        self, address: str | None, api_key: str | None, request: GenerateRequest
    ) -> DeltaStream:
        raise NotImplementedError

    async def aclose(self) -> None:
        pass
