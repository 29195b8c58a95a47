"""Loading and removing the model, while `/ready` tells load balancers to look elsewhere."""

from __future__ import annotations

from mrss_provider.administration import Admin, ModelInfo, ModelOrder
from mrss_provider.errors import ConflictError, MRSSError
from mrss_provider.server.lifecycle import Lifecycle


async def load_model(admin: Admin, lifecycle: Lifecycle, order: ModelOrder) -> ModelInfo:
    """Put another model in the place of the loaded one.

    Raises:
        MRSSError: as `Admin.load_model`; the server is ready again if a model is loaded.
    """
    lifecycle.set_unready("another model is being loaded; try again soon")
    try:
        info = await admin.load_model(order)
    except ConflictError:
        # The change that is under way tells how it went; who has to wait for it learns so at once.
        raise
    except BaseException:
        await _ready_if_loaded(admin, lifecycle)
        raise
    lifecycle.set_ready()
    return info


async def remove_model(admin: Admin, lifecycle: Lifecycle, drain_s: float) -> None:
    """Unload the model.

    Raises:
        MRSSError: as `Admin.remove_model`.
    """
    lifecycle.set_unready("the model is being removed")
    try:
        await admin.remove_model(drain_s)
    except ConflictError:
        raise
    except BaseException:
        await _ready_if_loaded(admin, lifecycle)
        raise
    lifecycle.set_unready("no model is loaded; load one with POST /v1/model")


async def _ready_if_loaded(admin: Admin, lifecycle: Lifecycle) -> None:
    try:
        await admin.model()
    except MRSSError:
        return
    lifecycle.set_ready()
