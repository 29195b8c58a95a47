"""What the documents show, made anew: `python tests/docs_blocks.py` writes it into them.

In a ```console block, lines that begin with `$ ` are commands and the others what they print. In a
```console answers block the model speaks, so only the form is the same from one machine to another.
Between `<!-- NAME -->` and `<!-- end -->` stands the table that `TABLES[NAME]` makes.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import evaluation_seeds_tables
import evaluation_tables
import grammar_tables
from command import mrss
from conformance import table as conformance_table

from mrss_provider.cli.options import field_help
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.openai_schema import (
    CHAT_KEYS,
    COMPLETION_KEYS,
    EMBEDDING_KEYS,
    EMBEDDING_MRSS_KEYS,
    MRSS_KEYS,
    KeyTable,
)
from mrss_provider.openai_schema.keys import STREAM_KEYS, message_keys
from mrss_provider.server import schemas, text_schemas
from mrss_provider.server.openapi import operations

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def rendered(text: str, *, everything: bool) -> str:
    """Return a document with its blocks and tables made anew.

    The model's answers and the modules' own sentences change from day to day: they stay as they
    are unless `everything` is wanted.
    """
    text = re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda found: _table(found[1]) if everything or found[1] not in LIVING else found[0],
        text,
        flags=re.DOTALL,
    )
    return re.sub(
        r"```console( answers)?\n(.*?)```",
        lambda found: found[0] if found[1] and not everything else _block(found[1], found[2]),
        text,
        flags=re.DOTALL,
    )


def answer_blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of the `answers` blocks and the lines shown under it."""
    for block in re.findall(r"```console answers\n(.*?)```", text, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = part.splitlines()
            yield command, lines


def run(command: str) -> str:
    """Run a `mrss ...` command and return what a terminal would show."""
    program, *args = shlex.split(command)
    assert program == "mrss", command
    result = mrss(*args)
    return result.err + result.out


@contextmanager
def engine() -> Iterator[None]:
    """Run the bundled model for the commands that ask an engine, and show help 80 wide."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        env = {"MRSS_SOCKET": f"{folder}/s", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(
            [sys.executable, "-m", "mrss_provider.cli", "serve"],
            env={**os.environ, **env},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.stderr is not None
        try:
            assert any(line.startswith("names: ") for line in server.stderr)
            with mock.patch.dict(os.environ, env):
                yield
        finally:
            server.terminate()
            server.communicate(timeout=60)


def _block(kind: str | None, block: str) -> str:
    commands = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    shown = "".join(f"$ {command}\n{run(command)}" for command in commands)
    return f"```console{kind or ''}\n{shown}```"


def _table(name: str) -> str:
    header, *rows = TABLES[name]()
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"<!-- {name} -->\n\n{text}\n\n<!-- end -->"


def _settings() -> list[list[str]]:
    rows = [["variable", "default", "is"]]
    for cls in (EngineConfig, ServerConfig):
        for field in fields(cls):
            text = field_help(cls)[field.name].replace("None", "unset")
            default = field.default
            shown = "bundled" if isinstance(default, Path) else f"{default}".replace("None", "")
            rows.append([f"`MRSS_{field.name.upper()}`", shown.lower(), text])
    return rows


def _parameters() -> list[list[str]]:
    honoured = CHAT_KEYS.honoured | COMPLETION_KEYS.honoured
    kinds = {
        "honoured": honoured,
        "accepted": CHAT_KEYS.accepted | COMPLETION_KEYS.accepted,
        "refused": (CHAT_KEYS.refused.keys() | COMPLETION_KEYS.refused.keys()) - honoured,
    }
    rows = [["kind", "parameters"]]
    return rows + [[k, ", ".join(f"`{key}`" for key in sorted(keys))] for k, keys in kinds.items()]


def _routes() -> list[list[str]]:
    """Return a row for each route; those that also answer without `/v1` once."""
    found = operations()
    known = {(operation.method, operation.path) for operation in found}
    rows = [["route", "what it does", "needs"]]
    for operation in found:
        method, path = operation.method, operation.path
        if (method, f"/v1{path}") in known and path != "/models":
            continue
        short = path.removeprefix("/v1")
        also = f", `{short}`" if short != path and (method, short) in known else ""
        also = "" if path == "/v1/models" else also
        needs = "an admin's key" if operation.is_admin else ""
        rows.append([f"`{method} {path}`{also}", operation.summary, needs])
    return rows


def _keys() -> list[list[str]]:
    columns = (
        (CHAT_KEYS, schemas.CHAT),
        (COMPLETION_KEYS, schemas.TEXT),
        (EMBEDDING_KEYS, text_schemas.EMBEDDING),
    )
    header = ["parameter", "chat completions", "completions", "embeddings"]
    return [header, *_rows_of(columns)]


def _inner_keys() -> list[list[str]]:
    objects = {
        "mrss": (MRSS_KEYS, schemas.MRSS),
        "mrss (embeddings)": (EMBEDDING_MRSS_KEYS, text_schemas.EMBEDDING_MRSS),
        "stream_options": (STREAM_KEYS, schemas.STREAM_OPTIONS),
        "messages[]": (message_keys(0), {}),
    }
    rows = [["object", "key", ""]]
    for name, (table, known) in objects.items():
        rows += [[f"`{name}`", *row] for row in _rows_of([(table, known)])]
    return rows


def _rows_of(columns: Sequence[tuple[KeyTable, Mapping[str, Any]]]) -> list[list[str]]:
    keys = {key for table, _ in columns for key in _all_keys(table)}
    return [[f"`{key}`", *(_said(key, *column) for column in columns)] for key in sorted(keys)]


def _all_keys(table: KeyTable) -> set[str]:
    return {*table.honoured, *table.accepted, *table.refused}


def _said(key: str, table: KeyTable, known: Mapping[str, Any]) -> str:
    """Return what a table says of a key, and the range of its values."""
    if key in table.honoured:
        return " ".join(filter(None, ["honoured", _range_of(known.get(key, {}))]))
    if key in table.accepted:
        return "accepted"
    if key in table.refused:
        refusal = table.refused[key]
        neutral = ", ".join(f"`{json.dumps(value)}`" for value in refusal.neutral)
        return f"refused: {refusal.reason}" + (f" ({neutral} passes)" if neutral else "")
    return "unknown"


def _range_of(schema: Mapping[str, Any]) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is None or high is None:
        return ""
    opens, closes = "[("["exclusiveMinimum" in schema], "])"["exclusiveMaximum" in schema]
    return f"{opens}{_short(low)}, {_short(high)}{closes}"


def _short(number: float) -> str:
    powers = {2**31 - 1: "2³¹ - 1", -(2**63): "-2⁶³", 2**64 - 1: "2⁶⁴ - 1"}
    return powers.get(int(number)) or f"{number:g}"


def _embeddings() -> list[list[str]]:
    path = ROOT / "benchmarks/results/embeddings.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # Of several lines of a cell the last one counts.
    cells = {(line["task"], line["state"], line["pooling"]): line for line in lines}
    tasks = list(dict.fromkeys(task for task, _, _ in cells))
    rows = [["vectors of", *(f"`{task}`" for task in tasks)]]
    for state, pooling in dict.fromkeys((state, pooling) for _, state, pooling in cells):
        name = "the words themselves" if state == "words" else f"`{state}`, {pooling}"
        rows.append([name, *(f"{cells[task, state, pooling]['accuracy']:.2f}" for task in tasks)])
    chances = [next(line for key, line in cells.items() if key[0] == task) for task in tasks]
    return [*rows, ["chance", *(f"{line['chance']:.2f}" for line in chances)]]


def _numbers() -> list[list[str]]:
    return _told(NUMBERS)


def _highlights() -> list[list[str]]:
    return _told([line for line in NUMBERS if _is_highlight(line[0])])


def _is_highlight(wanted: Mapping[str, object]) -> bool:
    """Tell whether the README has a line, too."""
    kinds = {"decode": [1, 8], "mixture": ["delta"], "serve": [256], "cpu_decode": [1, 5]}
    of_kind = kinds.get(str(wanted["benchmark"]), [])
    told = wanted.get("merge") or wanted.get("requests") or wanted.get("rows")
    return told in of_kind and wanted.get("card") != "NVIDIA H200"


def _told(lines: Sequence[tuple[dict[str, object], str, str]]) -> list[list[str]]:
    """Return the newest result of each line."""
    results: list[dict[str, Any]] = []
    for path in sorted((ROOT / "benchmarks/results").glob("*.jsonl")):
        kept = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        # Other engines' lines stand beside ours, and are told as theirs.
        results += [{"engine": "mrss"} | line for line in kept]
    rows = [["what", "result", "machine", "command, commit"]]
    for wanted, what, result in lines:
        asked = {"engine": "mrss"} | wanted
        found = [line for line in results if asked.items() <= line.items()]
        if found:
            machine = found[-1].get("card") or found[-1]["cpu"]
            benchmark = str(wanted["benchmark"]) if asked["engine"] == "mrss" else "rivals"
            script = _SCRIPTS.get(benchmark, benchmark)
            command = f"`benchmarks/{script}.py`, {found[-1]['commit']}"
            rows.append([what.format(**found[-1]), result.format(**found[-1]), machine, command])
    return rows


# Whose script has another name than its lines.
_SCRIPTS = {"serve": "serve_gpu", "quantize gpu decode": "quantize_gpu"}
_USUAL: dict[str, object] = {"dtype": "fp16", "state_dtype": "fp32"}
_CARDS = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
_RWKV_CPU = "RWKV-7 0.1B (random weights)"
_STEPS = "{steps_per_s:.0f} steps/s (bytes alone allow {limit_per_s:.0f})"
_MIXED = "{steps_per_s:.0f} steps/s, {of_one_state:.2f} of one state's"
_MS = "{ms_per_step:.1f} ms a step (bytes alone: {limit_ms:.1f})"
_MIXED_MS = "{ms_per_step:.1f} ms a step, {ratio_to_1:.2f} x one row's"
NUMBERS: Sequence[tuple[dict[str, object], str, str]] = (
    *(
        (
            {"benchmark": "decode", "model": size, "rows": 1, "card": card, **_USUAL},
            f"RWKV-7 {size} fp16, one row",
            _STEPS,
        )
        for card in _CARDS
        for size in ("1.5b", "7.2b")
    ),
    *(
        (
            {"benchmark": "decode", "model": "1.5b", "rows": rows, "engine": "albatross"},
            f"Albatross (faster3a_2607) there, 1.5b fp16, rows: {rows}",
            "{steps_per_s:.0f} steps/s; ours has {mrss_ratio_fp32_state:.2f} x as many",
        )
        for rows in (1, 8, 32)
    ),
    *(
        (
            {"benchmark": "serve", "model": "1.5b", "requests": requests, "states": 1}
            | {"scope": "tokens delivered over HTTP"},
            f"1.5b over HTTP, streams: {requests}",
            "{tokens_per_s:,.0f} tokens/s, {of_graph:.2f} of the bare graph's",
        )
        for requests in (1, 32, 256)
    ),
    *(
        (
            {"benchmark": "mixture", "model": size, "states": 4, "requests": 1, "merge": merge}
            | {"card": card, **_USUAL},
            f"{size}, a request of 4 states, `{merge}`: {{rows}} rows",
            _MIXED,
        )
        for card in _CARDS
        for size in ("1.5b", "7.2b")
        for merge in ("linear", "delta")
    ),
    *(
        (
            {"benchmark": "quantize gpu decode", "kind": kind, "rows": 4, "is_written_out": False},
            f"1.5b, weights in {kind}, 4 rows",
            _STEPS,
        )
        for kind in ("int8", "int4")
    ),
    (
        {"benchmark": "tuning_gpu", "model": "1.5b", "form": "fused", "cell": "16x512"}
        | {"loss_on": "answer"},
        "1.5b, tuning a state, 16 x 512 tokens",
        "{tokens_per_s:,.0f} tokens/s",
    ),
    (
        {"benchmark": "prefill", "model": "1.5b", "cell": "8x1024"} | _USUAL,
        "1.5b, prompts of 8 x 1,024 tokens",
        "{tokens_per_s:,.0f} tokens/s (products alone allow {limit_per_s:,.0f})",
    ),
    (
        {"benchmark": "prefill", "model": "1.5b", "cell": "32+128"} | _USUAL,
        "1.5b, a step of 32 decoding rows and 128 prompt tokens",
        "{median_ms:.2f} ms, {decode_alone_ms:.2f} without the prompt",
    ),
    ({"benchmark": "cpu_decode", "model": _RWKV_CPU, "rows": 1}, "RWKV-7 0.1B, one row", _MS),
    ({"benchmark": "cpu_decode", "model": _RWKV_CPU, "rows": 4}, "the same, 4 rows", _MIXED_MS),
    ({"benchmark": "cpu_decode", "model": _RWKV_CPU, "rows": 5}, "the same, 5 rows", _MIXED_MS),
)


def modules() -> list[Path]:
    """Return our modules, relative to the root, packages' own files after their folder's."""
    folders = ("mrss_provider", "kernels/mrss_kernels")
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path.relative_to(ROOT) for path in found if path.read_text(encoding="utf-8").strip()]


def _modules() -> list[list[str]]:
    rows = [["module", "in its own words"]]
    for path in modules():
        words = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
        first = " ".join(words.split("\n\n")[0].split())
        rows.append([f"`{path}`", first.replace("|", r"\|")])
    return rows


TABLES: Mapping[str, Callable[[], list[list[str]]]] = {
    "settings": _settings,
    "parameters": _parameters,
    "routes": _routes,
    "keys": _keys,
    "inner_keys": _inner_keys,
    "embeddings": _embeddings,
    "schema_keywords": grammar_tables.keywords,
    "grammar_costs": grammar_tables.costs,
    "modules": _modules,
    "numbers": _numbers,
    "highlights": _highlights,
    "compatibility": conformance_table.compatibility,
    "compatibility_reasons": conformance_table.reasons,
    "evaluation": evaluation_tables.evaluation,
    "gates": evaluation_tables.gates,
    "gains": evaluation_tables.gains,
    "domains": evaluation_tables.domains,
    "domain_gains": evaluation_tables.domain_gains,
    "fading": evaluation_tables.fading,
    "seeds": evaluation_seeds_tables.seeds,
    "seed_conditions": evaluation_seeds_tables.seed_conditions,
    "seed_methods": evaluation_seeds_tables.seed_methods,
    "seed_states": evaluation_seeds_tables.seed_states,
    "seed_distance": evaluation_seeds_tables.seed_distance,
}


LIVING = ("modules", "numbers", "highlights")
"""Tables that are right when `make docs` has run, and not compared by the tests."""


def main() -> None:
    """Write every document anew."""
    with engine():
        for path in DOCUMENTS:
            path.write_text(rendered(path.read_text(encoding="utf-8"), everything=True))


if __name__ == "__main__":
    main()
