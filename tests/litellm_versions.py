"""The provider's tests on the oldest LiteLLM that we support and on the newest that installs.

`make test-litellm` runs this: an environment of its own for each, one after the other, in
build/litellm. The result is one line a version.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/litellm"
# A build of torch takes long to fetch, and has nothing to do with LiteLLM.
PINNED = ("torch", "triton", "fla-core")


def oldest() -> str:
    """Return the lower bound of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = [re.match(r"litellm\[proxy\]>=([\d.]+)", one) for one in project["dependencies"]]
    return next(found[1] for found in bounds if found)


def constraints() -> Path:
    """Write the lines of constraints.txt that hold here too."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("==")[0] in PINNED]
    path = FOLDER / "constraints.txt"
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return path


def run(name: str, wanted: str, paths: Sequence[str]) -> bool:
    """Install `wanted` beside the package, run the tests, print a line, and say if they pass."""
    folder = FOLDER / name
    if not (folder / "bin/python").exists():
        venv.create(folder, with_pip=True)
    python = str(folder / "bin/python")
    install = [python, "-m", "pip", "install", "-q", "--upgrade", "-c", str(constraints())]
    subprocess.run([*install, "-e", ".[test]", wanted], cwd=ROOT, check=True)
    told = "import importlib.metadata as m; print(m.version('litellm'))"
    version = subprocess.run([python, "-c", told], capture_output=True, text=True, check=True)
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    result = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, check=False)
    last = result.stdout.strip().splitlines()[-1]
    sys.stdout.write(f"litellm {version.stdout.strip()} ({name}): {last}\n")
    if result.returncode:
        sys.stdout.write(result.stdout)
    return result.returncode == 0


def main() -> None:
    """Run both, and exit with 1 where one fails."""
    paths = sys.argv[1:] or ["tests/provider", "tests/proxy"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    versions = {"oldest": f"litellm[proxy]=={oldest()}", "newest": "litellm[proxy]"}
    passed = [run(name, wanted, paths) for name, wanted in versions.items()]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
