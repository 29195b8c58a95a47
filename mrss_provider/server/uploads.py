"""Uploads: a request's body into a file, bounded, without holding up the event loop."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.requests import Request

from mrss_provider.errors import (
    InvalidRequestError,
    PayloadTooLargeError,
    RequestTimeoutError,
    StateFileError,
    StorageError,
)

# Written at once: far above what a socket gives, far below what hurts to hold.
_BLOCK_BYTES = 1 << 20


@asynccontextmanager
async def uploaded(
    request: Request, suffix: str, max_bytes: int, setting: str, stall_s: float
) -> AsyncIterator[Path]:
    """Yield the body as a file that is gone afterwards.

    Args:
        request: whose body it is.
        suffix: of the file's name.
        max_bytes: more are refused.
        setting: that says how many.
        stall_s: longest silence.

    Raises:
        InvalidRequestError: another content type, or no bytes.
        PayloadTooLargeError: more than `max_bytes`; the rest is not read.
        RequestTimeoutError: nothing came for `stall_s` seconds.
        StorageError: it cannot be written.
        ClientDisconnect: the client left first.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/octet-stream":
        raise InvalidRequestError(
            f"a file is sent as application/octet-stream, got {media_type or 'none'!r:.80}",
            param="content-type",
        )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes, setting)
    try:
        folder = await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="mrss-upload-")
    except OSError as exc:
        raise StorageError(f"an upload cannot be written: {exc.strerror or exc}") from exc
    try:
        path = Path(folder.name) / f"upload{suffix}"
        try:
            async with asyncio.timeout(stall_s) as silence:
                await _receive(request, path, max_bytes, setting, silence, stall_s)
        except TimeoutError as exc:
            raise RequestTimeoutError(f"nothing came for {stall_s:g} s") from exc
        try:
            yield path
        except StateFileError as exc:
            # Where it lay here is nothing to who sent it.
            told = exc.message.replace(str(path), "the upload")
            raise StateFileError(told, param=exc.param) from exc
    finally:
        await asyncio.to_thread(folder.cleanup)


async def _receive(
    request: Request,
    path: Path,
    max_bytes: int,
    setting: str,
    silence: asyncio.Timeout,
    stall_s: float,
) -> None:
    loop = asyncio.get_running_loop()
    block = bytearray()
    size = 0
    async for piece in request.stream():
        silence.reschedule(loop.time() + stall_s)
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes, setting)
        block += piece
        if len(block) >= _BLOCK_BYTES:
            await asyncio.to_thread(_append, path, bytes(block))
            block.clear()
    if not size:
        raise InvalidRequestError("the body is empty; send the bytes of a file")
    await asyncio.to_thread(_append, path, bytes(block))


def _append(path: Path, block: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(block)
    except OSError as exc:
        raise StorageError(f"an upload cannot be written: {exc.strerror or exc}") from exc


def _too_large(max_bytes: int, setting: str) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the file may have {max_bytes} bytes ({setting}); send less")
