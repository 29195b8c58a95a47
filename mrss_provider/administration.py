"""Administration of a running engine: states, named mixtures and the model. A leaf.

An optional capability of a `Backend`: the server asks with `isinstance(backend, Administers)`.
Whoever asks for it has already been let in; nothing here knows of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from mrss_provider.backend import Reinject
from mrss_provider.sampling_params import SamplingOrder

StateFormat = Literal["safetensors", "pth", "st"]


@dataclass(frozen=True)
class StateInfo:
    """A loaded state.

    Attributes:
        name: what requests call it.
        display_name: as people named it; may have spaces, may be empty.
        group: what it is about, or empty.
        sha256: of its tensors.
        file: its name inside the folder of states; empty for one that is in memory only.
        added: whether this server wrote the file, and so deletes it with the state.
    """

    name: str
    display_name: str
    group: str
    sha256: str
    file: str
    added: bool


@dataclass(frozen=True)
class MixtureSpec:
    """A named mixture in words; None is "not said". As a table of `mixtures.toml`."""

    terms: str
    merge: str | None = None
    gate: str | None = None
    cut: float | None = None
    reinject: Reinject | None = None
    temperature: float | None = None
    top_p: float | None = None
    sampling_order: SamplingOrder | None = None
    template: str | None = None
    description: str = ""
    display_name: str = ""


@dataclass(frozen=True)
class Defaults:
    """What requests leave unsaid of sampling; None leaves it to the model's card."""

    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class ModelOrder:
    """A model to load in the place of the loaded one.

    Attributes:
        path: of the checkpoint, inside the folder of models.
        display_name: what people call it; empty takes the model's own name.
        dtype: of the weights; None takes the setting that the engine was started with.
        quantize: as the engine's option: "none", "int8", "int4" or "fp8"; None as for `dtype`.
        template: chat template by name; None as for `dtype`, and without one the model's.
        stop: what ends a chat's answer; None takes the template's.
        defaults: of sampling; None takes the model's card.
        sampling_order: for requests that say none.
        drain_s: seconds that running answers get to end.
    """

    path: str
    display_name: str = ""
    dtype: str | None = None
    quantize: str | None = None
    template: str | None = None
    stop: tuple[str, ...] | None = None
    defaults: Defaults | None = None
    sampling_order: SamplingOrder | None = None
    drain_s: float = 30.0


@dataclass(frozen=True)
class ModelInfo:
    """The loaded model.

    Attributes:
        name: what `@model` may say.
        display_name: what RWKV-Infer's names begin with.
        file: the checkpoint file or folder, without its path.
        shape: in words.
    """

    name: str
    display_name: str
    file: str
    shape: str


class Admin(Protocol):
    """What an administrator may do. Everything raises MRSSError and then has changed nothing.

    Running requests keep what they were started with.
    """

    @property
    def max_state_bytes(self) -> int:
        """The largest state file that is read."""
        ...

    @property
    def model_file(self) -> str:
        """The name of the model's file or folder, also while it loads."""
        ...

    async def states(self) -> list[StateInfo]:
        """Return the loaded states by name."""
        ...

    async def add_state(self, path: str, name: str | None = None) -> StateInfo:
        """Load a file of the folder of states, for good: a copy is kept under a name of its own.

        Raises:
            NotFoundError: no such file.
            InvalidRequestError: a path outside the folder, or a bad name.
            ConflictError: the name is taken.
            StateFileError: no state for this model.
            StorageError: the copy cannot be written.
        """
        ...

    async def upload_state(self, file: Path, name: str) -> StateInfo:
        """Load `file`, which is anywhere and stays where it is, and keep a copy in the folder.

        Raises:
            MRSSError: as `add_state`.
        """
        ...

    async def remove_state(self, name: str) -> StateInfo:
        """Unload a state; its file goes too if this server wrote it.

        Raises:
            NotFoundError: no such state.
            ConflictError: a mixture needs it.
        """
        ...

    async def mixtures(self) -> dict[str, MixtureSpec]:
        """Return the named mixtures by name."""
        ...

    async def put_mixture(self, name: str, spec: MixtureSpec, *, is_new: bool) -> bool:
        """Create or replace a named mixture, in `mixtures.toml` too; tell whether it was new.

        Raises:
            ConflictError: `is_new` and the name is taken, or a state has it.
            InvalidRequestError: a specification that means nothing, an unknown state.
            StorageError: the file cannot be written.
        """
        ...

    async def remove_mixture(self, name: str) -> None:
        """Remove a named mixture, from `mixtures.toml` too.

        Raises:
            NotFoundError: no such mixture.
        """
        ...

    async def model(self) -> ModelInfo:
        """Return what is loaded."""
        ...

    async def load_model(
        self, order: ModelOrder, on_taken: Callable[[], None] = lambda: None
    ) -> ModelInfo:
        """Put another model in the place of the loaded one, whose answers end first.

        Requests that come meanwhile wait for it. If it cannot be loaded the old one comes back.

        Args:
            order: what is asked for.
            on_taken: called on this loop when the loaded one takes no more requests. What was
                refused before stopped nothing.

        Raises:
            ModelFileError: no checkpoint that we run.
            ConflictError: another model is being loaded.
        """
        ...

    async def remove_model(
        self, drain_s: float, on_taken: Callable[[], None] = lambda: None
    ) -> None:
        """Unload the model, whose answers end first; requests get 503 until one is loaded.

        `on_taken` is called as by `load_model`.
        """
        ...

    async def request_ids(self) -> list[str]:
        """Return the names that RWKV-Infer's users ask for: the model's, then "<model> <state>"."""
        ...

    async def serve_state(self, path: str, display_name: str, defaults: Defaults) -> None:
        """Load one state in RWKV-Infer's manner: in memory, replacing what had its name."""
        ...

    async def serve_mixture(
        self,
        paths: Sequence[str],
        display_name: str,
        *,
        with_base: bool,
        weights: Sequence[float] | None,
        defaults: Defaults,
    ) -> None:
        """Load a mixture in RWKV-Infer's manner: in memory, the base last, logits averaged.

        Missing weights are 0; without any, all are equal.
        """
        ...

    async def reweigh(
        self, display_name: str, weights: Sequence[float] | None, defaults: Defaults
    ) -> None:
        """Change the weights, and the defaults that are given, of a named mixture, in memory."""
        ...

    async def remove_all_states(self) -> None:
        """Unload every state and mixture; no file is touched."""
        ...


@runtime_checkable
class Administers(Protocol):
    """A backend that can be administered."""

    @property
    def admin(self) -> Admin:
        """What an administrator may do."""
        ...
