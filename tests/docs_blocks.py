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

import evaluation_tables
from command import mrss

from mrss_provider.cli.options import field_help
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.openai_schema import CHAT_KEYS, COMPLETION_KEYS

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


def _numbers() -> list[list[str]]:
    """Return the newest result of each line that the README tells."""
    results: list[dict[str, Any]] = []
    for path in sorted((ROOT / "benchmarks/results").glob("*.jsonl")):
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        # Other engines' lines stand beside ours.
        results += [line for line in lines if line.get("engine", "mrss") == "mrss"]
    rows = [["what", "result", "machine", "command, commit"]]
    for wanted, what, result in NUMBERS:
        found = [line for line in results if wanted.items() <= line.items()]
        if found:
            machine = found[-1].get("card") or found[-1]["cpu"]
            command = f"`benchmarks/{wanted['benchmark']}.py`, {found[-1]['commit']}"
            rows.append([what.format(**found[-1]), result.format(**found[-1]), machine, command])
    return rows


_USUAL: dict[str, object] = {"dtype": "fp16", "state_dtype": "fp32"}
_RWKV_CPU = "RWKV-7 0.1B (random weights)"
_STEPS = "{steps_per_s:.0f} steps/s (bytes alone allow {limit_per_s:.0f})"
_MIXED = "{steps_per_s:.0f} steps/s, {of_one_state:.2f} of one state's"
_MS = "{ms_per_step:.1f} ms a step (bytes alone: {limit_ms:.1f})"
_MIXED_MS = "{ms_per_step:.1f} ms a step, {ratio_to_1:.2f} x one row's"
NUMBERS: Sequence[tuple[dict[str, object], str, str]] = (
    *(
        (
            {"benchmark": "decode", "model": size, "rows": 1, **_USUAL},
            f"RWKV-7 {size} fp16, one row",
            _STEPS,
        )
        for size in ("1.5b", "7.2b")
    ),
    *(
        (
            {"benchmark": "mixture", "model": size, "states": 4, "requests": 1, "merge": merge}
            | _USUAL,
            f"{size}, a request of 4 states, `{merge}`: {{rows}} rows",
            _MIXED,
        )
        for size in ("1.5b", "7.2b")
        for merge in ("linear", "delta")
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
    "modules": _modules,
    "numbers": _numbers,
    "gates": evaluation_tables.gates,
    "gains": evaluation_tables.gains,
    "domains": evaluation_tables.domains,
    "domain_gains": evaluation_tables.domain_gains,
}


LIVING = ("modules", "numbers")
"""Tables that are right when `make docs` has run, and not compared by the tests."""


def main() -> None:
    """Write every document anew."""
    with engine():
        for path in DOCUMENTS:
            path.write_text(rendered(path.read_text(encoding="utf-8"), everything=True))


if __name__ == "__main__":
    main()
