"""Scorers: what an answer is worth, in [0, 1], beyond the checks of the prompt file.

Built in are `knowledge` and `tone`, the rules of the bundled model's world; `module:function` names
anybody's own, called with (prompt, text).
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from mrss_provider.compare.checks import share_passed
from mrss_provider.compare.prompts import Prompt
from mrss_provider.errors import ConfigError, InvalidRequestError

# None where the scorer has nothing to say of such a prompt.
Scorer = Callable[[Prompt, str], float | None]

CHECKS = "checks"


def checks(prompt: Prompt, text: str) -> float | None:
    """Return the share of the prompt's own checks that `text` passes; None without any."""
    return share_passed(prompt.checks, text) if prompt.checks else None


def knowledge(prompt: Prompt, text: str) -> float | None:
    """Return 1 if `text` has the right value and no other; None if it was no question of a fact."""
    fact = _facts().get(prompt.question.strip())
    if fact is None:
        return None
    from mrss_provider.evaluate.world import PLAIN, score_answer

    return float(score_answer(text, fact, PLAIN).know)


def tone(voice: str) -> Scorer:
    """Return the scorer of one voice: 1 where a text has its words and no other voice's.

    Raises:
        ConfigError: no such voice.
    """
    from mrss_provider.evaluate.world import MARKED, voices_in

    if voice not in MARKED:
        raise ConfigError(
            f"the voice of a tone scorer must be one of {', '.join(MARKED)}, got {voice!r}",
            param="scorer",
        )
    return lambda _, text: float(voices_in(text.split("\n\n")[0]) == {voice})


def load_scorers(names: Sequence[str]) -> dict[str, Scorer]:
    """Return scorers by what they are called: `knowledge`, `tone`, `tone:wizard`, `module:name`.

    Raises:
        ConfigError: one that is not there.
    """
    return {name: _load(name) for name in names}


def score(scorers: Mapping[str, Scorer], prompt: Prompt, text: str) -> dict[str, float]:
    """Return what each scorer that has something to say says.

    Raises:
        InvalidRequestError: one said no number, or raised.
    """
    found: dict[str, float] = {}
    for name, scorer in scorers.items():
        try:
            value = scorer(prompt, text)
        except Exception as exc:
            raise InvalidRequestError(
                f"the scorer {name!r} failed on an answer to {prompt.id!r}: "
                f"{type(exc).__name__}: {exc}"
            ) from exc
        if value is None:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidRequestError(
                f"the scorer {name!r} must return a finite number or None, got {value!r:.40}"
            )
        found[name] = float(value)
    return found


def _load(name: str) -> Scorer:
    if name == "knowledge":
        return knowledge
    if name == "tone" or name.startswith("tone:"):
        return tone(name.partition(":")[2] or "pirate")
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"--scorer must be knowledge, tone, tone:VOICE or module:function, got {name!r}",
            param="scorer",
        )
    if os.getcwd() not in sys.path:
        # Where people keep a scorer of their own; what is installed comes first.
        sys.path.append(os.getcwd())
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(f"the scorer {name!r} cannot be loaded: {exc}", param="scorer") from exc
    if not callable(found):
        raise ConfigError(f"the scorer {name!r} is no function", param="scorer")
    scorer: Scorer = found
    return scorer


@cache
def _facts() -> Mapping[str, Any]:
    """Return every plain question of the bundled model's world, and the fact that answers it."""
    from mrss_provider.evaluate.world import HOME_FACTS, HOME_TOWN, RELATIONS
    from mrss_provider.evaluate.world.relations import entity_phrase

    forms = {relation.name: relation.questions for relation in RELATIONS}
    return {
        form.format(e=entity_phrase(fact.entity, fact.kind, town)): fact
        for fact in HOME_FACTS
        for form in forms[fact.relation]
        for town in (None, HOME_TOWN)
    }
