"""The whole proof in one go: a second base, the states of three seeds on both, their evaluations.

    python -m models.demo.evidence --work build/evidence --out build/results    # one large GPU
    python -m models.demo.evidence --work build/small --out build/small/results --rehearse

The two bases go side by side: the bundled one is tuned on while the second one is trained. Every
part is a command of its own that goes on where it stopped, and so does this one. What is finished
when the time is over is in `--out`, in eight files: an archive a part, and what they said.

The exit status is 0 if all parts have finished and what docs/evaluation.md claims holds of them, 1
if a part has not, and 3 if a claim does not hold; of a rehearsal none is asked.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from models.demo.evidence_claims import broken_claims
from mrss_provider.config import DEMO_MODEL

SEEDS = ("1", "2", "3")

UNFINISHED = 1
BROKEN = 3
_STOP_S = 8.0
"""Before the end: to leave off, and to write the archives."""

_EVALUATION_S = 130.0
"""Left for an evaluation: tuning ends before, and what is tuned by then is evaluated."""

_TRAINING = ("--batch", "64", "--rate", "1.6e-3", "--workers", "6")
_SMALL_TRAINING = ("--batch", "2", "--length", "64", "--workers", "1")
_SMALL_TUNING = ("--steps", "2", "--batch", "4", "--held-out", "2")


@dataclass
class Show:
    """What all parts share.

    Attributes:
        work: folder of everything that is made.
        out: folder of the archives.
        device: to compute on.
        ends: by the monotonic clock, in seconds.
        is_small: only to see that it runs.
        log: of all commands.
        unfinished: titles of the parts that did not end well.
        lock: held while an archive or a line of the log is written.
    """

    work: Path
    out: Path
    device: str
    ends: float
    is_small: bool
    log: Path
    unfinished: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, text: str) -> None:
        """Print and write down one line."""
        with self.lock:
            print(text, flush=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def run(self, title: str, *command: str | Path, spare: float = 0.0) -> bool:
        """Run a command of this project; return whether it ended well.

        It is ended when the time is over, or so many `spare` seconds before.
        """
        left = self.ends - spare - time.monotonic()
        if left <= 0:
            self.tell(f"{title}: no time left")
            return False
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        timer = threading.Timer(left, _end, [process])
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            self.tell(f"{title}: {line.rstrip()}")
        code = process.wait()
        timer.cancel()
        self.tell(f"{title}: ended with {code} after {time.monotonic() - began:.0f} s")
        return code == 0

    def keep(self, name: str, folder: Path) -> None:
        """Put what a part has made so far into an archive, in place of the last one."""
        with self.lock:
            partial = self.out / f".{name}.partial"
            with tarfile.open(partial, "w:gz", compresslevel=1) as archive:
                for path in sorted(folder.rglob("*")):
                    if path.is_file() and path.suffix not in (".partial", ".unfinished"):
                        archive.add(path, path.relative_to(self.work))
            partial.replace(self.out / f"{name}.tar.gz")


def main() -> int:
    """Parse the command line, run both tracks, keep what they made; return the exit status."""
    parser = _parser()
    args = parser.parse_args()
    for folder in (args.work, args.out):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            parser.error(f"no folder can be made at {folder}: {exc.strerror}")
    ends = time.monotonic() + args.seconds - _STOP_S
    show = Show(args.work, args.out, args.device, ends, args.rehearse, args.out / "log.txt")
    second = args.work / "base-1"
    with ThreadPoolExecutor(2) as tracks:
        ends_of = [
            tracks.submit(_measure, show, 0, DEMO_MODEL),
            tracks.submit(_train_and_measure, show, second, args.train_seconds),
        ]
    for end in ends_of:
        end.result()
    return _judge(show)


def _judge(show: Show) -> int:
    """Say what became of all parts, and of the claims; return the exit status."""
    if show.unfinished:
        titles = ", ".join(sorted(show.unfinished))
        show.tell(f"not finished: {titles}; the same command goes on with them")
        return UNFINISHED
    if show.is_small:
        show.tell("all parts have finished; a rehearsal bears out no claim")
        return 0
    broken = broken_claims(show.work, SEEDS)
    for text in broken:
        show.tell(f"a claim does not hold: {text}")
    if broken:
        return BROKEN
    show.tell("all parts have finished, and every claim holds")
    return 0


def _train_and_measure(show: Show, model: Path, seconds: float) -> None:
    if not (model / "model.safetensors").exists():
        sizes = _SMALL_TRAINING if show.is_small else _TRAINING
        length = ("--seconds", f"{seconds:g}", "--seed", "1", "--device", show.device)
        if not show.run("base 1", "models.demo.train", "--out", model, *length, *sizes):
            show.unfinished.append("base 1")
            return
    shutil.copy(DEMO_MODEL / "card.toml", model)
    show.keep("base-1", model)
    _measure(show, 1, model)


def _measure(show: Show, number: int, model: Path) -> None:
    """Tune the states of all seeds on a base, and evaluate them."""
    pairs = show.work / f"pairs-{number}"
    _tune(show, number, model, pairs)
    show.keep(f"pairs-{number}", pairs)
    _evaluate(show, f"evaluation-{number}", model, pairs, "knowledge")
    _evaluate(show, f"evaluation-plain-{number}", model, pairs, "knowledge-plain")


def _evaluate(show: Show, name: str, model: Path, pairs: Path, knowledge: str) -> None:
    size = ("--quick", "--samples", "1") if show.is_small else ("--samples", "4")
    found = show.work / name
    is_done = show.run(
        name,
        *("models.demo.evaluate_pairs", "--model", model, "--pairs", pairs, "--out", found),
        *("--device", show.device, "--max-rows", "384", "--jobs", str(len(SEEDS))),
        *("--knowledge", knowledge, "--seeds", *SEEDS, *size),
    )
    if not is_done:
        show.unfinished.append(name)
    if found.is_dir():
        show.keep(name, found)


def _tune(show: Show, number: int, model: Path, pairs: Path) -> None:
    jobs = ("--jobs", "1" if show.is_small else "3")
    sizes = _SMALL_TUNING if show.is_small else ()
    command: Sequence[str | Path] = (
        *("models.demo.pairs", "--model", model, "--out", pairs),
        *("--device", show.device, "--seeds", *SEEDS, *jobs, *sizes),
    )
    title = f"states {number}"
    is_done = show.run(title, *command, spare=_EVALUATION_S)
    if not is_done and show.device == "cuda":
        # Without fla's kernels: slower, with more memory, and nothing that could fail in them.
        slow = ("--dtype", "fp32", "--jobs", "2")
        is_done = show.run(f"{title}, fp32", *command, *slow, spare=_EVALUATION_S)
    if not is_done:
        show.unfinished.append(title)


def _end(process: subprocess.Popen[str]) -> None:
    """End a command and all that it started: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S / 4)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make the evidence of docs/evaluation.md.")
    parser.add_argument("--work", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--seconds", type=float, default=560.0, help="of all of it, at most")
    parser.add_argument("--train-seconds", type=float, default=220.0, help="of the second base")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rehearse", action="store_true", help="in small, to see that it runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
