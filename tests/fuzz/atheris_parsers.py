"""Fuzz one parser with atheris, which follows the branches that inputs take.

    python tests/fuzz/atheris_parsers.py bodies -max_total_time=60
    python tests/fuzz/atheris_parsers.py all -max_total_time=60

libFuzzer's options may follow the name, or `all`, which runs one parser after the other for that
time each; an input that meets a defect is written to the current folder.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mrss_provider"]):
    from targets import TARGETS

    from mrss_provider.errors import MRSSError


def main(name: str, options: list[str]) -> None:
    """Run until an option says that it is enough, or a defect is found."""
    logging.disable()
    target = TARGETS[name]

    def run(data: bytes) -> None:
        try:
            target.run(data)
        except MRSSError:
            return

    with tempfile.TemporaryDirectory(prefix="mrss-fuzz-") as folder:
        for number, seed in enumerate(target.seeds):
            (Path(folder) / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *options, folder], run)
        atheris.Fuzz()


def main_of_all(options: list[str]) -> None:
    """Fuzz every parser, each in a process of its own: atheris ends the one that it runs in."""
    for name in TARGETS:
        sys.stderr.write(f"== {name}\n")
        subprocess.run([sys.executable, __file__, name, *options], check=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in {"all", *TARGETS}:
        sys.exit(f"which parser? all, {', '.join(TARGETS)}")
    if sys.argv[1] == "all":
        main_of_all(sys.argv[2:])
    else:
        main(sys.argv[1], sys.argv[2:])
