"""Folder: a comparison on disk. What was asked for, the prompts, and what has come so far.

`run.json`, `prompts.jsonl` (a copy), `results.jsonl`, `judgements.jsonl`, `votes.jsonl`,
`summary.json`, `report.html`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mrss_provider.compare.calls import Result
from mrss_provider.compare.jsonl import read_lines
from mrss_provider.compare.prompts import PromptFile, read_prompts
from mrss_provider.errors import ConflictError, FileFormatError
from mrss_provider.replacing import replace_file

VERSION = 1

_MADE = ("results.jsonl", "judgements.jsonl", "votes.jsonl", "summary.json", "report.html")


@dataclass(frozen=True)
class Settings:
    """What a comparison is of. Going on with another is refused.

    Attributes:
        models: names, in the order of tables.
        seeds: of the answers; each prompt is answered once with each.
        params: of every request.
        base_url: of the server; None is LiteLLM's SDK.
        prompts_sha256: of the prompt file.
        version: of the files' form.
    """

    models: tuple[str, ...]
    seeds: tuple[int, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    base_url: str | None = None
    prompts_sha256: str = ""
    version: int = VERSION


class Folder:
    """The files of one comparison.

    Attributes:
        path: the folder.
        settings: what it is of.
        prompts: that are asked.
    """

    def __init__(self, path: Path, settings: Settings, prompts: PromptFile) -> None:
        self.path = path
        self.settings = settings
        self.prompts = prompts

    @property
    def results(self) -> Path:
        """One line a cell."""
        return self.path / "results.jsonl"

    @property
    def judgements(self) -> Path:
        """One line for each time that a judge was asked."""
        return self.path / "judgements.jsonl"

    @property
    def votes(self) -> Path:
        """One line a vote."""
        return self.path / "votes.jsonl"

    @classmethod
    def begin(cls, path: Path, settings: Settings, prompt_file: Path) -> Folder:
        """Make the folder of a comparison, or find the one that it can go on with.

        Raises:
            ConflictError: the folder is of another comparison; the message says in what. Or it has
                files of somebody else's by our names.
            FileFormatError: it is of none.
            OSError: it cannot be written.
        """
        if (path / "run.json").exists():
            found = cls.open(path)
            for name, was, wanted in _differences(found.settings, settings):
                raise ConflictError(
                    f"{path} holds a comparison whose {name} {was}, now {wanted}; choose another "
                    "--out, or ask for the same again to go on with it"
                )
            return found
        prompts = prompt_file.read_bytes()
        _check_foreign(path, prompts)
        path.mkdir(parents=True, exist_ok=True)
        # In part, it would look like somebody else's.
        replace_file(path / "prompts.jsonl", prompts)
        write_whole(path / "run.json", json.dumps(asdict(settings), indent=2) + "\n")
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Read the folder of a comparison.

        Raises:
            FileFormatError: it is none, or its prompts were changed.
        """
        try:
            raw = json.loads((path / "run.json").read_text(encoding="utf-8"))
            known = {f.name for f in fields(Settings)}
            values = {key: raw[key] for key in known}
            settings = Settings(
                **{**values, "models": tuple(raw["models"]), "seeds": tuple(raw["seeds"])}
            )
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise FileFormatError(
                f"{path} holds no comparison; `mrss compare --out {path}` makes one"
            ) from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise FileFormatError(f"{path / 'run.json'} is not what mrss compare writes") from exc
        prompts = read_prompts(path / "prompts.jsonl")
        if prompts.sha256 != settings.prompts_sha256:
            raise FileFormatError(
                f"{path / 'prompts.jsonl'} was changed since the comparison began; its results "
                "are answers to other prompts"
            )
        return cls(path, settings, prompts)

    def read_results(self) -> list[Result]:
        """Return what has come, in the order in which it came; of a cell's lines the last counts.

        Raises:
            FileFormatError: a line that is no result of this comparison.
        """
        found: dict[tuple[str, str, int], Result] = {}
        ids = {prompt.id for prompt in self.prompts.prompts}
        for number, line in read_lines(self.results):
            try:
                result = Result.from_dict(line)
            except TypeError as exc:
                raise FileFormatError(f"{self.results}, line {number}: no result: {exc}") from exc
            known = result.prompt in ids and result.model in self.settings.models
            if not known or result.seed not in self.settings.seeds:
                raise FileFormatError(
                    f"{self.results}, line {number}: a result of another comparison"
                )
            found.pop(result.key, None)
            found[result.key] = result
        return list(found.values())


def _check_foreign(path: Path, prompts: bytes) -> None:
    """Refuse to write over what no comparison has written."""
    copy = path / "prompts.jsonl"
    others = [name for name in _MADE if (path / name).exists()]
    # A run that was killed at once has copied its prompts, and nothing else.
    if copy.exists() and not (copy.is_file() and copy.read_bytes() == prompts):
        others.append(copy.name)
    if others:
        raise ConflictError(
            f"{path} holds no comparison, and has {others[0]}, which would be written over; choose "
            "another --out"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    replace_file(path, text.encode(errors="replace"))


def _differences(found: Settings, wanted: Settings) -> Iterable[tuple[str, str, str]]:
    """Yield what differs, as words: name, what was, what is wanted."""
    if found.prompts_sha256 != wanted.prompts_sha256:
        was, now = found.prompts_sha256[:8], wanted.prompts_sha256[:8]
        yield "prompt file", f"was another (sha256 {was}...)", f"{now}..."
    for name in ("models", "seeds", "params", "base_url", "version"):
        was, now = getattr(found, name), getattr(wanted, name)
        if was != now:
            yield name.replace("_", "-"), f"were {_words(was)}", _words(now)


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return json.dumps(value)
