"""Changes of a state library: each takes one view of it and returns the next, or raises.

Nothing here touches a file or a view that is in use.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from mrss_provider.engine.mixtures_file import MIXTURES_FILE, NamedMixture
from mrss_provider.engine.state_folder import Entries, SamplingDefaults, fault_of_gate
from mrss_provider.errors import ConflictError, InvalidRequestError, NotFoundError, UnknownNameError
from mrss_provider.mixture import BASE, check_name
from mrss_provider.model import TunedState

_Value = TypeVar("_Value")

MAX_DISPLAY_CHARS = 200


def with_state(
    entries: Entries,
    state: TunedState,
    *,
    sampling: SamplingDefaults | None = None,
    replaces: bool = False,
) -> Entries:
    """Add a state; one of its name is replaced if `replaces` says so.

    Raises:
        ConflictError: the name is taken.
        InvalidRequestError: no state may have that name.
    """
    name = check_name(state.name)
    if name in entries.mixtures:
        raise ConflictError(f"{name!r} is a named mixture; choose another name", param="name")
    if name in entries.states and not replaces:
        raise ConflictError(
            f"{name!r} is loaded already; choose another name, or remove that one first",
            param="name",
        )
    defaults = _without(entries.sampling, name)
    return replace(
        entries,
        states={**entries.states, name: state},
        sampling=defaults if sampling is None else {**defaults, name: sampling},
        problems=tuple(p for p in entries.problems if p.name != name),
        created={**entries.created, name: int(time.time())},
    )


def with_kept(entries: Entries, state: TunedState) -> Entries:
    """Let mixtures that keep their states keep, under another name, what `state` is to replace."""
    replaced = entries.states.get(state.name)
    holders = {
        name: mixture
        for name, mixture in entries.mixtures.items()
        if mixture.keeps_states and any(term.name == state.name for term in mixture.terms)
    }
    if replaced is None or not holders or _is_same(replaced, state):
        return entries
    copy = free_name(entries, f"{state.name} {replaced.sha256[:8]}")
    unshown = replace(replaced.metadata, display_name=None)
    moved = {
        name: replace(
            mixture,
            terms=tuple(
                replace(term, name=copy) if term.name == state.name else term
                for term in mixture.terms
            ),
        )
        for name, mixture in holders.items()
    }
    entries = with_state(entries, replace(replaced, name=copy, metadata=unshown))
    return replace(entries, mixtures={**entries.mixtures, **moved})


def without_state(entries: Entries, name: str) -> Entries:
    """Take a state away, or what is wrong with its file.

    Raises:
        NotFoundError: there is none.
        ConflictError: a mixture needs it.
    """
    is_problem = any(problem.name == name for problem in entries.problems)
    if name not in entries.states and not is_problem:
        raise NotFoundError(f"there is no state {name!r}", param="name")
    users = [
        mixture
        for mixture, named in sorted(entries.mixtures.items())
        if any(term.name == name for term in named.terms)
    ]
    if users:
        raise ConflictError(
            f"{name!r} is a state of the mixtures {', '.join(users)}; remove these first",
            param="name",
        )
    return replace(
        entries,
        states=_without(entries.states, name),
        sampling=_without(entries.sampling, name),
        problems=tuple(p for p in entries.problems if p.name != name),
        created=_without(entries.created, name),
    )


def with_mixture(
    entries: Entries, name: str, mixture: NamedMixture, *, is_new: bool = False
) -> Entries:
    """Add a named mixture, or replace it unless `is_new`.

    Raises:
        ConflictError: the name is taken, by a state or, if `is_new`, by a mixture.
        InvalidRequestError: no mixture may have that name, a term is no state, or the gate has no
            meaning for these terms.
    """
    check_name(name, "mixture")
    if name in entries.states:
        raise ConflictError(f"{name!r} is a state; choose another name", param="name")
    if is_new and name in entries.mixtures:
        raise ConflictError(f"{name!r} exists; replace it with PUT", param="name")
    for term in mixture.terms:
        if term.name != BASE and term.name not in entries.states:
            raise UnknownNameError(f"the state {term.name!r} is not loaded", param="terms")
    if fault := fault_of_gate(mixture, entries.gates):
        raise InvalidRequestError(fault, param="gate")
    return replace(
        entries,
        mixtures={**entries.mixtures, name: mixture},
        problems=tuple(p for p in entries.problems if p.name != name),
        created={**entries.created, name: int(time.time())},
    )


def without_mixture(entries: Entries, name: str) -> Entries:
    """Take a named mixture away, or what is wrong with its table.

    Raises:
        NotFoundError: there is none.
    """
    problems = tuple(
        p for p in entries.problems if not (p.name == name and p.path.name == MIXTURES_FILE)
    )
    if name not in entries.mixtures and problems == entries.problems:
        raise NotFoundError(f"there is no mixture {name!r}", param="name")
    return replace(
        entries,
        mixtures=_without(entries.mixtures, name),
        problems=problems,
        created=_without(entries.created, name),
    )


def without_all(entries: Entries) -> Entries:
    """Take every state and mixture away; trained gates stay."""
    return Entries(gates=entries.gates, view=entries.view)


def find_name(entries: Entries, text: str) -> str | None:
    """Return what `text` is the name, display name or id of."""
    return text if text in entries.names else entries.aliases.get(text)


def free_name(entries: Entries, display_name: str) -> str:
    """Return a name for what people call `display_name`: that of what is called so, or a new one.

    Raises:
        InvalidRequestError: nothing of it may be in a name.
    """
    if not 0 < len(display_name) <= MAX_DISPLAY_CHARS or not display_name.isprintable():
        raise InvalidRequestError(
            f"a name has 1 to {MAX_DISPLAY_CHARS} printable characters, got {display_name!r:.220}",
            param="state_viewname",
        )
    known = {shown: name for name, shown in entries.display_names.items()}
    if display_name in known:
        return known[display_name]
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", display_name).lstrip("_.-").rstrip("-")[:60] or "state"
    if display_name == slug:
        return check_name(slug)
    taken = {*entries.names, *(problem.name for problem in entries.problems)}
    numbered = [slug, *(f"{slug}-{number}" for number in range(2, len(taken) + 3))]
    return check_name(next(name for name in numbered if name not in taken))


def same_state(entries: Entries, state: TunedState) -> str | None:
    """Return the name of a loaded state with the same content, if there is one."""
    for name, loaded in sorted(entries.states.items()):
        if _is_same(loaded, state):
            return name
    return None


def _is_same(one: TunedState, other: TunedState) -> bool:
    return one.sha256 == other.sha256 and one.metadata.bos == other.metadata.bos


def padded(weights: Sequence[float] | None, rows: int) -> tuple[float, ...]:
    """Return one weight a row: a short list is filled with zeros, none at all is equal weights.

    Raises:
        InvalidRequestError: more weights than rows, or a sum that is not above 0.
    """
    where = "state_gatingweight"
    if weights is None:
        return (1.0,) * rows
    if len(weights) > rows:
        raise InvalidRequestError(
            f"{where} has {len(weights)} weights for {rows} rows; give at most one a row",
            param=where,
        )
    if any(weight < 0 for weight in weights) or not sum(weights) > 0:
        raise InvalidRequestError(
            f"{where} must have weights >= 0 whose sum is above 0, got {list(weights)!r:.200}",
            param=where,
        )
    return (*weights, *(0.0,) * (rows - len(weights)))


def _without(mapping: Mapping[str, _Value], name: str) -> dict[str, _Value]:
    return {key: value for key, value in mapping.items() if key != name}
