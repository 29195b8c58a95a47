"""Merge rules and gates by name, with their parameters: `power:0.5`, `novelty:0.1`.

The tables say which there are and what they take; `engine.merges` and `engine.gates` have one
implementation for each (a test compares them).

    >>> parse_method("novelty:0.30", "gate", "mrss.gate").text
    'novelty'
    >>> parse_method({"name": "posterior", "share": 0.05}, "gate", "mrss.gate").text
    'posterior:0.05'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture.scanner import NAME_PATTERN, NUMBER, Scanner

Kind = Literal["merge", "gate"]

Points = tuple[tuple[str, tuple[tuple[int, float], ...]], ...]
"""For each state by name: (position, factor), positions ascending."""

Value = float | bool | str | Points

_POINT = rf"{NUMBER}@[0-9]{{1,7}}"
_CURVE = rf"{NAME_PATTERN.pattern}={_POINT}(?:,{_POINT})*"
_POINTS_PATTERN = re.compile(rf"{_CURVE}(?:\+{_CURVE})*")
_WORD_PATTERN = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a merge rule or gate.

    Attributes:
        name: in a table or object; in a text the order says it.
        kind: what values it takes: a number in [low, high]; true or false; one of `choices`; the
            name of a gate's file; or factors of states at positions ("points").
        doc: what it does, in a few words.
        default: None where it must be given.
    """

    name: str
    kind: Literal["number", "flag", "choice", "file", "points"]
    doc: str
    default: Value | None = None
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        return {
            "number": f"a number in [{self.low:g}, {self.high:g}]",
            "flag": "true or false",
            "choice": f"one of {', '.join(self.choices)}",
            "file": "the name of a trained gate",
            "points": "state=factor@position,factor@position+state=..., such as tone=0@0,1@32",
        }[self.kind]

    def check(self, value: object) -> Value:
        """Return a value of a table or object in its one form.

        Raises:
            ValueError: it is none of `allowed`.
        """
        match self.kind:
            case "number":
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                # NaN fails the comparison.
                if is_number and self.low <= value <= self.high:  # type: ignore[operator]
                    return _round(value)  # type: ignore[arg-type]
            case "flag" if isinstance(value, bool):
                return value
            case "choice" if isinstance(value, str) and value in self.choices:
                return value
            case "file" if isinstance(value, str) and NAME_PATTERN.fullmatch(value):
                return value
            case "points" if isinstance(value, str) and _POINTS_PATTERN.fullmatch(value):
                return _parse_points(value)
        raise ValueError(f"{self.name} must be {self.allowed}, got {value!r:.40}")

    def read(self, scanner: Scanner) -> Value:
        """Read a value from a text.

        Raises:
            InvalidRequestError: with its position.
        """
        start = scanner.at
        value: object
        match self.kind:
            case "number":
                value = scanner.number(f"{self.name}, {self.allowed}")
            case "points":
                value = scanner.match(_POINTS_PATTERN, self.allowed)
            case "file":
                value = scanner.match(NAME_PATTERN, self.allowed)
            case _:
                value = scanner.match(_WORD_PATTERN, f"{self.name}, {self.allowed}")
        if self.kind == "flag":
            value = {"true": True, "false": False}.get(str(value), value)
        try:
            return self.check(value)
        except ValueError as exc:
            scanner.fail(start, str(exc))


@dataclass(frozen=True)
class Method:
    """A merge rule or gate: its name, and the parameters that are not at their default.

    `make_method` and `parse_method` build one with checked values in the declared order.
    """

    name: str
    values: tuple[tuple[str, Value], ...] = ()

    @property
    def parameters(self) -> dict[str, Value]:
        """Every parameter's value by name, in the declared order."""
        given = dict(self.values)
        table = (MERGES | GATES)[self.name]
        # A parameter without a default is always among the values.
        return {p.name: given.get(p.name, p.default) for p in table}  # type: ignore[misc]

    def get(self, name: str) -> Value:
        """Return a parameter's value.

        Raises:
            KeyError: this merge rule or gate has no such parameter.
        """
        return self.parameters[name]

    def number(self, name: str) -> float:
        """Return the value of a parameter that is a number.

        Raises:
            KeyError: as `get`.
            TypeError: it is no number.
        """
        value = self.get(name)
        if not isinstance(value, float):
            raise TypeError(f"{name} of {self.text} is no number")
        return value

    @property
    def text(self) -> str:
        """The canonical text after `~`; it parses back to this method."""
        parameters = self.parameters
        given = [name for name, _ in self.values]
        if not given:
            return self.name
        names = list(parameters)
        spelled = names[: names.index(given[-1]) + 1]
        return f"{self.name}:{','.join(_spell(parameters[name]) for name in spelled)}"


_SHARE = Parameter(
    "share", "number", "how readily the posterior changes its mind, a token", 0.02, 0.0, 0.5
)
_TAU = Parameter(
    "tau", "number", "nats that make a state e times heavier where weights sum to 1", 0.3, 1e-3, 1e3
)

MERGES: dict[str, tuple[Parameter, ...]] = {
    "linear": (),
    "geometric": (),
    "product": (),
    "power": (
        Parameter(
            "exponent", "number", "1 is linear, 0 geometric, -1 harmonic", 0.5, low=-10.0, high=10.0
        ),
    ),
    "delta": (),
    "contrast": (),
    "route": (),
}
"""Merge rules by name, and their parameters."""

GATES: dict[str, tuple[Parameter, ...]] = {
    "fixed": (),
    "schedule": (
        Parameter("points", "points", "each state's factor, piecewise linear between positions"),
        Parameter("over", "choice", "what positions count", "tokens", choices=("tokens", "turns")),
    ),
    "novelty": (
        _TAU,
        Parameter("exponent", "number", "of d/max d where weights are strengths", 1.0, 0.0, 8.0),
    ),
    "confidence": (
        Parameter(
            "tau", "number", "nats of entropy that make a state e times lighter", 0.3, 1e-3, 1e3
        ),
    ),
    "posterior": (
        _SHARE,
        Parameter("own", "flag", "whether sampled tokens count as evidence too", False),
    ),
    "posterior-novelty": (_SHARE, _TAU),
    "learned": (Parameter("file", "file", "the trained gate"),),
}
"""Gates by name, and their parameters. One that takes a file needs training."""

MAX_FACTOR = 100.0
"""The largest factor of a schedule."""

MAX_CHARS = 1024
"""Of a method's text; a longer one would not fit a name."""

_WORDS: dict[Kind, str] = {"merge": "merge rule", "gate": "gate"}

TABLES: dict[Kind, dict[str, tuple[Parameter, ...]]] = {"merge": MERGES, "gate": GATES}

DEFAULT_MERGE = Method("delta")
DEFAULT_GATE = Method("novelty")


def make_method(kind: Kind, name: str, given: Mapping[str, object]) -> Method:
    """Build a method from its parameters by name.

    Raises:
        ValueError: an unknown method or parameter, a bad value, or a missing one.
    """
    if name not in TABLES[kind]:
        raise ValueError(f"must be one of {', '.join(TABLES[kind])}, got {name!r:.40}")
    table = {parameter.name: parameter for parameter in TABLES[kind][name]}
    for key in given:
        if key not in table:
            takes = f"it takes {', '.join(table)}" if table else "it takes none"
            raise ValueError(f"{name!r} has no parameter {key!r:.40}; {takes}")
    return _build(kind, name, {key: table[key].check(value) for key, value in given.items()})


def parse_method(value: object, kind: Kind, where: str) -> Method:
    """Parse what stands after `~`, or an object {"name": "posterior", "share": 0.05}.

    Args:
        value: a string or a mapping.
        kind: which table it is looked up in.
        where: the request's parameter, for errors.

    Raises:
        InvalidRequestError: as said.
    """
    if isinstance(value, str) and value.partition(":")[0] in TABLES[kind]:
        if len(value) > MAX_CHARS:
            raise InvalidRequestError(
                f"{where} must have at most {MAX_CHARS} characters, got {len(value)}", param=where
            )
        scanner = Scanner(value, what=where, param=where)
        method = read_method(scanner, kind)
        scanner.end("between parameters comes ','")
        return method
    given = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in TABLES[kind]:
        allowed = ", ".join(TABLES[kind])
        raise InvalidRequestError(
            f"{where} must be one of {allowed}, got {name!r:.40}", param=where
        )
    try:
        return make_method(kind, name, given)
    except ValueError as exc:
        raise InvalidRequestError(f"{where}: {exc}", param=where) from None


def read_method(scanner: Scanner, kind: Kind) -> Method:
    """Read a method that the tables know, and after `:` its parameters in the declared order.

    Raises:
        InvalidRequestError: with the position of the fault.
    """
    start = scanner.at
    name = scanner.match(NAME_PATTERN, f"a {_WORDS[kind]}")
    given: dict[str, Value] = {}
    if scanner.take(":"):
        for parameter in TABLES[kind][name]:
            given[parameter.name] = parameter.read(scanner)
            if not scanner.take(","):
                break
        else:
            scanner.fail(scanner.at - 1, f"{name!r} takes {len(given) or 'no'} parameters")
    try:
        return _build(kind, name, given)
    except ValueError as exc:
        scanner.fail(start, str(exc))


def _build(kind: Kind, name: str, checked: Mapping[str, Value]) -> Method:
    """Leave out defaults, and refuse what is missing with a ValueError."""
    values = []
    for parameter in TABLES[kind][name]:
        if parameter.name not in checked and parameter.default is None:
            raise ValueError(f"{name!r} needs {parameter.name}: {parameter.allowed}")
        value = checked.get(parameter.name, parameter.default)
        if value is not None and value != parameter.default:
            values.append((parameter.name, value))
    return Method(name, tuple(values))


def _parse_points(text: str) -> Points:
    """Turn what `_POINTS_PATTERN` matches into curves by state, each by position.

    Raises:
        ValueError: a state or a position twice, or a factor below 0.
    """
    curves: dict[str, dict[int, float]] = {}
    for curve in re.split(r"\+(?=[^+,@]*=)", text):
        name, _, points = curve.partition("=")
        if name in curves:
            raise ValueError(f"points have {name!r} twice; give all its points at once")
        curves[name] = {}
        for point in points.split(","):
            factor, _, position = point.partition("@")
            value = _round(float(factor))
            if not 0 <= value <= MAX_FACTOR:
                raise ValueError(f"a factor must be in [0, {MAX_FACTOR:g}], got {factor:.40}")
            if int(position) in curves[name]:
                raise ValueError(f"points of {name!r} have the position {int(position)} twice")
            curves[name][int(position)] = value
    return tuple((name, tuple(sorted(curves[name].items()))) for name in sorted(curves))


def _spell(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _spell_number(value)
    if isinstance(value, str):
        return value
    return "+".join(
        f"{name}={','.join(f'{_spell_number(factor)}@{position}' for position, factor in curve)}"
        for name, curve in value
    )


def _round(value: float) -> float:
    """Return `value` as its spelling reads; 0 has no sign, so that it has one spelling."""
    return float(_spell_number(value)) + 0.0


def _spell_number(value: float) -> str:
    return f"{value:.4g}"
