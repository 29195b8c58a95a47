"""What the routes of administration share: who may ask, and how their errors look.

Errors carry RWKV-Infer's `detail` beside OpenAI's `error`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mrss_provider.administration import Admin, Administers
from mrss_provider.backend import Backend
from mrss_provider.errors import MRSSError, NotFoundError, PermissionDeniedError
from mrss_provider.openai_schema import error_headers
from mrss_provider.server.auth import require_admin

logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


def for_admins(endpoint: Endpoint) -> Endpoint:
    """Return `endpoint`, for callers who may administer, with errors in both forms."""

    async def guarded(request: Request) -> Response:
        caller = require_admin(request)
        _check_origin(request)
        response = await endpoint(request)
        if request.method != "GET":
            who = caller.id or "whoever may without a key"
            logger.info("%s %r by %s", request.method, request.url.path, who)
        return response

    return with_detail(guarded)


def _check_origin(request: Request) -> None:
    """Refuse another site's page: a browser sends its POST here without asking first.

    Raises:
        PermissionDeniedError: as said.
    """
    origin = request.headers.get("origin")
    host = request.headers.get("host", "")
    if origin is not None and origin.partition("://")[2] != host:
        raise PermissionDeniedError(
            f"a page of {origin!r:.100} may not administer this server; use a program"
        )


def with_detail(endpoint: Endpoint) -> Endpoint:
    """Return `endpoint` with errors in both forms."""

    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except MRSSError as exc:
            body = {**exc.to_dict(), "detail": exc.message}
            return JSONResponse(body, exc.status_code, headers=error_headers(exc))

    return answered


def admin_of(backend: Backend) -> Admin:
    """Return the administration of a backend.

    Raises:
        NotFoundError: it has none.
    """
    if not isinstance(backend, Administers):
        raise NotFoundError("this engine cannot be administered")
    return backend.admin
