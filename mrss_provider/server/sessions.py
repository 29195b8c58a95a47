"""Saved conversations over HTTP: `/v1/sessions`. Each belongs to the key that made it.

A request goes on with one by `mrss: {"session": ID, "save": true}` in its body.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mrss_provider.backend import GenerateRequest, KeepsSessions, SessionInfo
from mrss_provider.errors import InvalidRequestError, NotFoundError
from mrss_provider.openai_schema import parse_chat_request, parse_completion_request
from mrss_provider.server.auth import caller_of
from mrss_provider.server.body import read_request
from mrss_provider.server.generation import until_disconnect
from mrss_provider.server.limits import limited, num_tokens_of
from mrss_provider.server.service import Service
from mrss_provider.server.uploads import uploaded

_OCTETS = "application/octet-stream"


class SessionRoutes:
    """The endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # What is imported is held in memory: one at a time.
        self._importing = asyncio.Lock()

    def table(self) -> list[Route]:
        """Return the routes."""
        one = "/v1/sessions/{id}"
        return [
            Route("/v1/sessions", self.list, methods=["GET"]),
            Route("/v1/sessions", self.create, methods=["POST"]),
            Route("/v1/sessions/import", self.import_, methods=["POST"]),
            Route(one, self.show, methods=["GET"]),
            Route(one, self.delete, methods=["DELETE"]),
            Route(f"{one}/fork", self.fork, methods=["POST"]),
            Route(f"{one}/export", self.export, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        """Read a chat or a prompt, and save where it ends."""
        service, caller = self._service, caller_of(request)
        service.lifecycle.check_open()
        backend = self._backend()
        asked = _parse(await read_request(request, service.config))
        asked = limited(asked, caller, service.config)
        made: list[SessionInfo] = []

        async def read() -> None:
            made.append(await backend.create_session(asked))

        taken = service.allowances.of(caller).taken(caller.limits, num_tokens_of([asked]))
        with service.lifecycle.running(), taken as reservation:
            await until_disconnect(request.receive, read())
            reservation.num_used = sum(info.num_tokens for info in made)
        # Without one the client has left, and nobody reads this.
        return _answer(made[0], 201) if made else Response(status_code=400)

    async def list(self, request: Request) -> Response:
        """List the caller's sessions."""
        infos = await self._backend().sessions(caller_of(request).id)
        return JSONResponse({"object": "list", "data": [_fields(info) for info in infos]})

    async def show(self, request: Request) -> Response:
        """Show one."""
        return _answer(await self._backend().session(*_which(request)))

    async def fork(self, request: Request) -> Response:
        """Save one once more."""
        return _answer(await self._backend().fork_session(*_which(request)), 201)

    async def export(self, request: Request) -> Response:
        """Send one as a file."""
        session_id, owner = _which(request)
        data = await self._backend().export_session(session_id, owner)
        # The id is the path's, which may hold anything; the name is ours.
        headers = {"content-disposition": 'attachment; filename="session.safetensors"'}
        return Response(data, media_type=_OCTETS, headers=headers)

    async def import_(self, request: Request) -> Response:
        """Save what was exported."""
        backend, config = self._backend(), self._service.config
        limit = config.max_session_bytes
        async with (
            uploaded(request, ".safetensors", limit, "max_session_bytes", config.stall_s) as file,
            self._importing,
        ):
            data = await asyncio.to_thread(file.read_bytes)
            info = await backend.import_session(data, caller_of(request).id)
        return _answer(info, 201)

    async def delete(self, request: Request) -> Response:
        """Forget one."""
        session_id, owner = _which(request)
        await self._backend().delete_session(session_id, owner)
        return JSONResponse({"object": "session", "id": session_id, "deleted": True})

    def _backend(self) -> KeepsSessions:
        backend = self._service.backend
        if not isinstance(backend, KeepsSessions):
            raise NotFoundError("this engine keeps no sessions")
        return backend


def session_routes(service: Service) -> list[Route]:
    """Return the routes of sessions over one service."""
    return SessionRoutes(service).table()


def _parse(body: object) -> GenerateRequest:
    is_chat = isinstance(body, dict) and body.get("messages") is not None
    parsed = parse_chat_request(body) if is_chat else parse_completion_request(body)
    if len(parsed.requests) != 1:
        raise InvalidRequestError("a session begins with one prompt", param="prompt")
    if parsed.stream.stream:
        raise InvalidRequestError("a session has no answer to stream yet", param="stream")
    return parsed.request


def _which(request: Request) -> tuple[str, str]:
    return str(request.path_params["id"]), caller_of(request).id


def _fields(info: SessionInfo) -> dict[str, Any]:
    # The owner is who asks.
    fields = {key: value for key, value in asdict(info).items() if key != "owner"}
    return {"object": "session", **fields}


def _answer(info: SessionInfo, status: int = 200) -> Response:
    return JSONResponse(_fields(info), status)
