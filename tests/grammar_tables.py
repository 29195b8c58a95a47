"""Tables of docs/structured_output.md: JSON Schema's keywords, and what a grammar costs."""

import json
from pathlib import Path

from mrss_provider.grammar.schema import ANNOTATIONS, HONOURED, REFUSED

_RESULTS = Path(__file__).parents[1] / "benchmarks/results/grammar.jsonl"

# Where a keyword is followed in part: what is refused then, by name.
LIMITS = {
    "$ref": "`#/...` within the schema, also to itself",
    "format": "`date`, `date-time`, `time`, `duration`, `email`, `hostname`, `ipv4`, `ipv6`, "
    "`uuid`, `uri`",
    "minProperties": "where all `properties` are `required`, and at most one more than these",
    "maxProperties": "where all `properties` are `required`",
    "multipleOf": "numbers of up to 4 digits, zeros around them apart",
    "oneOf": "where no value has two branches: other types, other constants, or objects that a "
    "required property tells apart",
    "pattern": "without look-around, word boundaries and back references; `\\d`, `\\w` are ASCII",
    "patternProperties": "up to 32 that share no name",
    "properties": "in the order of the schema; up to 1,000 in all",
}


def keywords():
    """Return a row for each keyword of JSON Schema 2020-12."""
    rows = [["keyword", ""]]
    rows += [[f"`{word}`", _followed(word)] for word in sorted(HONOURED)]
    for words, what in ((ANNOTATIONS, "asks nothing of an answer"), (REFUSED, "refused (400)")):
        rows.append([", ".join(f"`{word}`" for word in sorted(words)), what])
    return rows


def costs():
    """Return a row for each measured cost, the newest of each."""
    lines = [json.loads(line) for line in _RESULTS.read_text(encoding="utf-8").splitlines()]
    cells = {
        (line["what"], line.get("grammar"), line.get("answers"), line["vocabulary"]): line
        for line in lines
    }
    rows = [["", "bundled model (1,448 tokens)", "World (65,536)"]]
    for what, grammar, answers in dict.fromkeys(key[:3] for key in cells):
        found = [cells[what, grammar, answers, name] for name in ("demo", "world")]
        rows.append([_titled(what, grammar, answers), *(_told(line) for line in found)])
    return rows


def _followed(word):
    return f"followed: {LIMITS[word]}" if word in LIMITS else "followed"


def _titled(what, grammar, answers):
    return {
        "vocabulary": "the vocabulary, once a model",
        "compile": f"`{grammar}`: compiled, and found compiled",
        "mask": f"`{grammar}`: a token's mask, and applying it to 3 rows",
        "step": f"a step of {answers} answer{'s' * (answers != 1)}, without and with a grammar",
    }[what]


def _told(line):
    if line["what"] == "vocabulary":
        return f"{line['build_ms']:.0f} ms"
    if line["what"] == "compile":
        return f"{line['median_ms']:.1f} ms, {line['hit_us']:.0f} µs"
    if line["what"] == "mask":
        most = f"99 in 100 below {line['p99_us']:.0f}"
        return f"{line['median_us']:.0f} µs ({most}), {line['write_us']:.0f} µs"
    steps = f"{line['free_thread_ms']:.2f} ms, {line['bound_thread_ms']:.2f} ms"
    masks = f"{line['masks_ms']:.2f} ms, {100 * line['share_hidden']:.0f} % hidden"
    return f"{steps}; masks {masks}"
