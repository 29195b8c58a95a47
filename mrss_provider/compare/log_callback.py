"""The callback of a LiteLLM proxy: one JSON line for each call, for `mrss compare report`.

MRSS_COMPARE_LOG names the file. Lines never hold what was asked or answered, unless
MRSS_COMPARE_LOG_TEXT is 1. A thread writes them, so no event loop waits for a disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mrss_provider.appending import append_line
from mrss_provider.errors import ConfigError

logger = logging.getLogger(__name__)

_DEFAULT_MAX_BYTES = 64 << 20
_MIN_MAX_BYTES = 4096
# Older files are kept as LOG.1 (the newest of them) to LOG.5.
NUM_KEPT = 5
# With these waiting, the disk is far behind; what comes then is counted and dropped.
_MAX_WAITING = 10_000


class RotatingLines:
    """A file that several processes append lines to, and that is put aside when it is full.

    Args:
        path: the file; LOG.1 and so on are beside it.
        max_bytes: it is put aside before it grows beyond.
    """

    def __init__(self, path: Path, max_bytes: int = _DEFAULT_MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes

    def append(self, line: bytes) -> None:
        """Add a line with its end.

        Raises:
            OSError: it cannot be written.
        """
        with self._alone():
            with contextlib.suppress(FileNotFoundError):
                if self.path.stat().st_size + len(line) > self._max_bytes:
                    self._put_aside()
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                append_line(file, line)
            finally:
                os.close(file)

    def _put_aside(self) -> None:
        names = [self.path, *(aside(self.path, n) for n in range(1, NUM_KEPT + 1))]
        for newer, older in reversed(list(itertools.pairwise(names))):
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, older)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


class LineWriter:
    """Hands lines to a thread that writes them. May be used from any thread.

    Args:
        lines: where they go.
    """

    def __init__(self, lines: RotatingLines) -> None:
        self._lines = lines
        self._queue: queue.Queue[Mapping[str, Any]] = queue.Queue(_MAX_WAITING)
        self._starting = threading.Lock()
        self._pid = 0
        self.num_dropped = 0

    def put(self, line: Mapping[str, Any]) -> None:
        """Have a line written soon; never waits."""
        self._start()
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.num_dropped += 1

    def flush(self) -> None:
        """Wait until all is written."""
        self._queue.join()

    def _start(self) -> None:
        # A thread does not survive a fork.
        if self._pid == os.getpid():
            return
        with self._starting:
            if self._pid != os.getpid():
                self._pid = os.getpid()
                threading.Thread(target=self._write, name="mrss-arm-log", daemon=True).start()

    def _write(self) -> None:
        is_failing = False
        while True:
            line = self._queue.get()
            try:
                self._lines.append(json.dumps(line, default=str).encode() + b"\n")
                is_failing = False
            except Exception as exc:
                # Of one that cannot be written as JSON, too: the thread has to go on.
                self.num_dropped += 1
                if not is_failing:
                    logger.error("calls are not logged: %s (%s)", exc, self._lines.path)
                is_failing = True
            finally:
                self._queue.task_done()


def make_arm_log(env: Mapping[str, str] | None = None) -> Any:
    """Return LiteLLM's `CustomLogger` that appends a line for each call.

    Raises:
        ConfigError: MRSS_COMPARE_LOG is not set, or another variable is malformed.
    """
    from litellm.integrations.custom_logger import CustomLogger

    env = os.environ if env is None else env
    path, max_bytes, with_text = _settings(env)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = LineWriter(RotatingLines(path, max_bytes))

    class ArmLog(CustomLogger):  # type: ignore[misc]
        """What LiteLLM calls, in its own loop, after each call."""

        def __init__(self) -> None:
            super().__init__()
            self.writer = writer

        async def async_log_success_event(
            self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            """Log an answer."""
            _log(writer, kwargs, with_text)

        async def async_log_failure_event(
            self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any
        ) -> None:
            """Log an error."""
            _log(writer, kwargs, with_text)

    return ArmLog()


def aside(path: Path, number: int) -> Path:
    """Return the name of a file that was put aside; 1 is the newest."""
    return path.with_name(f"{path.name}.{number}")


def line_of(payload: Mapping[str, Any], *, with_text: bool = False) -> dict[str, Any]:
    """Return what is kept of LiteLLM's `StandardLoggingPayload`."""
    is_stream = bool(payload.get("stream"))
    began, first, ended = (
        payload.get(key) for key in ("startTime", "completionStartTime", "endTime")
    )
    error = payload.get("error_information") or {}
    has_failed = payload.get("status") != "success"
    line: dict[str, Any] = {
        "time": ended,
        "id": payload.get("id"),
        "call_id": payload.get("litellm_call_id"),
        "group": payload.get("model_group"),
        "arm": payload.get("model_id"),
        "model": payload.get("model"),
        "stream": is_stream,
        "cache_hit": bool(payload.get("cache_hit")),
        "ttft_s": _apart(began, first) if is_stream and not has_failed else None,
        "total_s": _apart(began, ended),
        "prompt_tokens": payload.get("prompt_tokens"),
        "completion_tokens": payload.get("completion_tokens"),
        "cost": payload.get("response_cost"),
        "error": (
            {"type": error.get("error_class") or "error", "status": error.get("error_code")}
            if has_failed
            else None
        ),
    }
    if with_text:
        line |= {"messages": payload.get("messages"), "response": payload.get("response")}
    return line


def _log(writer: LineWriter, kwargs: Mapping[str, Any], with_text: bool) -> None:
    payload = kwargs.get("standard_logging_object")
    if isinstance(payload, Mapping):
        writer.put(line_of(payload, with_text=with_text))


def _apart(start: Any, end: Any) -> float | None:
    if not isinstance(start, int | float) or not isinstance(end, int | float):
        return None
    return round(max(0.0, end - start), 6)


def _settings(env: Mapping[str, str]) -> tuple[Path, int, bool]:
    path = env.get("MRSS_COMPARE_LOG")
    if not path:
        raise ConfigError(
            "set MRSS_COMPARE_LOG to the file that mrss_provider.compare.arm_log shall append to"
        )
    size = env.get("MRSS_COMPARE_LOG_BYTES") or str(_DEFAULT_MAX_BYTES)
    if not size.isascii() or not size.isdigit() or int(size) < _MIN_MAX_BYTES:
        raise ConfigError(
            f"MRSS_COMPARE_LOG_BYTES must be a whole number from {_MIN_MAX_BYTES} on, got {size!r}"
        )
    text = env.get("MRSS_COMPARE_LOG_TEXT") or "0"
    if text not in ("0", "1"):
        raise ConfigError(f"MRSS_COMPARE_LOG_TEXT must be 0 or 1, got {text!r}")
    return Path(path), int(size), text == "1"
