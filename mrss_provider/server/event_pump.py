"""EventPump: a stream's events are written by plain calls, for as long as they are text only.

A task's turn, and the layers that a body passes on its way to the server, cost several times what
an event does; with hundreds of streams they would take the engine's thread its time.
"""

from __future__ import annotations

import asyncio
from typing import TypeGuard

from mrss_provider.backend import CallsReaders, DeltaStream
from mrss_provider.server.metrics import Meter
from mrss_provider.server.pacing import Pacer
from mrss_provider.server.sse import EventWriter
from mrss_provider.server.stalls import Write


def calls_readers(stream: DeltaStream) -> TypeGuard[CallsReaders]:
    """Tell whether a stream can be read by calls.

    A look at its class: `isinstance` of a protocol makes each attribute of the stream slower.
    """
    return hasattr(type(stream), "call_when_ready")


class EventPump:
    """Writes the events of one answer whose response has been started.

    Args:
        stream: what is read.
        writer: makes its events.
        write: takes them.
        meter: is told of them.
        pacer: says when the next one may be written.

    Attributes:
        events: made and not written yet; whoever goes on after `run` writes them.
    """

    def __init__(
        self, stream: CallsReaders, writer: EventWriter, write: Write, meter: Meter, pacer: Pacer
    ) -> None:
        self.events: list[bytes] = []
        self._stream = stream
        self._writer = writer
        self._write = write
        self._meter = meter
        self._pacer = pacer
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Write events until something else is there to be taken, or the client reads too slowly.

        Raises:
            Exception: what writing raised.
        """
        self._ended = asyncio.get_running_loop().create_future()
        self._go_on()
        try:
            await self._ended
        finally:
            self._stream.call_when_ready(None)
        await self._write.finish()

    def _go_on(self) -> None:
        # Whoever hung up meanwhile has cancelled it.
        if self._ended.done():
            return
        try:
            is_over = self._write_text()
        except Exception as exc:
            self._ended.set_exception(exc)
            return
        if is_over:
            self._ended.set_result(None)

    def _write_text(self) -> bool:
        """Write what is there, and see to it that what comes is; tell whether this is over."""
        stream, events = self._stream, self.events
        while stream.ready():
            piece = stream.take_text()
            if piece is None:
                return True
            self._meter.add_tokens(piece.choice, piece.num_tokens)
            events.append(self._writer.write_text(piece))
        body = events[0] if len(events) == 1 else b"".join(events)
        events.clear()
        if body:
            if not self._write.begin(body):
                return True
            if self._pacer.call_after_pause(self._go_on):
                return False
        stream.call_when_ready(self._go_on)
        return False
