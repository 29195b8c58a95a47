"""What of a request's prompt the cache may have: under which keys, and up to where.

Where rows are given their tuned states anew on the way (`EngineRequest.reinjections`), a beginning
of the prompt is filed under the positions that it has passed, so there are as many places to look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mrss_provider.engine.prefix_cache import PrefixCache
from mrss_provider.engine.reinjection import num_passed, stretches
from mrss_provider.engine.request import EOS_ID, EngineRequest

if TYPE_CHECKING:
    from mrss_provider.model import TunedState


def state_key(state: TunedState | None, *, reads_bos: bool, mark: str = "") -> str:
    """Return what a row's snapshots are filed under: its state's content, and when it was given.

    Args:
        state: of the row; None is the base.
        reads_bos: whether the row reads a token 0 of its own before the prompt.
        mark: of the tokens before which the row was given its state anew (`reinjection.marks`).
    """
    if state is None:
        return "base"
    return state.sha256 + "+0" * reads_bos + (f"@{mark}" if mark else "")


def usable_len(request: EngineRequest) -> int:
    """Return how much of a prompt need not be read: its last token gives the first logits.

    What the user wrote is scored while it is read, from the token before it on.
    """
    if request.is_read_whole:
        return 0
    most = len(request.prompt) - 1
    return min([most, *(max(0, span.start - 1) for span in request.evidence[:1])])


def keys_after(request: EngineRequest, length: int) -> tuple[str, ...]:
    """Return what the request's rows are filed under after `length` tokens."""
    begins = request.prompt[0] == EOS_ID
    mark = request.reinjection_marks[num_passed(request.reinjections, length)]
    return tuple(
        state_key(
            state,
            reads_bos=state is not None and state.metadata.bos and not begins,
            mark=mark,
        )
        for state in request.mixture.states
    )


def find_longest(
    cache: PrefixCache, request: EngineRequest, limit: int, *, files: bool = False
) -> tuple[tuple[str, ...], int]:
    """Return the keys under which the longest hit is, and its limit; of any where there is none.

    Args:
        cache: looked at, not changed.
        request: whose prompt it is.
        limit: hits are no longer than this.
        files: count snapshots that are in files only.
    """
    keys, stop = keys_after(request, limit), limit
    if not request.reinjections:
        return keys, stop
    for _, stop in stretches(request.reinjections, limit):
        keys = keys_after(request, stop)
        if cache.match(keys, request.prompt_ids, stop, files=files):
            break
    return keys, stop


def shared_len(cache: PrefixCache, request: EngineRequest, limit: int) -> int:
    """Return how much of a prompt the rows have read before, whether it was kept or not."""
    for last, stop in stretches(request.reinjections, limit):
        shared = min(cache.shared_len(keys_after(request, stop), request.prompt_ids), stop)
        if shared > last:
            return shared
    return 0
