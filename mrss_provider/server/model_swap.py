"""Loading and removing the model, while `/ready` tells load balancers to look elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from mrss_provider.administration import Admin, ModelInfo, ModelOrder
from mrss_provider.errors import MRSSError
from mrss_provider.server.lifecycle import Lifecycle

_Result = TypeVar("_Result")


async def load_model(admin: Admin, lifecycle: Lifecycle, order: ModelOrder) -> ModelInfo:
    """Put another model in the place of the loaded one.

    Raises:
        MRSSError: as `Admin.load_model`; the server is ready again if a model is loaded.
    """
    why = "another model is being loaded; try again soon"
    info = await _change(admin, lifecycle, why, partial(admin.load_model, order))
    lifecycle.set_ready()
    return info


async def remove_model(admin: Admin, lifecycle: Lifecycle, drain_s: float) -> None:
    """Unload the model.

    Raises:
        MRSSError: as `Admin.remove_model`.
    """
    why = "the model is being removed"
    await _change(admin, lifecycle, why, partial(admin.remove_model, drain_s))
    lifecycle.set_unready("no model is loaded; load one with POST /v1/model, or /loadmodel")


async def _change(
    admin: Admin,
    lifecycle: Lifecycle,
    why: str,
    change: Callable[[Callable[[], None]], Awaitable[_Result]],
) -> _Result:
    """Make a change; the server is unready from when the model is really taken away."""
    is_taken = False

    def on_taken() -> None:
        nonlocal is_taken
        is_taken = True
        lifecycle.set_unready(why)

    try:
        return await change(on_taken)
    except BaseException:
        # What was refused before it began stopped nothing, also not a change that is under way.
        if is_taken:
            await _tell_what_is_left(admin, lifecycle)
        raise


async def _tell_what_is_left(admin: Admin, lifecycle: Lifecycle) -> None:
    try:
        await admin.model()
    except MRSSError as exc:
        # The model that was on its way does not come.
        lifecycle.set_unready(exc.message)
    else:
        lifecycle.set_ready()
