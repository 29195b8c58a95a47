"""create_app: the routes. `generation.py` answers, `openai_schema` knows the JSON."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, runtime_checkable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from mrss_provider import __version__
from mrss_provider.administration import Administers
from mrss_provider.backend import Backend, TrainedGates
from mrss_provider.config import ServerConfig
from mrss_provider.errors import (
    EngineError,
    InvalidRequestError,
    MRSSError,
    NotFoundError,
)
from mrss_provider.openai_schema import (
    PROTOCOL,
    ParsedRequest,
    methods_object,
    model_list,
    model_object,
    parse_chat_request,
    parse_completion_request,
)
from mrss_provider.server.admin import admin_routes
from mrss_provider.server.auth import Access, KeyRing, caller_of, require_admin
from mrss_provider.server.body import read_and_parse
from mrss_provider.server.counting import CountRequests
from mrss_provider.server.embeddings import text_routes
from mrss_provider.server.exposition import CONTENT_TYPE, Exposition
from mrss_provider.server.feedback import feedback_routes
from mrss_provider.server.generation import GenerationResponse, until_disconnect
from mrss_provider.server.hosts import HostGuard, playground_url, split_origins
from mrss_provider.server.lifecycle import Lifecycle
from mrss_provider.server.openapi import openapi_routes
from mrss_provider.server.playground import playground_routes
from mrss_provider.server.refusals import error_response
from mrss_provider.server.rwkv_infer import rwkv_infer_routes
from mrss_provider.server.service import Service
from mrss_provider.server.sessions import session_routes

logger = logging.getLogger(__name__)

# Routes that LiteLLM translates to ours.
_OF_LITELLM = ("/responses", "/messages", "/messages/count_tokens")


@runtime_checkable
class Startable(Protocol):
    """A backend that has something to load."""

    async def start(self) -> None:
        """Load it. Raises MRSSError: it cannot be loaded."""
        ...


@runtime_checkable
class Losable(Protocol):
    """A backend whose engine can be lost, after which it does not answer any more."""

    async def until_lost(self) -> MRSSError:
        """Return why it was lost, once it was."""
        ...


class Routes:
    """The endpoints over one backend.

    Args:
        service: the server's parts.
        model: what `/version` calls the loaded model.
    """

    def __init__(self, service: Service, model: str) -> None:
        self._service = service
        self._backend = service.backend
        self._lifecycle = service.lifecycle
        self._model = model
        self._exposition = Exposition(service.metrics, service.backend, model)

    def table(self) -> list[Route]:
        """Return the routes; those with and without `/v1` are the same, but for `/models`."""
        routes = [
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/version", self.version),
            Route("/metrics", self.metrics),
            Route("/v1/lease", self.lease),
            Route("/v1/models", self.models),
            Route("/v1/mrss/methods", self.methods),
        ]
        for prefix in ("/v1", ""):
            routes += [
                Route(f"{prefix}/chat/completions", self.chat, methods=["POST"]),
                Route(f"{prefix}/completions", self.completions, methods=["POST"]),
                Route(f"{prefix}/models/{{id:path}}", self.model),
            ]
        return routes

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        self._lifecycle.check_open()
        return self._answer(request, await self._read(request, parse_chat_request))

    async def completions(self, request: Request) -> Response:
        """Complete one or more prompts."""
        self._lifecycle.check_open()
        return self._answer(request, await self._read(request, parse_completion_request))

    async def models(self, request: Request) -> Response:
        """List what is served."""
        return JSONResponse(model_list(await self._backend.models()))

    async def model(self, request: Request) -> Response:
        """Show one name of the list, with or without LiteLLM's `mrss/`."""
        name = str(request.path_params["id"]).removeprefix("mrss/")
        for card in await self._backend.models():
            if card.id == name:
                return JSONResponse(model_object(card))
        raise NotFoundError(
            f"no model {name!r} is listed; GET /v1/models has the names, which requests may mix"
        )

    async def methods(self, request: Request) -> Response:
        """List the merge rules and gates, with what they take."""
        backend = self._backend
        trained = await backend.trained_gates() if isinstance(backend, TrainedGates) else ()
        return JSONResponse(methods_object(trained))

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
                "model": _model_file(self._backend) or self._model,
                "playground": playground_url(self._service.config),
            }
        )

    async def lease(self, request: Request) -> Response:
        """Hold the engine for a client, until either of them leaves."""
        self._lifecycle.check_open()
        return _LeaseResponse(self._lifecycle)

    async def metrics(self, request: Request) -> Response:
        """Tell what was done, in Prometheus's form."""
        require_admin(request)
        return Response(self._exposition.text(), headers={"content-type": CONTENT_TYPE})

    async def _read(
        self, request: Request, parse: Callable[[object], ParsedRequest]
    ) -> ParsedRequest:
        return await read_and_parse(request, self._service.config, parse)

    def _answer(self, request: Request, parsed: ParsedRequest) -> GenerationResponse:
        return GenerationResponse(self._service, parsed, caller_of(request))


def _model_file(backend: Backend) -> str | None:
    return backend.admin.model_file if isinstance(backend, Administers) else None


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
    keys: KeyRing | None = None,
) -> Starlette:
    """Build the application. A backend with `start` is started with it, and closed at its end.

    Args:
        backend: where answers come from.
        config: limits and the address; the defaults when None.
        lifecycle: to drain it, or to learn that it is idle, from outside.
        model: what `/version` calls the loaded model.
        keys: API keys; those of `config` and the environment when None.

    Raises:
        ConfigError: the keys cannot be read, or what `config` asks for is not installed.
    """
    config = config or ServerConfig()
    state = lifecycle or Lifecycle(config.idle_exit_s)
    keys = keys or KeyRing.of(config)
    service = Service.of(backend, config, state)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(backend, state))
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await backend.aclose()
            if service.spans is not None:
                await asyncio.to_thread(service.spans.close)

    routes: list[BaseRoute] = [
        # `GET /models` is RWKV-Infer's.
        *rwkv_infer_routes(service),
        *admin_routes(service),
        *session_routes(service),
        *feedback_routes(service),
        *openapi_routes(),
        *playground_routes(),
        *text_routes(service),
        *Routes(service, model).table(),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={
            MRSSError: _on_mrss_error,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_disconnect,
            Exception: _on_defect,
        },
    )
    # The last one is met first.
    app.add_middleware(Access, keys=keys, config=config)
    if config.cors_origins:
        app.add_middleware(CORSMiddleware, **_cors(split_origins(config.cors_origins)))
    app.add_middleware(HostGuard, config=config)
    app.add_middleware(CountRequests, metrics=service.metrics, routes=routes)
    return app


def _cors(origins: list[str]) -> dict[str, Any]:
    return {
        "allow_origins": origins,
        "allow_methods": ["GET", "POST", "PUT", "DELETE"],
        # Clients in pages send headers of their own, as OpenAI's does `x-stainless-lang`.
        "allow_headers": ["*"],
        "expose_headers": ["retry-after", "x-mrss-mixture"],
    }


async def _start(backend: Backend, lifecycle: Lifecycle) -> None:
    try:
        if isinstance(backend, Startable):
            await backend.start()
        lifecycle.set_ready()
        if isinstance(backend, Losable):
            lifecycle.set_failed(await backend.until_lost())
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
    hint = "GET /openapi.json lists the routes"
    if request.url.path.removeprefix("/v1") in _OF_LITELLM:
        hint = "a LiteLLM proxy before this server has it"
    error: MRSSError = NotFoundError(f"there is no {path} here; {hint}")
    if exc.status_code == 405:
        error = InvalidRequestError(f"{path} is not allowed, the route takes another method")
    return JSONResponse(error.to_dict(), exc.status_code, headers=exc.headers)


async def _on_disconnect(request: Request, exc: Exception) -> Response:
    # Nobody is there to read it.
    return Response(status_code=400)


async def _on_defect(request: Request, exc: Exception) -> Response:
    return error_response(EngineError("a defect of the engine; its log tells more"))
