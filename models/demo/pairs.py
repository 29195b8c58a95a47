"""Tune all that an evaluation over tuning seeds compares, for one base model.

    python -m models.demo.pairs --model models/demo --out build/pairs --seeds 1 2 3
    mrss evaluate --pair build/pairs/pair-1 --baselines build/pairs/baselines-1 ...

Writes `pair-N/` (the states `knowledge` and `tone` of seed N, and the former without locality as
`knowledge-plain`), `baselines-N/` (one-row states of the same data) and `losses.json`. The same
command goes on after a kill. Nothing is chosen by a question of the evaluation: rates are chosen by
held-out chats, and no seed is left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path

import torch

from models.demo.pair_data import KINDS, Kind
from models.demo.pair_states import Work, do
from mrss_provider.errors import MRSSError
from mrss_provider.evaluate.workers import workers


def main() -> None:
    """Parse the command line, tune what is not there yet, print the table."""
    args = _parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in KINDS if args.kinds is None or kind.name in args.kinds]
    failed = 0
    try:
        # What goes on from another state waits for it.
        for round_ in ([k for k in kinds if not k.after], [k for k in kinds if k.after]):
            failed += _do_all([one for kind in round_ for one in _works(args, kind)], args.jobs)
    except KeyboardInterrupt as exc:
        raise SystemExit("left off; the same command goes on") from exc
    table = _table(args.out)
    (args.out / "losses.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(f"{failed} of the states failed; the same command tries them again")


def _works(args: argparse.Namespace, kind: Kind) -> list[Work]:
    """Return the parts of the work: all seeds side by side on CUDA, one by one on CPU cores."""
    together = args.device == "cuda" and not kind.is_held
    groups = [tuple(args.seeds)] if together else [(seed,) for seed in args.seeds]
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    return [
        Work(
            model=args.model,
            out=args.out,
            kind=kind.name,
            seeds=seeds,
            steps=args.steps,
            batch_size=args.batch,
            num_held_out=args.held_out,
            device=args.device,
            dtype=dtype,
        )
        for seeds in groups
    ]


def _do_all(works: Sequence[Work], jobs: int) -> int:
    """Do what is not done yet, in so many processes at once, and say what it came to.

    Returns:
        How many failed; the others are done none the less.
    """
    left = [replace(work, seeds=seeds) for work in works if (seeds := work.seeds_left)]
    if jobs == 1:
        return sum(not _show(functools.partial(_do_alone, work)) for work in left)
    with workers(jobs) as on:
        tasks = [on.submit(_do_alone, work) for work in left]
        return sum(not _show(task.result) for task in as_completed(tasks))


def _do_alone(work: Work) -> list[Path]:
    """Do one part on one thread."""
    torch.set_num_threads(1)
    return do(work)


def _show(result: Callable[[], list[Path]]) -> bool:
    """Print the lines of states that are done, or why they failed; return whether they are done."""
    try:
        paths = result()
    except MRSSError as exc:
        print(f"error: {exc}", flush=True)
        return False
    except Exception:
        traceback.print_exc()
        return False
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        (state,) = found["states"]
        print(
            f"{state['state']:<19} seed {state['seed']}  rate {state['rate']:<5} held out: "
            f"facts {state['facts']:.3f}  voice {state['voice']:.3f}  facts in the voice "
            f"{state['joint']:.3f}; {found['tokens']} tokens, {found['seconds']:.0f} s in all",
            flush=True,
        )
    return True


def _table(out: Path) -> list[dict[str, object]]:
    """Return the lines of all states that are finished."""
    found: list[dict[str, object]] = []
    for kind in KINDS:
        for path in sorted((out / "losses").glob(f"{kind.name}-[0-9]*.json")):
            found += json.loads(path.read_text(encoding="utf-8"))["states"]
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tune pairs of states and their baselines.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kinds", nargs="+", choices=[kind.name for kind in KINDS])
    parser.add_argument("--steps", type=int, default=600, help="of a state that learns facts")
    parser.add_argument("--batch", type=int, default=20, help="chats a step and rate")
    parser.add_argument("--held-out", type=int, default=48, help="chats to judge by, a source")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="bf16 on CUDA, else fp32")
    return parser


if __name__ == "__main__":
    main()
