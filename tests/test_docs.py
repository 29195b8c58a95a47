"""The documents tell the truth: what they show is what happens, and what they point at exists."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_blocks import DOCUMENTS, ROOT, answer_blocks, engine, modules, rendered, run

from mrss_provider.backend import MixtureOptions
from mrss_provider.cli import proxy_config
from mrss_provider.cli.states import read_config
from mrss_provider.config import BUNDLED_STATES, DEMO_MODEL, EngineConfig, ServerConfig
from mrss_provider.engine.state_library import StateLibrary

README = ROOT / "README.md"
OPERATIONS = ROOT / "docs/operations.md"
IDS = [path.name for path in DOCUMENTS]


def blocks(path: Path, language: str) -> list[str]:
    """Return a document's code blocks of one language."""
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def _engine() -> Iterator[None]:
    with engine():
        yield


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_commands_print_what_the_document_shows(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    again = rendered(text, everything=False)
    assert again.splitlines() == text.splitlines(), "make docs writes the documents anew"


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_answers_have_the_form_that_the_document_shows(path: Path) -> None:
    for command, lines in answer_blocks(path.read_text(encoding="utf-8")):
        shown = run(command).splitlines()
        assert len(shown) == len(lines), command
        assert all(bool(a) == bool(b) for a, b in zip(shown, lines, strict=True)), command


@pytest.mark.usefixtures("_engine")
def test_the_readmes_python_prints_an_answer() -> None:
    (code,) = blocks(README, "python")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_readmes_configuration_is_one_that_litellm_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_config, "_import_problems", list)
    path = tmp_path / "config.yaml"
    path.write_text(*blocks(README, "yaml"))
    assert proxy_config.examine(path) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text)
    inside = [target for target in targets if not target.startswith(("http://", "https://"))]
    assert [target for target in inside if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_files_named_in_backticks_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    roots = r"(?:docs|kernels|mrss_provider|benchmarks|tests|states|models|\.ci)"
    named = re.findall(rf"`({roots}/[\w./-]*\w)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_documents_named_in_the_proxys_configuration_exist() -> None:
    named = re.findall(r"docs/[\w.-]+\w", (ROOT / "proxy_config.yaml").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_variable_is_documented_and_every_documented_one_exists() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "mrss_provider", "kernels", "Makefile", "proxy_config.yaml", "deploy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    files = [path for path in map(ROOT.joinpath, listed) if path.suffix in {".py", "", ".yaml"}]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    # A variable stands alone in quotes or in prose; MRSS_KEYS is a name of Python.
    used = set(re.findall(r"(?<![\w{])MRSS_[A-Z_]*[A-Z]\b", code)) - {"MRSS_KEYS"}
    fields = [*EngineConfig.__dataclass_fields__, *ServerConfig.__dataclass_fields__]
    used |= {f"MRSS_{name.upper()}" for name in fields}
    documents = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert used - set(re.findall(r"MRSS_\w+", OPERATIONS.read_text(encoding="utf-8"))) == set()
    assert set(re.findall(r"MRSS_\w*\w", documents)) - used == set()


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\S+\.py)` \|", text, re.MULTILINE)
    assert named == [str(path) for path in modules()], "make docs writes the table anew"


def test_make_targets_named_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8")))
        assert named - targets == set(), path.name


def test_the_mixtures_of_the_documents_resolve() -> None:
    library = StateLibrary(BUNDLED_STATES, read_config(DEMO_MODEL))
    text = (ROOT / "docs/mixtures.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `mrss/([^`]+)` \|", text, re.MULTILINE)
    assert len(names) >= 8
    for name in names:
        assert library.resolve(name, MixtureOptions()).rows >= 1
    (spelled,) = re.findall(r"`mrss/(\S+)` comes back as\n`(\S+)`", text)
    assert library.resolve(spelled[0]).canonical == spelled[1]


def test_the_documents_speak_of_the_project_alone() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert re.search(r"/work/|/tmp/|/root/", text) is None, path.name
        assert os.sep + "home" + os.sep not in text, path.name
