"""Deadlines: who is too late is told so, and who meets another timeout is told of that."""

from __future__ import annotations

import asyncio

import pytest

from mrss_provider.async_engine.deadlines import within
from mrss_provider.errors import RequestTimeoutError


def test_what_takes_too_long_is_cancelled_and_told_with_its_limit() -> None:
    ended: list[str] = []

    async def wait() -> None:
        async with within(0.01, "the answer did not come"):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

    with pytest.raises(RequestTimeoutError, match=r"the answer did not come within 0\.01 s"):
        asyncio.run(wait())
    assert ended == ["cancelled"]


@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_a_timeout_from_inside_stays_what_it_is(timeout_s: float | None) -> None:
    async def fail() -> None:
        async with within(timeout_s, "the answer did not come"):
            raise TimeoutError("the disk")

    with pytest.raises(TimeoutError, match="the disk") as raised:
        asyncio.run(fail())
    assert not isinstance(raised.value, RequestTimeoutError)
