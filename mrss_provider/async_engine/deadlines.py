"""Deadlines: what a caller waits for and does not get in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from mrss_provider.errors import RequestTimeoutError


@contextlib.asynccontextmanager
async def within(timeout_s: float | None, missed: str) -> AsyncIterator[None]:
    """Cancel what is done inside after `timeout_s` seconds; None never does.

    Args:
        timeout_s: how long it may take.
        missed: what did not happen, for the message: it goes on with "within 5 s".

    Raises:
        RequestTimeoutError: it took longer.
    """
    timer = asyncio.timeout(timeout_s)
    try:
        async with timer:
            yield
    except TimeoutError as exc:
        if not timer.expired():
            # Somebody else's, from inside: it says nothing of this one.
            raise
        raise RequestTimeoutError(f"{missed} within {timeout_s:g} s") from exc
