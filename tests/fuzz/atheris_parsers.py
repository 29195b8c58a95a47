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
from collections.abc import Iterable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mrss_provider"]):
    from targets import TARGETS

    from mrss_provider.errors import MRSSError

# Said to a process that it is the one to fuzz in.
_HERE = "--here"


def main(names: Iterable[str], options: list[str]) -> int:
    """Fuzz each parser in a process of its own, which atheris ends without cleaning up.

    Returns:
        0, or the exit status of the first process in which a defect was found.
    """
    for name in names:
        sys.stderr.write(f"== {name}\n")
        with tempfile.TemporaryDirectory(prefix="mrss-fuzz-") as folder:
            command = [sys.executable, __file__, _HERE, name, *options, folder]
            if code := subprocess.run(command, check=False).returncode:
                return code
    return 0


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz one parser until an option says that it is enough, or a defect is found.

    Args:
        name: of the target.
        arguments: libFuzzer's options, and at last a folder for the inputs.
    """
    logging.disable()
    target = TARGETS[name]

    def run(data: bytes) -> None:
        try:
            target.run(data)
        except MRSSError:
            return

    for number, seed in enumerate(target.seeds):
        (Path(arguments[-1]) / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *arguments], run)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == [_HERE]:
        fuzz(sys.argv[2], sys.argv[3:])
    elif len(sys.argv) < 2 or sys.argv[1] not in {"all", *TARGETS}:
        sys.exit(f"which parser? all, {', '.join(TARGETS)}")
    else:
        sys.exit(main(TARGETS if sys.argv[1] == "all" else sys.argv[1:2], sys.argv[2:]))
