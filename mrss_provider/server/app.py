"""create_app: the routes. `generation.py` answers, `openai_schema` knows the JSON."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mrss_provider import __version__
from mrss_provider.backend import Backend
from mrss_provider.config import ServerConfig
from mrss_provider.errors import EngineError, InvalidRequestError, MRSSError, NotFoundError
from mrss_provider.openai_schema import (
    PROTOCOL,
    model_list,
    model_object,
    parse_chat_request,
    parse_completion_request,
)
from mrss_provider.server.body import read_json
from mrss_provider.server.generation import GenerationResponse, error_response, until_disconnect
from mrss_provider.server.hosts import HostGuard
from mrss_provider.server.lifecycle import Lifecycle

logger = logging.getLogger(__name__)


@runtime_checkable
class Startable(Protocol):
    """A backend that has something to load."""

    async def start(self) -> None:
        """Load it. Raises MRSSError: it cannot be loaded."""
        ...


class Routes:
    """The endpoints over one backend."""

    def __init__(
        self, backend: Backend, config: ServerConfig, lifecycle: Lifecycle, model: str
    ) -> None:
        self._backend = backend
        self._config = config
        self._lifecycle = lifecycle
        self._model = model

    def table(self) -> list[Route]:
        """Return the routes; those with and without `/v1` are the same."""
        routes = [
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/version", self.version),
            Route("/v1/lease", self.lease),
        ]
        for prefix in ("/v1", ""):
            routes += [
                Route(f"{prefix}/chat/completions", self.chat, methods=["POST"]),
                Route(f"{prefix}/completions", self.completions, methods=["POST"]),
                Route(f"{prefix}/models", self.models),
                Route(f"{prefix}/models/{{id:path}}", self.model),
            ]
        return routes

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        self._lifecycle.check_open()
        parsed = parse_chat_request(await read_json(request, self._config.max_body_bytes))
        return GenerationResponse(self._backend, self._lifecycle, parsed, self._timeout_s)

    async def completions(self, request: Request) -> Response:
        """Complete one or more prompts."""
        self._lifecycle.check_open()
        parsed = parse_completion_request(await read_json(request, self._config.max_body_bytes))
        return GenerationResponse(self._backend, self._lifecycle, parsed, self._timeout_s)

    async def models(self, request: Request) -> Response:
        """List what is served."""
        return JSONResponse(model_list(await self._backend.models()))

    async def model(self, request: Request) -> Response:
        """Show one name of the list, with or without LiteLLM's `mrss/`."""
        name = str(request.path_params["id"]).removeprefix("mrss/")
        for card in await self._backend.models():
            if card.id == name:
                return JSONResponse(model_object(card))
        raise NotFoundError(f"no model {name!r} is served; GET /v1/models lists those that are")

    async def health(self, request: Request) -> Response:
        """Tell that the process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Tell whether a request would be answered at once."""
        self._lifecycle.check_ready()
        return JSONResponse({"status": "ready"})

    async def version(self, request: Request) -> Response:
        """Tell who answers."""
        return JSONResponse(
            {
                "protocol": PROTOCOL,
                "version": __version__,
                "pid": os.getpid(),
                "model": self._model,
            }
        )

    async def lease(self, request: Request) -> Response:
        """Hold the engine for a client, until either of them leaves."""
        self._lifecycle.check_open()
        return _LeaseResponse(self._lifecycle)

    @property
    def _timeout_s(self) -> float:
        return self._config.request_timeout_s


class _LeaseResponse(Response):
    def __init__(self, lifecycle: Lifecycle) -> None:
        super().__init__()
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lifecycle.lease():
            await until_disconnect(receive, self._hold(send))

    async def _hold(self, send: Send) -> None:
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"held\n", "more_body": True})
        await self._lifecycle.stopping.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def create_app(
    backend: Backend,
    config: ServerConfig | None = None,
    *,
    lifecycle: Lifecycle | None = None,
    model: str = "",
) -> Starlette:
    """Build the application. A backend with `start` is started with it, and closed at its end.

    Args:
        backend: where answers come from.
        config: limits and the address; the defaults when None.
        lifecycle: to drain it, or to learn that it is idle, from outside.
        model: what `/version` calls the loaded model.
    """
    config = config or ServerConfig()
    state = lifecycle or Lifecycle(config.idle_exit_s)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(backend, state))
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await backend.aclose()

    app = Starlette(
        routes=Routes(backend, config, state, model).table(),
        lifespan=lifespan,
        exception_handlers={
            MRSSError: _on_mrss_error,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_disconnect,
            Exception: _on_defect,
        },
    )
    app.add_middleware(HostGuard, config=config)
    return app


async def _start(backend: Backend, lifecycle: Lifecycle) -> None:
    try:
        if isinstance(backend, Startable):
            await backend.start()
        lifecycle.set_ready()
    except MRSSError as exc:
        lifecycle.set_failed(exc)
    except Exception:
        logger.exception("the engine did not start")
        lifecycle.set_failed(EngineError("the engine did not start; its log tells why"))


async def _on_mrss_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, MRSSError)
    return error_response(exc)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    path = f"{request.method} {request.url.path}"
    error: MRSSError = NotFoundError(f"there is no {path} here")
    if exc.status_code == 405:
        error = InvalidRequestError(f"{path} is not allowed, the route takes another method")
    return JSONResponse(error.to_dict(), exc.status_code, headers=exc.headers)


async def _on_disconnect(request: Request, exc: Exception) -> Response:
    # Nobody is there to read it.
    return Response(status_code=400)


async def _on_defect(request: Request, exc: Exception) -> Response:
    return error_response(EngineError("a defect of the engine; its log tells more"))
