"""FileWriter: a thread of its own for what takes as long as a disk does, in the order it is put."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class FileWriter(Generic[Item]):
    """Does `first()`, and then `write(item)` for whatever is put. Any thread may put."""

    def __init__(self, first: Callable[[], None], write: Callable[[Item], None]) -> None:
        """Start the thread."""
        self._first = first
        self._write = write
        self._items: queue.Queue[Item | None] = queue.Queue()
        self._is_begun = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="mrss-cache", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Let an item be written after those before it."""
        self._items.put(item)

    def wait(self) -> None:
        """Wait until `first` is done, and what was put is written."""
        self._is_begun.wait()
        self._items.join()

    def close(self, within_s: float) -> None:
        """Write what was put, for so many seconds, and not one item more."""
        self._items.put(None)
        self._thread.join(within_s)
        self._is_closed = True

    def _run(self) -> None:
        try:
            self._first()
        except Exception:
            log.exception("the files that are there cannot be used")
        self._is_begun.set()
        while (item := self._items.get()) is not None and not self._is_closed:
            try:
                self._write(item)
            except Exception:
                log.exception("a snapshot could not be written")
            finally:
                self._items.task_done()
