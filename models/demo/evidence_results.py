"""Gather what `models.demo.evidence` made into one file of results, for the tables of the docs.

    python -m models.demo.evidence_results --work build/evidence --never build/evidence \
        --turn build/evidence-turn --device "NVIDIA H100" --commit 0123456 \
        --out benchmarks/results/evaluation_seeds.json

Nothing is left out but the answers side by side, which `report.html` shows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

_RUNS = {
    "first base": "evaluation-0",
    "second base": "evaluation-1",
    "first base, no locality": "evaluation-plain-0",
    "second base, no locality": "evaluation-plain-1",
}
_STATES = {"first base": "pairs-0", "second base": "pairs-1"}


def gathered(work: Path, distances: Mapping[str, Path], commit: str, device: str) -> dict[str, Any]:
    """Return the results of a folder that `models.demo.evidence` wrote.

    Args:
        work: its `--work`.
        distances: for each way of `reinject` the folder of a run under it, of which only the
            distances are read.
        commit: that it ran from.
        device: that it ran on.

    Raises:
        FileNotFoundError: a part is not finished.
    """
    with safe_open(work / "base-1/model.safetensors", "pt") as file:
        training = json.loads(file.metadata()["training"])
    return {
        "command": "python -m models.demo.evidence",
        "commit": commit,
        "device": device,
        "second_base": training,
        "states": {title: _losses(work / folder) for title, folder in _STATES.items()},
        "runs": {title: _report(work / folder) for title, folder in _RUNS.items()},
        "distance": {
            way: {
                title: [pair["distance"] for pair in _report(folder / _RUNS[title])["pairs"]]
                for title in _STATES
            }
            for way, folder in distances.items()
        },
    }


def _report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for pair in report["pairs"]:
        del pair["samples"]
    return report


def _losses(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Parse the command line, write the file."""
    parser = argparse.ArgumentParser(description="Gather the evidence's results.")
    parser.add_argument("--work", type=Path, required=True, help="of models.demo.evidence")
    parser.add_argument("--never", type=Path, required=True, help="a run without reinjection")
    parser.add_argument("--turn", type=Path, required=True, help="a run with it at every turn")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--device", required=True, help="that it ran on")
    parser.add_argument("--out", type=Path, required=True, help="a .json to write")
    args = parser.parse_args()
    distances = {"never": args.never, "turn": args.turn}
    found = gathered(args.work, distances, args.commit, args.device)
    args.out.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
