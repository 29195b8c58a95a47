"""LeanTransport: HTTP/1.1 for httpx, over TCP, TLS or a Unix socket, at a low cost a chunk.

httpx's own transport spends about 100 us of CPU on each chunk of a streamed answer, this one
about a fifth of it. One connection a request: closing it is how an answer is cancelled, nothing
goes stale, and nothing belongs to an event loop for longer than a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import httpx

MAX_HEAD_BYTES = 64 << 10
MAX_CHUNK_BYTES = 8 << 20
# Above it the socket is not read until the reader has caught up.
_MAX_BUFFERED_BYTES = 1 << 20


class LeanTransport(httpx.AsyncBaseTransport):
    """Sends each request on a connection of its own.

    The response's `extensions["connection"]` is the `Connection`, for `abort`.
    """

    def __init__(self, socket_path: Path | None = None) -> None:
        self._socket_path = socket_path
        self._ssl_context: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`, wait for the head of the answer.

        Raises:
            httpx.ConnectError: nobody listens.
            httpx.TimeoutException: the connection or the head took too long.
            httpx.RemoteProtocolError: the answer is no HTTP/1.1.
            httpx.ReadError: the peer hung up. It may have read the request: nobody sends it twice.
        """
        timeouts = request.extensions.get("timeout", {})
        body = await request.aread()
        connection = await self._connect(request.url, timeouts.get("connect"))
        try:
            connection.send(_head_bytes(request) + body)
            async with asyncio.timeout(timeouts.get("read")):
                status, headers = await connection.head()
        except TimeoutError as exc:
            await connection.aclose()
            raise httpx.ReadTimeout("no answer in time", request=request) from exc
        except BaseException:
            await connection.aclose()
            raise
        connection.watch(timeouts.get("read"))
        return httpx.Response(
            status, headers=headers, stream=connection, extensions={"connection": connection}
        )

    async def _connect(self, url: httpx.URL, timeout_s: float | None) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                if self._socket_path is not None:
                    _, protocol = await loop.create_unix_connection(
                        Connection, path=str(self._socket_path)
                    )
                else:
                    is_tls = url.scheme == "https"
                    _, protocol = await loop.create_connection(
                        Connection,
                        host=url.host,
                        port=url.port or (443 if is_tls else 80),
                        ssl=self._tls() if is_tls else None,
                    )
        except TimeoutError as exc:
            raise httpx.ConnectTimeout("no connection in time") from exc
        except OSError as exc:
            raise httpx.ConnectError(exc.strerror or str(exc)) from exc
        return protocol

    def _tls(self) -> ssl.SSLContext:
        # Reading the certificates takes tens of milliseconds.
        if self._ssl_context is None:
            try:
                # With SSL_CERT_FILE and SSL_CERT_DIR, as everybody's clients have it.
                self._ssl_context = httpx.create_ssl_context()
            except OSError as exc:
                raise httpx.ConnectError(f"bad SSL_CERT_FILE or SSL_CERT_DIR: {exc}") from exc
        return self._ssl_context


class Connection(asyncio.Protocol, httpx.AsyncByteStream):
    """One request's connection; as a byte stream, the body of the answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._body: _Body | None = None
        self._pieces: list[bytes] = []
        self._num_buffered = 0
        self._is_paused = False
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._head: tuple[int, list[tuple[bytes, bytes]]] | None = None
        self._idle_s = 0.0
        self._last_read = 0.0
        self._watchdog: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio calls this)."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Take bytes from the socket (asyncio calls this)."""
        self._last_read = self._loop.time()
        try:
            if self._body is None:
                self._buffer += data
                self._read_head()
            else:
                self._take(self._body.feed(data))
        except ValueError as exc:
            self.abort(httpx.RemoteProtocolError(f"not HTTP/1.1: {exc}"))
            return
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end of the connection (asyncio calls this)."""
        self.watch(None)
        if not self._ended and self._error is None:
            if self._body is not None and self._body.ends_with_connection and exc is None:
                self._ended = True
            else:
                where = "before an answer" if self._head is None else "in mid-answer"
                self._error = httpx.ReadError(f"the connection was closed {where}")
        self._wake()

    def send(self, data: bytes) -> None:
        """Write `data` without waiting."""
        if self._transport is not None:
            self._transport.write(data)

    async def head(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Wait for the status and headers of the answer."""
        while self._head is None:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._head

    @property
    def is_open(self) -> bool:
        """Whether more of the body may come."""
        return not self._ended and self._error is None

    def watch(self, idle_s: float | None) -> None:
        """Abort with `httpx.ReadTimeout` after `idle_s` seconds without a byte; None: never."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        if idle_s is not None and not self._ended:
            self._idle_s = idle_s
            self._last_read = self._loop.time()
            self._watchdog = self._loop.call_later(idle_s, self._check_idle)

    def abort(self, error: Exception) -> None:
        """Close the connection and raise `error` from the reader once it has what came before."""
        if not self._ended and self._error is None:
            self._error = error
        if self._transport is not None:
            _shut_down(self._transport)
            self._transport.abort()
        self._wake()

    async def read(self) -> bytes:
        """Return what has come of the body since the last time, b"" at its end.

        Raises:
            httpx.ReadError: the connection broke off; or the error given to `abort`.
        """
        while not self._pieces:
            if self._ended:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._num_buffered = 0
        if self._is_paused:
            self._is_paused = False
            assert self._transport is not None
            self._transport.resume_reading()
        return data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield what `read` returns, to the end."""
        while data := await self.read():
            yield data

    def close(self) -> None:
        """Close the connection, which tells the server to stop; idempotent."""
        self.watch(None)
        self.abort(httpx.ReadError("closed"))

    async def aclose(self) -> None:
        """Do as `close`."""
        self.close()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check_idle(self) -> None:
        idle_s = self._loop.time() - self._last_read
        # While we do not read, silence is not the server's.
        if idle_s < self._idle_s or self._is_paused:
            wait_s = self._idle_s if self._is_paused else self._idle_s - idle_s
            self._watchdog = self._loop.call_later(wait_s, self._check_idle)
        else:
            self.abort(httpx.ReadTimeout(f"no byte for {self._idle_s:g} s"))

    def _read_head(self) -> None:
        while self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise ValueError("the head of the answer is too long")
                return
            status, headers = _parse_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            if status >= 200:
                self._head = (status, headers)
                self._body = _Body(status, headers)
                self._take(self._body.feed(bytes(self._buffer)))
                self._buffer.clear()

    def _take(self, pieces: list[bytes]) -> None:
        self._pieces.extend(pieces)
        self._num_buffered += sum(map(len, pieces))
        assert self._body is not None
        if self._body.is_complete:
            self._ended = True
            self.watch(None)
            if self._transport is not None:
                self._transport.close()
        elif self._num_buffered > _MAX_BUFFERED_BYTES and not self._is_paused:
            assert self._transport is not None
            self._is_paused = True
            self._transport.pause_reading()


class _Body:
    """Takes the framing off a body: chunked, by length, or to the end of the connection."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        named = {name.lower(): value.strip().lower() for name, value in headers}
        self._chunked = named.get(b"transfer-encoding") == b"chunked"
        self._left: int | None = None
        if status in (204, 304):
            self._left, self._chunked = 0, False
        elif not self._chunked and b"content-length" in named:
            self._left = int(named[b"content-length"])
        self.ends_with_connection = not self._chunked and self._left is None
        self.is_complete = self._left == 0
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the content in `data` and what was left of the data before.

        Raises:
            ValueError: broken framing.
        """
        if self._chunked:
            return self._feed_chunked(data)
        if self._left is None:
            return [data] if data else []
        data = data[: self._left]
        self._left -= len(data)
        self.is_complete = self._left == 0
        return [data] if data else []

    def _feed_chunked(self, data: bytes) -> list[bytes]:
        if self._rest:
            data = self._rest + data
        pieces = []
        at = 0
        while not self.is_complete:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                break
            size = int(data[at:line_end].partition(b";")[0], 16)
            if not 0 <= size <= MAX_CHUNK_BYTES:
                raise ValueError(f"a chunk of {size} bytes")
            end = line_end + 2 + size
            if len(data) < end + 2:
                break
            if data[end : end + 2] != b"\r\n":
                raise ValueError("a chunk without its end")
            self.is_complete = size == 0
            if size:
                pieces.append(data[line_end + 2 : end])
            at = end + 2
        self._rest = data[at:]
        if len(self._rest) > MAX_CHUNK_BYTES + MAX_HEAD_BYTES:
            raise ValueError("a chunk without its end")
        return pieces


def _shut_down(transport: asyncio.Transport) -> None:
    """Tell the peer that we left, even while a forked process holds the socket open, too."""
    peer = transport.get_extra_info("socket")
    if peer is not None:
        # uvloop's socket has no `shutdown`; one that is closed already has no descriptor.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(peer.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)


def _head_bytes(request: httpx.Request) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % (name, value) for name, value in request.headers.raw]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _parse_head(head: bytes) -> tuple[int, list[tuple[bytes, bytes]]]:
    first, *lines = head.split(b"\r\n")
    version, _, rest = first.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise ValueError(f"it begins with {first[:40]!r}")
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name.strip():
            raise ValueError(f"a header line {line[:40]!r}")
        headers.append((name.strip(), value.strip()))
    return int(rest[:3]), headers
