"""Processes that work for this one, and are gone when it needs them no more or is gone itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection


@contextmanager
def workers(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Yield fresh processes, one task each at a time.

    An error that leaves the block, Ctrl-C among them, ends what they are at; so does a kill of this
    process. An executor by itself finishes its tasks first, and after a kill waits for ever.
    """
    context = multiprocessing.get_context("spawn")
    # Nobody else has the end that is ours: it is closed with this process.
    theirs, ours = context.Pipe(duplex=False)
    processes = ProcessPoolExecutor(
        num_processes, context, initializer=_leave_with, initargs=(theirs,)
    )
    try:
        yield processes
    except BaseException:
        ours.close()
        raise
    finally:
        processes.shutdown(cancel_futures=True)
        ours.close()
        theirs.close()


def _leave_with(parent: Connection) -> None:
    """End this process when the other end of `parent` is closed."""
    # Ctrl-C is for the parent, which closes it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_and_leave, args=(parent,), daemon=True).start()


def _wait_and_leave(parent: Connection) -> None:
    parent.poll(None)
    os._exit(1)
