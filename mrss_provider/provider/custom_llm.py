"""MRSSProvider: what LiteLLM calls. Weightless: it loads nothing and connects on first use."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, TypeVar

from litellm.llms.custom_llm import CustomLLM
from litellm.types.utils import EmbeddingResponse, ModelResponse, TextCompletionResponse

from mrss_provider.backend import Backend, DeltaStream, Embeds, GenerateRequest, StreamInfo
from mrss_provider.errors import InvalidRequestError, MRSSError, RequestTimeoutError
from mrss_provider.openai_schema import Answer
from mrss_provider.provider.answers import RunningAnswer
from mrss_provider.provider.caching import keep_out_of_cache, loses_by_caching
from mrss_provider.provider.calls import Call, check_streamable, read_call
from mrss_provider.provider.chunks import StreamChunks
from mrss_provider.provider.embeddings import EmbedCall, read_embed_call, to_embeddings
from mrss_provider.provider.engines import Engines
from mrss_provider.provider.error_map import PROVIDER, BrokenOff, to_litellm
from mrss_provider.provider.io_thread import IOThread
from mrss_provider.provider.responses import to_chat, to_text
from mrss_provider.provider.streams import ChunkStream

T = TypeVar("T")

STREAM_LIMIT_S = 86_400.0

_NO_IMAGES = InvalidRequestError(
    "mrss models write text and make no images; ask another model for them", param="model"
)


class _Process:
    """What one process holds: a forked child must not use its parent's thread and sockets."""

    def __init__(self) -> None:
        self.io = IOThread()
        self.engines = Engines()
        self.io.at_stop(self.engines.aclose)


class MRSSProvider(CustomLLM):  # type: ignore[misc]
    """LiteLLM's provider `mrss`: a client of the engine, with one I/O thread a process.

    LiteLLM passes everything by keyword. All methods raise LiteLLM's exceptions, as `error_map`
    says, and nothing else.

    Args:
        backend: an engine of this process, for calls that name no `api_base`; None finds or
            starts an engine process.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        super().__init__()
        self._backend = backend
        self._by_pid: dict[int, _Process] = {}

    def attach(self, backend: Backend | None) -> None:
        """Answer calls that name no `api_base` from `backend`; None: from an engine process."""
        self._backend = backend

    def close(self) -> None:
        """End what still runs and the I/O thread; the next call starts anew. Idempotent."""
        process = self._by_pid.pop(os.getpid(), None)
        if process is not None:
            process.io.stop()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` where the backend is used, and wait for it."""
        return self._process.io.run(coroutine)

    def completion(self, **kwargs: Any) -> ModelResponse | TextCompletionResponse:
        """Answer a call of the sync SDK."""
        try:
            return self.run(self._collect(_read(kwargs)))
        except Exception as exc:
            raise to_litellm(exc, _name(kwargs)) from exc

    async def acompletion(self, **kwargs: Any) -> ModelResponse | TextCompletionResponse:
        """Answer a call. Cancelling this aborts the answer."""
        try:
            return await _result_of(self._process.io.submit(self._collect(_read(kwargs))))
        except Exception as exc:
            raise to_litellm(exc, _name(kwargs)) from exc

    def streaming(self, **kwargs: Any) -> ChunkStream:
        """Admit a call of the sync SDK; return its chunks, an iterator."""
        return self._stream(kwargs)

    def astreaming(self, **kwargs: Any) -> ChunkStream:
        """Admit a call; return its chunks, an async iterator.

        A plain function, which LiteLLM calls on a pool thread: what it raises is retried and
        falls back as for a whole answer, while nothing is after an iterator was returned.
        """
        return self._stream(kwargs)

    def embedding(self, **kwargs: Any) -> EmbeddingResponse:
        """Embed texts for the sync SDK."""
        try:
            return self.run(self._embed(read_embed_call(kwargs)))
        except Exception as exc:
            raise to_litellm(exc, _name(kwargs)) from exc

    async def aembedding(self, **kwargs: Any) -> EmbeddingResponse:
        """Embed texts. Cancelling this aborts the work."""
        try:
            return await _result_of(self._process.io.submit(self._embed(read_embed_call(kwargs))))
        except Exception as exc:
            raise to_litellm(exc, _name(kwargs)) from exc

    def image_generation(self, **kwargs: Any) -> NoReturn:
        """Refuse to make an image, and do not blame the engine."""
        raise to_litellm(_NO_IMAGES, _name(kwargs))

    async def aimage_generation(self, **kwargs: Any) -> NoReturn:
        """Do as `image_generation`."""
        self.image_generation(**kwargs)

    def image_edit(self, **kwargs: Any) -> NoReturn:
        """Do as `image_generation`."""
        self.image_generation(**kwargs)

    async def aimage_edit(self, **kwargs: Any) -> NoReturn:
        """Do as `image_generation`."""
        self.image_generation(**kwargs)

    @property
    def _process(self) -> _Process:
        pid = os.getpid()
        return self._by_pid.get(pid) or self._by_pid.setdefault(pid, _Process())

    def _stream(self, kwargs: dict[str, Any]) -> ChunkStream:
        try:
            call = _read(kwargs)
            check_streamable(call)
            keep_out = partial(keep_out_of_cache, kwargs.get("logging_obj"))
            if loses_by_caching(call):
                keep_out()
            # Its length is unlimited as long as something comes: RunningAnswer sees to that.
            request = replace(call.requests[0], timeout_s=STREAM_LIMIT_S)
            process = self._process
            answer = RunningAnswer(process.io, lambda: self._open(call, request), call.timeout_s)
            chunks = StreamChunks(call, on_thought=keep_out)
            stream = ChunkStream(answer, chunks, call.model)
            answer.wait_admitted(process.engines.admission_wait_s(call.address))
        except Exception as exc:
            raise to_litellm(exc, _name(kwargs)) from exc
        return stream

    async def _open(self, call: Call, request: GenerateRequest) -> DeltaStream:
        if self._backend is not None and call.address is None:
            return await self._backend.open(request)
        return await self._process.engines.open(call.address, call.api_key, request)

    async def _embed(self, call: EmbedCall) -> EmbeddingResponse:
        if self._backend is None or call.address is not None:
            found = await self._process.engines.embed(call.address, call.api_key, call.request)
        elif isinstance(self._backend, Embeds):
            found = await self._backend.embed(call.request)
        else:
            raise InvalidRequestError(
                "the engine of this process cannot embed; leave it out of `register`, or give an "
                "AsyncEngine",
                param="model",
            )
        return to_embeddings(found, call)

    async def _collect(self, call: Call) -> ModelResponse | TextCompletionResponse:
        answer = Answer()
        readers = []
        offset = 0
        for request in call.requests:
            limited = replace(request, timeout_s=call.timeout_s)
            readers.append(asyncio.ensure_future(self._read_all(call, limited, answer, offset)))
            offset += request.n
        try:
            async with asyncio.timeout(call.timeout_s):
                infos = await asyncio.gather(*readers)
        except TimeoutError as exc:
            raise RequestTimeoutError(
                f"no complete answer within the timeout of {call.timeout_s:g} s; ask for fewer "
                "tokens, or raise LiteLLM's `timeout` for the request or the deployment"
            ) from exc
        finally:
            for reader in readers:
                reader.cancel()
        convert = to_text if call.is_text else to_chat
        return convert(answer, infos, offset)

    async def _read_all(
        self, call: Call, request: GenerateRequest, answer: Answer, offset: int
    ) -> StreamInfo:
        stream = await self._open(call, request)
        try:
            async for delta in stream:
                answer.add(delta, offset)
        except MRSSError as exc:
            raise BrokenOff(exc) from exc
        finally:
            await stream.aclose()
        return stream.info


def _read(kwargs: dict[str, Any]) -> Call:
    return read_call(
        model=kwargs["model"],
        messages=kwargs["messages"],
        optional_params=kwargs["optional_params"],
        litellm_params=kwargs.get("litellm_params"),
        api_base=kwargs.get("api_base"),
        api_key=kwargs.get("api_key"),
        timeout=kwargs.get("timeout"),
        logging_obj=kwargs.get("logging_obj"),
    )


async def _result_of(work: Future[T]) -> T:
    """Await what runs on the I/O thread.

    Raises:
        futures.CancelledError: that thread was stopped; whoever awaits was not cancelled.
    """
    try:
        return await asyncio.wrap_future(work)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise CancelledError from None


def _name(kwargs: dict[str, Any]) -> str:
    return f"{PROVIDER}/{kwargs.get('model', '')}"
