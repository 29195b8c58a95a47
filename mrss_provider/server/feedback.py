"""What people think of answers: `POST /v1/feedback` appends a score or a vote to a file.

One JSON object a line, with the key that sent it. `mrss compare report --feedback` reads the file.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mrss_provider.appending import append_line
from mrss_provider.errors import InvalidRequestError, StorageError
from mrss_provider.server.auth import caller_of, require_admin
from mrss_provider.server.body import read_request
from mrss_provider.server.form import Form
from mrss_provider.server.service import Service

KEYS = ("id", "score", "vote", "models", "ids", "note")
TIE = "tie"
_LETTERS = "abcd"
_MAX_ID_CHARS = 256
_MAX_NOTE_CHARS = 2000
_MAX_LISTED = 1000
# Some 300,000 votes.
_MAX_FILE_BYTES = 64 << 20


class Feedback:
    """An append-only file of scores and votes.

    Args:
        path: where it is; made with the first line.
        max_bytes: it does not grow beyond.
    """

    def __init__(self, path: Path, max_bytes: int = _MAX_FILE_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line, which is on the disk when this returns.

        Raises:
            StorageError: it cannot be written, or the file is full.
        """
        data = json.dumps(line).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                # Until it is closed: lines of two processes stay whole.
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file).st_size + len(data) > self._max_bytes:
                    raise StorageError(
                        f"the feedback file has reached {self._max_bytes} bytes; the operator must "
                        "move it away"
                    )
                append_line(file, data)
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as exc:
            raise StorageError(
                f"the feedback cannot be written ({exc.strerror}); the operator may name another "
                "file with --feedback"
            ) from exc

    def last(self, num_lines: int) -> list[dict[str, Any]]:
        """Return the last lines, the newest last; none where there is no file.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
            return [json.loads(line) for line in text.splitlines()[-num_lines:] if line]
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise StorageError(f"the feedback cannot be read ({exc.strerror})") from exc
        except (ValueError, RecursionError) as exc:
            raise StorageError("the feedback file has lines that are none of ours") from exc


class FeedbackRoutes:
    """The endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self._config = service.config
        self._feedback = Feedback(service.config.feedback or default_path())

    def table(self) -> list[Route]:
        """Return the routes."""
        path = "/v1/feedback"
        return [
            Route(path, self.list, methods=["GET"]),
            Route(path, self.create, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        """Keep one score or vote."""
        fields = parse_feedback(await read_request(request, self._config))
        created = time.time()
        line = {"time": round(created, 3), **fields, "owner": caller_of(request).id}
        await asyncio.to_thread(self._feedback.append, line)
        answer = {"object": "feedback", "id": fields["id"], "created": int(created)}
        return JSONResponse(answer, 201)

    async def list(self, request: Request) -> Response:
        """List the latest."""
        require_admin(request)
        limit = _limit(request.query_params.get("limit", "100"))
        lines = await asyncio.to_thread(self._feedback.last, limit)
        return JSONResponse({"object": "list", "data": lines})


def feedback_routes(service: Service) -> list[Route]:
    """Return the routes of feedback over one service."""
    return FeedbackRoutes(service).table()


def default_path(env: Mapping[str, str] | None = None) -> Path:
    """Return where feedback goes that nobody named a file for: this user's folder of state."""
    env = os.environ if env is None else env
    state = env.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local/state") / "mrss/feedback.jsonl"


def parse_feedback(body: object) -> dict[str, Any]:
    """Return the fields of a score or a vote, checked, without those that are absent.

    Raises:
        InvalidRequestError: a field that is missing, unknown or not what it must be.
    """
    form = Form(body, KEYS)
    fields: dict[str, Any] = {"id": _short(form.text("id"), "id", _MAX_ID_CHARS)}
    if ("score" in form) == ("vote" in form):
        raise InvalidRequestError('give one of "score" and "vote"', param="score")
    models = form.texts("models") if "models" in form else []
    if "score" in form:
        score = form.number("score")
        assert score is not None
        if not -1 <= score <= 1:
            raise InvalidRequestError(f"score must be in [-1, 1], got {score:g}", param="score")
        if len(models) > 1 or "ids" in form:
            raise InvalidRequestError(
                "a score is of one answer: give one model and no ids", param="models"
            )
        fields["score"] = score
    else:
        fields |= _vote(form, models)
    if models:
        fields["models"] = models
    if "note" in form:
        fields["note"] = _short(form.text("note"), "note", _MAX_NOTE_CHARS, is_needed=False)
    return fields


def _vote(form: Form, models: list[str]) -> dict[str, Any]:
    if not 2 <= len(set(models)) == len(models) <= len(_LETTERS):
        raise InvalidRequestError(
            f"a vote needs models: 2 to {len(_LETTERS)} different names, the first of which is "
            f'"a", got {models!r:.200}',
            param="models",
        )
    allowed = [*_LETTERS[: len(models)], TIE]
    vote = form.text("vote")
    if vote not in allowed:
        raise InvalidRequestError(
            f"vote must be one of {', '.join(allowed)}, got {vote!r:.40}", param="vote"
        )
    fields: dict[str, Any] = {"vote": vote}
    if "ids" in form:
        ids = [_short(one, "ids", _MAX_ID_CHARS) for one in form.texts("ids")]
        if len(ids) != len(models):
            raise InvalidRequestError(
                f"ids must have one for each of the {len(models)} models, got {len(ids)}",
                param="ids",
            )
        fields["ids"] = ids
    return fields


def _short(text: str, key: str, max_chars: int, *, is_needed: bool = True) -> str:
    if len(text) > max_chars or (is_needed and not text):
        raise InvalidRequestError(
            f"{key} must have {int(is_needed)} to {max_chars} characters, got {len(text)}",
            param=key,
        )
    return text


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= _MAX_LISTED:
        raise InvalidRequestError(
            f"limit must be a whole number in [1, {_MAX_LISTED}], got {text!r:.40}", param="limit"
        )
    return int(text)
