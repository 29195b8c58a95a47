"""The playground: a page at `/` and the files that it loads, the same for everybody.

They hold no secret and need no key: the page asks for one and sends it with its requests. All of
them are read once, so that a path is a key of a table and never one of the file system.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

_INDEX = "index.html"
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
# Scripts are files of ours, and no text may become HTML; what the page asks, it asks us.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    # Asked for again each time, and not sent again while it is the same.
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Asset:
    """One file.

    Attributes:
        content: its bytes.
        media_type: with the charset.
        etag: strong, of the bytes.
    """

    content: bytes
    media_type: str
    etag: str


@cache
def assets() -> dict[str, Asset]:
    """Return every file by its path below the server's address: `/`, `/playground/...`."""
    found: dict[str, Asset] = {}
    for entry in files("mrss_provider").joinpath("playground").iterdir():
        media_type = _TYPES.get(entry.name.rpartition(".")[2])
        if media_type is None:
            continue
        content = entry.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        path = "/" if entry.name == _INDEX else f"/playground/{entry.name}"
        found[path] = Asset(content, media_type, etag)
    return found


def is_asset(scope: Scope) -> bool:
    """Tell whether a request reads one of the files; those are for everybody."""
    return scope["method"] in ("GET", "HEAD") and scope["path"] in assets()


def playground_routes() -> list[Route]:
    """Return the routes of the files, which are no part of the API and its document."""
    return [
        Route("/", _serve, include_in_schema=False),
        Route("/playground/{file}", _serve, include_in_schema=False),
    ]


async def _serve(request: Request) -> Response:
    asset = assets().get(request.scope["path"])
    if asset is None:
        raise HTTPException(404)
    headers = {**_HEADERS, "etag": asset.etag}
    known = request.headers.get("if-none-match", "")
    if asset.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers={**headers, "content-type": asset.media_type})
