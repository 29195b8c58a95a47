"""One generation as an ASGI response: admission, then an answer in one piece or as events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import replace

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mrss_provider.backend import Backend, Delta, DeltaStream, StreamInfo
from mrss_provider.errors import EngineError, MRSSError
from mrss_provider.openai_schema import (
    Answer,
    AnswerHead,
    ChunkWriter,
    ParsedRequest,
    chat_response,
    completion_response,
    error_headers,
    error_to_event,
    info_to_headers,
    new_head,
)
from mrss_provider.server import sse
from mrss_provider.server.lifecycle import Lifecycle
from mrss_provider.server.merged import Merged

logger = logging.getLogger(__name__)


class GenerationResponse(Response):
    """Runs `parsed` on `backend` when it is sent.

    The status goes out on admission; whoever hangs up, at any time, ends the answer at once.

    Args:
        backend: where the answer comes from.
        lifecycle: counts it.
        parsed: the request.
        timeout_s: for requests without a timeout of their own.
    """

    def __init__(
        self, backend: Backend, lifecycle: Lifecycle, parsed: ParsedRequest, timeout_s: float
    ) -> None:
        super().__init__()
        self._backend = backend
        self._lifecycle = lifecycle
        self._parsed = parsed
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer (ASGI)."""
        try:
            with self._lifecycle.running():
                await until_disconnect(receive, self._run(scope, receive, send))
        except MRSSError as exc:
            await error_response(exc)(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        streams: list[DeltaStream] = []
        try:
            for request in self._parsed.requests:
                timeout_s = request.timeout_s or self._timeout_s
                streams.append(await self._backend.open(replace(request, timeout_s=timeout_s)))
            info = _joined_info(streams)
            merged = Merged(streams, self._parsed.requests[0].n)
            head = new_head(self._parsed.kind, info)
            if self._parsed.stream.stream:
                await self._send_events(merged, head, info, send)
            else:
                response = await self._collect(merged, head, info)
                await response(scope, receive, send)
        finally:
            for stream in streams:
                await stream.aclose()

    async def _collect(self, merged: Merged, head: AnswerHead, info: StreamInfo) -> Response:
        answer = Answer()
        async for delta in merged:
            answer.add(delta)
        write = chat_response if head.kind == "chat" else completion_response
        return JSONResponse(write(head, answer), headers=info_to_headers(info))

    async def _send_events(
        self, merged: Merged, head: AnswerHead, info: StreamInfo, send: Send
    ) -> None:
        headers = {**sse.HEADERS, **info_to_headers(info)}
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            }
        )
        writer = ChunkWriter(head, self._parsed.stream)
        events: list[bytes] = []
        try:
            async for delta in merged:
                events += _events(writer, delta)
                # What is already here goes out in the same write.
                if events and not merged.ready():
                    await _send_body(send, b"".join(events))
                    events.clear()
            events.append(sse.DONE)
        except MRSSError as exc:
            events.append(sse.event(error_to_event(exc)))
        except Exception:
            logger.exception("a defect while answering %s", head.id)
            error = EngineError(f"a defect of the engine; its log tells more under {head.id}")
            events.append(sse.event(error_to_event(error)))
        await _send_body(send, b"".join(events), is_last=True)


async def until_disconnect(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Run `work`, but cancel it as soon as the client hangs up.

    Raises:
        Exception: what `work` raises.
    """
    task = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        listener.cancel()
        task.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)
    if not task.cancelled():
        task.result()


def error_response(error: MRSSError) -> Response:
    """Return `error` with its status, in OpenAI's form."""
    return JSONResponse(error.to_dict(), error.status_code, headers=error_headers(error))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_body(send: Send, body: bytes, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


def _events(writer: ChunkWriter, delta: Delta) -> list[bytes]:
    return [sse.event(chunk) for chunk in writer.chunks(delta)]


def _joined_info(streams: Sequence[DeltaStream]) -> StreamInfo:
    """Return the first stream's info with every prompt's tokens; all are of one mixture."""
    first = streams[0].info
    total = sum(stream.info.prompt_tokens for stream in streams)
    return StreamInfo(first.mixture, first.rows, first.fingerprint, total)
