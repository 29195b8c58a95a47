"""An error as a response."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from mrss_provider.errors import MRSSError
from mrss_provider.openai_schema import error_headers


def error_response(error: MRSSError) -> Response:
    """Return `error` with its status, in OpenAI's form."""
    return JSONResponse(error.to_dict(), error.status_code, headers=error_headers(error))
