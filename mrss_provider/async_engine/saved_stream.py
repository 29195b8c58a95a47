"""SavedStream: an answer whose session is saved before it ends. `Reader`: who wants no answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from mrss_provider.async_engine.stream import TextStream
from mrss_provider.backend import Delta, DeltaStream, StreamInfo, TextPiece
from mrss_provider.engine.request import TokenOutput
from mrss_provider.errors import MRSSError


class SavedStream:
    """A `DeltaStream` that saves its session between the answer and the end.

    Args:
        inner: the answer.
        save: takes the answer as the model wrote it, and why it ended.
        release: called when it is over, perhaps more than once.
    """

    def __init__(
        self,
        inner: TextStream,
        save: Callable[[str, str], Coroutine[None, None, None]],
        release: Callable[[], None],
    ) -> None:
        self.info: StreamInfo = inner.info
        self._inner = inner
        self._save = save
        self._release = release
        self._texts: list[str] = []
        self._reason = ""
        self._saving: asyncio.Future[None] | None = None

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> Delta:
        delta = await self._inner.__anext__()
        self._texts.append(delta.text)
        self._reason = delta.finish_reason or self._reason
        if delta.usage is not None:
            said = self._inner.said
            text = "".join(self._texts) if said is None else said
            self._saving = asyncio.ensure_future(self._save(text, self._reason))
            self._saving.add_done_callback(lambda _: self._release())
            # Whoever leaves now leaves a thread that writes: nobody else may save before it has.
            await asyncio.shield(self._saving)
        return delta

    def ready(self) -> bool:
        """Whether the next delta, or the end, is already here."""
        return self._inner.ready()

    def take_text(self) -> TextPiece | None:
        """Return the next delta if it is here and is text only; else None, and nothing is taken."""
        piece = self._inner.take_text()
        if piece is not None:
            self._texts.append(piece.text)
        return piece

    def call_when_ready(self, call: Callable[[], None] | None) -> None:
        """Call `call` once when `ready` becomes true, which it is not now; None takes that back."""
        self._inner.call_when_ready(call)

    async def aclose(self) -> None:
        """Abort what still runs, and save nothing of it; idempotent."""
        await self._inner.aclose()
        if self._saving is None:
            self._release()


class Reader:
    """Who waits for a prompt to be read, and for nothing else. A `Sink`."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self.loop.create_future()

    def on_output(self, output: TokenOutput) -> None:
        """Take the one token that comes after the prompt."""
        if output.error is not None:
            self.on_failure(output.error)
        elif not self.ended.done():
            self.ended.set_result(None)

    def on_failure(self, error: MRSSError) -> None:
        """Learn that nothing will come."""
        if not self.ended.done():
            self.ended.set_exception(error)
