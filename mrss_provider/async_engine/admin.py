"""EngineAdmin: the `Admin` of an `AsyncEngine`. What blocks runs on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from mrss_provider.administration import (
    Defaults,
    MixtureSpec,
    ModelInfo,
    ModelOrder,
    StateInfo,
)
from mrss_provider.async_engine.card import model_folder, read_card
from mrss_provider.async_engine.loading import Loaded
from mrss_provider.async_engine.model_slot import ModelSlot, Plan
from mrss_provider.async_engine.templates import choose_template
from mrss_provider.config import Dtype, EngineConfig, Quantize

if TYPE_CHECKING:
    from mrss_provider.engine.library_admin import LibraryAdmin

_Result = TypeVar("_Result")


class EngineAdmin:
    """States, mixtures and the model of one engine.

    Args:
        slot: what is administered.
    """

    def __init__(self, slot: ModelSlot) -> None:
        self._slot = slot
        # Kept, so that a change goes on when whoever asked for it has left.
        self._changes: set[asyncio.Task[None]] = set()

    @property
    def max_state_bytes(self) -> int:
        """The largest state file that is read."""
        return self._slot.config.max_state_bytes

    @property
    def model_file(self) -> str:
        """The name of the model's file or folder, also while it loads."""
        return self._slot.config.model.name

    async def states(self) -> list[StateInfo]:
        """Return the loaded states by name."""
        return await self._run(lambda library: library.states())

    async def add_state(self, path: str, name: str | None = None) -> StateInfo:
        """Load a file of the folder of states, for good.

        Raises:
            MRSSError: as `Admin.add_state`.
        """
        return await self._run(lambda library: library.add_state(path, name))

    async def upload_state(self, file: Path, name: str) -> StateInfo:
        """Load `file` and keep a copy.

        Raises:
            MRSSError: as `Admin.add_state`.
        """
        return await self._run(lambda library: library.upload_state(file, name))

    async def remove_state(self, name: str) -> StateInfo:
        """Unload a state.

        Raises:
            MRSSError: as `Admin.remove_state`.
        """
        return await self._run(lambda library: library.remove_state(name))

    async def mixtures(self) -> dict[str, MixtureSpec]:
        """Return the named mixtures by name."""
        return await self._run(lambda library: library.mixtures())

    async def put_mixture(self, name: str, spec: MixtureSpec, *, is_new: bool) -> bool:
        """Create or replace a named mixture; tell whether it was new.

        Raises:
            MRSSError: as `Admin.put_mixture`.
        """
        return await self._run(lambda library: library.put_mixture(name, spec, is_new=is_new))

    async def remove_mixture(self, name: str) -> None:
        """Remove a named mixture.

        Raises:
            MRSSError: as `Admin.remove_mixture`.
        """
        await self._run(lambda library: library.remove_mixture(name))

    async def model(self) -> ModelInfo:
        """Return what is loaded.

        Raises:
            MRSSError: nothing is.
        """
        loaded, _ = await self._slot.parts()
        library = loaded.library
        return ModelInfo(
            name=library.model_name,
            display_name=library.entries.view,
            file=self._slot.config.model.name,
            shape=library.model_config.shape_text(),
        )

    async def load_model(
        self, order: ModelOrder, on_taken: Callable[[], None] = lambda: None
    ) -> ModelInfo:
        """Put another model in the place of the loaded one.

        Raises:
            MRSSError: as `Admin.load_model`.
        """
        config = await asyncio.to_thread(_checked_config, self._slot.settings, order)
        plan = Plan(config, partial(_finish, order))
        await self._to_the_end(self._slot.replace(plan, order.drain_s, on_taken))
        return await self.model()

    async def remove_model(
        self, drain_s: float, on_taken: Callable[[], None] = lambda: None
    ) -> None:
        """Unload the model.

        Raises:
            ConflictError: another change is under way.
        """
        await self._to_the_end(self._slot.remove(drain_s, on_taken))

    async def request_ids(self) -> list[str]:
        """Return the names that RWKV-Infer's users ask for."""
        return await self._run(lambda library: library.request_ids())

    async def serve_state(self, path: str, display_name: str, defaults: Defaults) -> None:
        """Load one state in RWKV-Infer's manner.

        Raises:
            MRSSError: as `Admin.add_state`.
        """
        await self._run(lambda library: library.serve_state(path, display_name, defaults))

    async def serve_mixture(
        self,
        paths: Sequence[str],
        display_name: str,
        *,
        with_base: bool,
        weights: Sequence[float] | None,
        defaults: Defaults,
    ) -> None:
        """Load a mixture in RWKV-Infer's manner.

        Raises:
            MRSSError: as `Admin.add_state`; weights that do not fit the rows.
        """
        await self._run(
            lambda library: library.serve_mixture(
                paths, display_name, with_base=with_base, weights=weights, defaults=defaults
            )
        )

    async def reweigh(
        self, display_name: str, weights: Sequence[float] | None, defaults: Defaults
    ) -> None:
        """Change the weights of a named mixture.

        Raises:
            NotFoundError: no mixture is called so.
            InvalidRequestError: weights that do not fit the rows.
        """
        await self._run(lambda library: library.reweigh(display_name, weights, defaults))

    async def remove_all_states(self) -> None:
        """Unload every state and mixture; no file is touched."""
        await self._run(lambda library: library.remove_all_states())

    async def _run(self, work: Callable[[LibraryAdmin], _Result]) -> _Result:
        loaded, _ = await self._slot.parts()
        # Not above: torch takes a second to import, and the server listens before.
        from mrss_provider.engine.library_admin import LibraryAdmin

        config = self._slot.config
        library = LibraryAdmin(
            loaded.library,
            config.states,
            max_state_bytes=config.max_state_bytes,
            strict=config.strict,
        )
        return await asyncio.to_thread(work, library)

    async def _to_the_end(self, change: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)


def _checked_config(config: EngineConfig, order: ModelOrder) -> EngineConfig:
    """Return the configuration that `order` asks for, refusing early what is no model.

    Args:
        config: what `order` leaves unsaid; no order before it has changed it.
        order: what is asked for.

    Raises:
        MRSSError: a path, file, template, dtype or quantisation that cannot be; the loaded model
            stays.
    """
    from mrss_provider.engine.library_files import find_inside
    from mrss_provider.errors import ModelFileError
    from mrss_provider.model.checkpoint import find_checkpoint
    from mrss_provider.model.model import check_quantize
    from mrss_provider.model.weights import load_weights

    quantize = order.quantize or config.quantize
    check_quantize(quantize, config.device, sparse_ffn=config.sparse_ffn)

    folder = config.models or model_folder(config.model)
    path = find_inside(folder, order.path, "path")
    # The file inside a folder may be a link to elsewhere.
    find_inside(folder, str(find_checkpoint(path, ModelFileError)), "path")
    load_weights(path)
    card = read_card(path)
    choose_template(order.template or config.template, card, path)
    return replace(
        config,
        model=path,
        models=folder,
        dtype=cast(Dtype, order.dtype or config.dtype),
        quantize=cast(Quantize, quantize),
        template=order.template or config.template,
    )


def _finish(order: ModelOrder, loaded: Loaded) -> Loaded:
    """Do to a loaded model what `order` says beside its path."""
    card, template = loaded.card, loaded.template
    if order.display_name:
        loaded.library.change(lambda entries: replace(entries, view=order.display_name))
    if order.defaults is not None:
        card = replace(card, **{k: v for k, v in vars(order.defaults).items() if v is not None})
    if order.stop is not None:
        template = replace(template, stop=order.stop)
    return replace(loaded, card=card, template=template, sampling_order=order.sampling_order)
