"""LibraryAdmin: states and mixtures of a running library, loaded, changed and removed.

Blocks on files: call it from a thread of its own. Each change is checked against the present view,
made to last, and then shown to new requests, in this order; what raises has changed nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mrss_provider.administration import Defaults, MixtureSpec, StateInfo
from mrss_provider.engine import library_changes as changes
from mrss_provider.engine import library_files as files
from mrss_provider.engine.mixtures_file import NamedMixture, parse_table
from mrss_provider.engine.mixtures_writer import drop_table, mixture_table, put_table
from mrss_provider.engine.state_folder import (
    ADDED_FOLDER,
    STATE_SUFFIXES,
    Entries,
    SamplingDefaults,
)
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.errors import (
    ConfigError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    StateFileError,
)
from mrss_provider.mixture import BASE, Method, Term, check_name
from mrss_provider.model import TunedState, load_tuned_state

# What RWKV-Infer computes: the average of the rows' logits, cut off before it is tempered.
_RWKV_MERGE = Method("geometric")
_RWKV_GATE = Method("fixed")


class LibraryAdmin:
    """Changes one library and its folder.

    Args:
        library: modified.
        folder: of state files and `mixtures.toml`.
        max_state_bytes: larger state files are refused.
        strict: refuse states that were tuned on other weights.
    """

    def __init__(
        self, library: StateLibrary, folder: Path, *, max_state_bytes: int, strict: bool
    ) -> None:
        self._library = library
        self._folder = folder
        self._max_state_bytes = max_state_bytes
        self._strict = strict

    def states(self) -> list[StateInfo]:
        """Return the loaded states by name."""
        entries = self._library.entries
        return [self._info(entries.states[name]) for name in sorted(entries.states)]

    def add_state(self, path: str, name: str | None = None) -> StateInfo:
        """Load a file of the folder; one that the next start would not find is copied.

        Raises:
            MRSSError: as `Admin.add_state`.
        """
        file = files.find_inside(self._folder, path, "path")
        name = check_name(file.stem if name is None else name)
        state = self._read(file, name)
        root = self._folder.resolve()
        is_found_at_start = file.parent in (root, root / ADDED_FOLDER) and file.stem == name
        return self._keep(state, is_found_at_start=is_found_at_start)

    def upload_state(self, file: Path, name: str) -> StateInfo:
        """Load a file from anywhere, and copy it.

        Raises:
            MRSSError: as `Admin.add_state`.
        """
        return self._keep(self._read(file, check_name(name)), is_found_at_start=False)

    def remove_state(self, name: str) -> StateInfo:
        """Unload a state, and delete its file if the server wrote it.

        Raises:
            MRSSError: as `Admin.remove_state`.
        """
        path = files.state_file(self._folder, name)
        is_added = path is not None and files.is_added(self._folder, path)
        state = self._library.entries.states.get(name)

        def commit() -> None:
            if path is not None and is_added:
                files.remove_state_file(path)

        if state is None:
            info = StateInfo(name, "", "", "", path.name if path else "", is_added)
        else:
            info = self._info(state)
        self._library.change(lambda entries: changes.without_state(entries, name), commit)
        return info

    def mixtures(self) -> dict[str, MixtureSpec]:
        """Return the named mixtures by name."""
        entries = self._library.entries
        return {
            name: MixtureSpec(**mixture_table(entries.mixtures[name]))
            for name in sorted(entries.mixtures)
        }

    def put_mixture(self, name: str, spec: MixtureSpec, *, is_new: bool) -> bool:
        """Create or replace a named mixture, in the file too; tell whether it was new.

        Raises:
            MRSSError: as `Admin.put_mixture`.
        """
        mixture = _parse_spec(spec)
        for term in mixture.terms:
            in_memory = term.name in self._library.entries.states
            if in_memory and files.state_file(self._folder, term.name) is None:
                raise ConflictError(
                    f"the state {term.name!r} is in memory only and the mixture would outlive it; "
                    "keep it with POST /v1/states first",
                    param="terms",
                )
        was_there = name in self._library.entries.mixtures
        self._library.change(
            lambda entries: self._with_mixture(entries, name, mixture, is_new=is_new),
            lambda: files.edit_mixtures(self._folder, lambda text: put_table(text, name, mixture)),
        )
        return not was_there

    def remove_mixture(self, name: str) -> None:
        """Remove a named mixture, from the file too.

        Raises:
            MRSSError: as `Admin.remove_mixture`.
        """
        self._library.change(
            lambda entries: changes.without_mixture(entries, name),
            lambda: files.edit_mixtures(self._folder, lambda text: drop_table(text, name)),
        )

    def request_ids(self) -> list[str]:
        """Return the model's display name, then "<model> <state or mixture>"."""
        entries = self._library.entries
        shown = [entries.display_names.get(name, name) for name in entries.names if name != BASE]
        return [entries.view, *(f"{entries.view} {name}" for name in shown)]

    def serve_state(self, path: str, display_name: str, defaults: Defaults) -> None:
        """Load one state in RWKV-Infer's manner.

        Raises:
            MRSSError: as `Admin.add_state`.
        """
        file = files.find_inside(self._folder, path, "state_filename")
        state = self._read(file, "unnamed")

        def edit(entries: Entries) -> Entries:
            named = _named(state, changes.free_name(entries, display_name), display_name)
            entries = changes.with_kept(entries, named)
            sampling = SamplingDefaults(defaults.temperature, defaults.top_p, "rwkv")
            return changes.with_state(entries, named, sampling=sampling, replaces=True)

        self._library.change(edit)

    def serve_mixture(
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
        self._check_rows(len(paths), with_base=with_base)
        shares = changes.padded(weights, len(paths) + with_base)
        found = [files.find_inside(self._folder, path, "state_filenames") for path in paths]
        states = [self._read(file, "unnamed") for file in found]

        def edit(entries: Entries) -> Entries:
            names = []
            for file, state in zip(found, states, strict=True):
                name = changes.same_state(entries, state)
                if name is None:
                    name = changes.free_name(entries, file.stem)
                    if name in entries.states:
                        name = changes.free_name(entries, f"{file.stem} {state.sha256[:8]}")
                    entries = changes.with_state(entries, _named(state, name, ""))
                names.append(name)
            rows = [*names, BASE] if with_base else names
            mixture = NamedMixture(
                terms=tuple(Term(name, share) for name, share in zip(rows, shares, strict=True)),
                merge=_RWKV_MERGE,
                gate=_RWKV_GATE,
                temperature=defaults.temperature,
                top_p=defaults.top_p,
                sampling_order="rwkv",
                display_name=display_name,
                # It was made of files, and not of names.
                keeps_states=True,
            )
            name = changes.free_name(entries, display_name)
            return self._with_mixture(entries, name, mixture)

        self._library.change(edit)

    def reweigh(
        self, display_name: str, weights: Sequence[float] | None, defaults: Defaults
    ) -> None:
        """Change the weights of a named mixture, and the defaults that are given.

        Raises:
            NotFoundError: no mixture is called so.
            InvalidRequestError: weights that do not fit the rows.
        """

        def edit(entries: Entries) -> Entries:
            name = changes.find_name(entries, display_name)
            mixture = entries.mixtures.get(name or "")
            if name is None or mixture is None:
                raise NotFoundError(
                    f"there is no mixture {display_name!r:.200}", param="state_viewname"
                )
            shares = changes.padded(weights, len(mixture.terms))
            terms = tuple(
                replace(term, weight=share)
                for term, share in zip(mixture.terms, shares, strict=True)
            )
            said = {key: value for key, value in vars(defaults).items() if value is not None}
            return self._with_mixture(entries, name, replace(mixture, terms=terms, **said))

        self._library.change(edit)

    def remove_all_states(self) -> None:
        """Unload every state and mixture; no file is touched."""
        self._library.change(changes.without_all)

    def _read(self, file: Path, name: str) -> TunedState:
        if file.suffix not in STATE_SUFFIXES:
            raise StateFileError(
                f"a state file ends in {', '.join(STATE_SUFFIXES)}, got {file.name!r:.100}"
            )
        if not file.is_file():
            raise StateFileError(f"{file.name!r:.100} is no file")
        files.check_size(file, self._max_state_bytes)
        return load_tuned_state(file, self._library.model_config, name=name, strict=self._strict)

    def _keep(self, state: TunedState, *, is_found_at_start: bool) -> StateInfo:
        def edit(entries: Entries) -> Entries:
            changed = changes.with_state(entries, state)
            other = files.state_file(self._folder, state.name)
            if other is not None and not is_found_at_start:
                # It was unloaded, or cannot be read; the next start would find two of that name.
                raise ConflictError(
                    f"the folder of states has a file {other.name!r} already; choose another name",
                    param="name",
                )
            return changed

        def commit() -> None:
            if not is_found_at_start:
                files.write_state(self._folder, state, self._library.model_config)

        self._library.change(edit, commit)
        return self._info(state)

    def _info(self, state: TunedState) -> StateInfo:
        path = files.state_file(self._folder, state.name)
        return StateInfo(
            name=state.name,
            display_name=state.metadata.display_name or "",
            group=state.metadata.group or "",
            sha256=state.sha256,
            file=path.name if path else "",
            added=path is not None and files.is_added(self._folder, path),
        )

    def _with_mixture(
        self, entries: Entries, name: str, mixture: NamedMixture, *, is_new: bool = False
    ) -> Entries:
        """Add a mixture that requests can be answered with."""
        changed = changes.with_mixture(entries, name, mixture, is_new=is_new)
        self._library.resolve_in(changed, name)
        return changed

    def _check_rows(self, num_files: int, *, with_base: bool) -> None:
        limit = self._library.max_states
        if not 0 < num_files <= limit - with_base:
            raise InvalidRequestError(
                f"a mixture has 1 to {limit} states (max_states), the untuned one among them; got "
                f"{num_files} files",
                param="state_filenames",
            )


def _named(state: TunedState, name: str, display_name: str) -> TunedState:
    metadata = state.metadata
    if display_name and display_name != name:
        metadata = replace(metadata, display_name=display_name)
    return replace(state, name=name, metadata=metadata)


def _parse_spec(spec: MixtureSpec) -> NamedMixture:
    said = {key: value for key, value in vars(spec).items() if value is not None}
    try:
        return parse_table(said)
    except ConfigError as exc:
        # It came in a request, not in a file.
        raise InvalidRequestError(exc.message, param=exc.param) from exc
