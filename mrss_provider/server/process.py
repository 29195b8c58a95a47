"""What a process that serves an engine sets once, so that its threads get in each other's way less.

Nothing here belongs in a library: it changes the whole interpreter.
"""

from __future__ import annotations

import gc
import sys

# A thread that wants the interpreter waits this long before the one that has it must give it up.
# Python's 5 ms are as long as a whole step of a GPU, which must not wait for its next one.
SWITCH_S = 5e-4

# Python's 700 objects are made in one step of a few hundred answers.
_GC_THRESHOLDS = (20_000, 20, 20)


def share_interpreter() -> None:
    """Let the engine's thread and the event loop take turns at short intervals."""
    sys.setswitchinterval(SWITCH_S)


def settle() -> None:
    """Keep what was loaded out of garbage collections, which would stop all threads to look at it.

    For whenever a model is ready: nothing of it is garbage before it is replaced.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
