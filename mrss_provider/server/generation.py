"""One generation as an ASGI response: admission, then an answer in one piece or as events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mrss_provider.backend import DeltaStream, GenerateRequest
from mrss_provider.errors import EngineError, InvalidRequestError, MRSSError
from mrss_provider.openai_schema import (
    Answer,
    AnswerHead,
    ChunkWriter,
    ParsedRequest,
    chat_response,
    completion_response,
    error_to_event,
    info_to_headers,
    new_head,
)
from mrss_provider.server import sse
from mrss_provider.server.auth import Caller
from mrss_provider.server.event_pump import EventPump, calls_readers
from mrss_provider.server.limits import limited, num_tokens_of
from mrss_provider.server.merged import merge
from mrss_provider.server.metrics import Meter
from mrss_provider.server.refusals import error_response
from mrss_provider.server.service import Service
from mrss_provider.server.stalls import Write

logger = logging.getLogger(__name__)


class GenerationResponse(Response):
    """Runs `parsed` when it is sent.

    The status goes out on admission; whoever hangs up, at any time, ends the answer at once.

    Args:
        service: the server's parts.
        parsed: the request.
        caller: who asks.
    """

    def __init__(self, service: Service, parsed: ParsedRequest, caller: Caller) -> None:
        super().__init__()
        self._service = service
        self._parsed = parsed
        self._requests = [limited(r, caller, service.config) for r in parsed.requests]
        self._caller = caller
        self._allowance = service.allowances.of(caller)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer (ASGI)."""
        service = self._service
        with (
            service.metrics.answer() as meter,
            service.stalls.watched(scope, send) as write,
            self._span(scope, meter),
        ):
            try:
                await self._answer(scope, receive, write, meter)
            except MRSSError as exc:
                meter.fail(exc)
                await error_response(exc)(scope, receive, write.send)
            except Exception:
                meter.fail(EngineError("a defect"))
                raise

    async def _answer(self, scope: Scope, receive: Receive, write: Write, meter: Meter) -> None:
        taken = self._allowance.taken(self._caller.limits, num_tokens_of(self._requests))
        with self._service.lifecycle.running(), taken as reservation:
            try:
                await until_disconnect(receive, self._run(scope, receive, write, meter))
            finally:
                reservation.num_used = meter.usage.total_tokens

    def _span(self, scope: Scope, meter: Meter) -> AbstractContextManager[None]:
        spans = self._service.spans
        return (
            nullcontext()
            if spans is None
            else spans.span(self._parsed, scope, self._caller.id, meter)
        )

    async def _run(self, scope: Scope, receive: Receive, write: Write, meter: Meter) -> None:
        streams: list[DeltaStream] = []
        try:
            for request in self._requests:
                streams.append(await self._open(request, len(streams)))
            n = self._requests[0].n
            merged = merge(streams, n)
            head = new_head(self._parsed.kind, merged.info)
            num_answers = self._requests[0].num_answers
            meter.admit(merged.info, num_answers * len(streams), head.id)
            if self._parsed.stream.stream:
                await self._send_events(merged, head, write, meter)
            else:
                response = await self._collect(merged, head, meter)
                await response(scope, receive, write.send)
        finally:
            for stream in streams:
                await stream.aclose()

    async def _open(self, request: GenerateRequest, position: int) -> DeltaStream:
        """Admit a request; of several it is said which one is at fault."""
        try:
            return await self._service.backend.open(request)
        except InvalidRequestError as exc:
            if len(self._requests) == 1 or exc.param not in (None, "prompt"):
                raise
            where = f"prompt[{position}]"
            raise type(exc)(f"{where}: {exc.message}", param="prompt") from exc

    async def _collect(self, merged: DeltaStream, head: AnswerHead, meter: Meter) -> Response:
        answer = Answer()
        async for delta in merged:
            meter.add(delta)
            answer.add(delta)
        write = chat_response if head.kind == "chat" else completion_response
        return JSONResponse(write(head, answer), headers=self._headers_of(merged))

    def _headers_of(self, merged: DeltaStream) -> dict[str, str]:
        return info_to_headers(merged.info) | self._allowance.headers()

    @property
    def _is_text_only(self) -> bool:
        """Whether nothing is told of a token but its text."""
        return not any(r.sampling.logprobs or r.mixture.trace for r in self._requests)

    async def _send_events(
        self, merged: DeltaStream, head: AnswerHead, write: Write, meter: Meter
    ) -> None:
        headers = {**sse.HEADERS, **self._headers_of(merged)}
        await write.send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            }
        )
        writer = sse.EventWriter(ChunkWriter(head, self._parsed.stream))
        pacer = self._service.pacer
        events: list[bytes] = []
        # Several prompts' streams are read ahead: to hold them back would make them slower.
        is_paced = len(self._requests) == 1
        pump: EventPump | None = None
        if write.can_begin and self._is_text_only and calls_readers(merged):
            pump = EventPump(merged, writer, write, meter, pacer)
            events = pump.events
        try:
            with pacer.stream():
                async for delta in merged:
                    meter.add(delta)
                    events.append(writer.write(delta))
                    # What is already here goes out in the same write.
                    if merged.ready() or not any(events):
                        continue
                    await _send_body(write, b"".join(events))
                    events.clear()
                    if is_paced:
                        await pacer.pause()
                    if pump is not None:
                        await pump.run()
            events.append(sse.DONE)
        except MRSSError as exc:
            meter.fail(exc)
            events.append(sse.event(error_to_event(exc)))
        except Exception:
            logger.exception("a defect while answering %s", head.id)
            error = EngineError(f"a defect of the engine; its log tells more under {head.id}")
            meter.fail(error)
            events.append(sse.event(error_to_event(error)))
        await _send_body(write, b"".join(events), is_last=True)


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


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_body(write: Write, body: bytes, *, is_last: bool = False) -> None:
    await write.send({"type": "http.response.body", "body": body, "more_body": not is_last})
