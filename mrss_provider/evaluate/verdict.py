"""Verdict: does mixing work here? The conditions are stated once, before anything is measured.

`works` needs all of: at top-p 0.7 the default beats the best one-row baseline that saw no joint
data by 20 points of `both` with an interval above 0; eta = both / (A_K S_T) >= 0.8, where A_K is
what the knowledge state knows alone and S_T how often the tone state has the manner alone; know >=
0.9 A_K and tone >= 0.9 S_T at the same weights; well formed within 2 points of the base; neutral
text no more than 5 % above the base's perplexity; and eta >= 0.6 after two turns of other talk.

Negative findings have names and are told as plainly: N1 the states' average or sum is within 2
points, N2 another one-row state is, N3 the prompt alone does as well, N4 eta falls below 0.3 within
100 tokens, N5 the knowledge state knows less than half, N6 only greedy decoding works.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LEAST_KNOWLEDGE = 0.85
LEAST_TONE = 0.95
MOST_GUESSED = 0.05
MOST_FACT_NATS = 0.3

LEAST_GAIN = 0.20
LEAST_ETA = 0.80
LEAST_PART = 0.90
MOST_MALFORMED = 0.02
MOST_PERPLEXITY = 1.05
LEAST_LATE_ETA = 0.60
WITHIN = 0.02
FADED_ETA = 0.30
# Of shares that are equal to a limit: 0.95 - 0.75 is less than 0.2 to a computer.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Measured:
    """What a verdict is made of, for one pair of states; shares in [0, 1].

    Attributes:
        knowledge_alone: A_K at top-p 0.7.
        tone_alone: S_T at top-p 0.7.
        base_knows: share of facts that the base gets right.
        chance: share that a guess gets right.
        fact_nats: of the knowledge state, of facts in toned text minus in its own; None: not told.
        know, tone, both: of the default at top-p 0.7.
        both_t1, both_greedy: of the default.
        gain_low: lower end of the interval of the gain over the best baseline.
        baselines: `both` at top-p 0.7 by name.
        prompt_only: `both` at top-p 0.7, with the fact and the manner in the prompt.
        well_formed, base_well_formed: None where nobody can tell.
        perplexity: of neutral text, over the base's; None without such text.
        late_both: at the third turn, in the default's own manner; None: not measured.
        faded_both: the lowest within some 100 tokens of other talk, by its manner.
    """

    knowledge_alone: float
    tone_alone: float
    base_knows: float
    chance: float
    know: float
    tone: float
    both: float
    both_t1: float
    gain_low: float
    baselines: Mapping[str, float]
    prompt_only: float
    both_greedy: float | None = None
    fact_nats: float | None = None
    well_formed: float | None = None
    base_well_formed: float | None = None
    perplexity: float | None = None
    late_both: float | None = None
    faded_both: Mapping[str, float] = field(default_factory=dict)

    @property
    def ceiling(self) -> float:
        """A_K S_T: both at once if the two were independent."""
        return self.knowledge_alone * self.tone_alone

    @property
    def eta(self) -> float:
        """Share of the ceiling that the default reaches."""
        return self.both / self.ceiling if self.ceiling > 0 else 0.0


@dataclass(frozen=True)
class Condition:
    """One thing that was to be so: what, the number, and whether it is; None: not measured."""

    text: str
    value: str
    holds: bool | None


def preconditions(found: Measured) -> list[Condition]:
    """Return what must hold of the states before merging them can be judged."""
    conditions = [
        _at_least("the knowledge state knows", found.knowledge_alone, LEAST_KNOWLEDGE),
        _at_least("the tone state has its manner", found.tone_alone, LEAST_TONE),
        _at_most("the base guesses", found.base_knows, found.chance + MOST_GUESSED),
    ]
    if found.fact_nats is not None:
        text = "nats that facts cost the knowledge state in the manner, beyond its own"
        conditions.append(_at_most(text, found.fact_nats, MOST_FACT_NATS))
    return conditions


def conditions(found: Measured) -> list[Condition]:
    """Return the conditions of `works`, in the order in which they were stated."""
    best = max(found.baselines, key=lambda name: found.baselines[name])
    gain = found.both - found.baselines[best]
    least_know = LEAST_PART * found.knowledge_alone
    least_tone = LEAST_PART * found.tone_alone
    checks = [
        _at_least(f"both, beyond the best one-row baseline, `{best}`", gain, LEAST_GAIN),
        Condition(
            "the interval of that gain is above 0", f"{found.gain_low:+.3f}", found.gain_low > 0
        ),
        _at_least("eta = both / (A_K S_T)", found.eta, LEAST_ETA),
        _at_least("know, of 0.9 A_K", found.know, least_know),
        _at_least("tone, of 0.9 S_T", found.tone, least_tone),
    ]
    if found.well_formed is None or found.base_well_formed is None:
        checks.append(Condition("well formed, within 2 points of the base", "not told", None))
    else:
        least = found.base_well_formed - MOST_MALFORMED
        checks.append(
            _at_least("well formed, within 2 points of the base", found.well_formed, least)
        )
    if found.perplexity is None:
        checks.append(Condition("perplexity of neutral text, over the base's", "no text", None))
    else:
        text = "perplexity of neutral text, over the base's"
        checks.append(_at_most(text, found.perplexity, MOST_PERPLEXITY))
    if found.late_both is None or found.ceiling == 0:
        checks.append(Condition("eta at the third turn", "not measured", None))
    else:
        late = found.late_both / found.ceiling
        checks.append(_at_least("eta at the third turn", late, LEAST_LATE_ETA))
    return checks


def negatives(found: Measured) -> list[str]:
    """Return the negative findings that apply."""
    told = []
    for name, value in found.baselines.items():
        if value >= found.both - WITHIN - _ROUNDING:
            code = "N1" if name in ("average", "sum", "sum-0.7") else "N2"
            told.append(
                f"{code}: `{name}`, one row, has {value:.2f} of both against {found.both:.2f}"
            )
    if found.prompt_only >= found.both:
        told.append(
            f"N3: the right fact and the manner in the prompt have {found.prompt_only:.2f} of both "
            f"against {found.both:.2f}, with one row"
        )
    for history, both in found.faded_both.items():
        if found.ceiling > 0 and (faded := both / found.ceiling) < FADED_ETA:
            told.append(f"N4: within some 100 tokens of {history} talk eta falls to {faded:.2f}")
    if found.knowledge_alone < 0.5:
        told.append(f"N5: the knowledge state knows {found.knowledge_alone:.2f}: tuning failed")
    if _works_greedily_only(found):
        told.append(
            f"N6: only greedy decoding works: {found.both_greedy:.2f} against {found.both:.2f}"
        )
    return told


def works(found: Measured) -> bool | None:
    """Tell whether all conditions hold; None if none fails but some were not measured."""
    held = [condition.holds for condition in (*preconditions(found), *conditions(found))]
    if False in held:
        return False
    return None if None in held else True


def _works_greedily_only(found: Measured) -> bool:
    if found.both_greedy is None or found.ceiling == 0:
        return False
    return found.both_greedy / found.ceiling >= LEAST_ETA > found.eta


def _at_least(text: str, value: float, least: float) -> Condition:
    return Condition(f"{text}: at least {least:.2f}", f"{value:.3f}", value >= least - _ROUNDING)


def _at_most(text: str, value: float, most: float) -> Condition:
    return Condition(f"{text}: at most {most:.2f}", f"{value:.3f}", value <= most + _ROUNDING)
