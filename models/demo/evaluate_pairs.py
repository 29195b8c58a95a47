"""`mrss evaluate` of the pairs and baselines that `models.demo.pairs` made.

    python -m models.demo.evaluate_pairs --pairs build/pairs --out build/evaluation

The same work as the command's, by the same functions, for machines without its command line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mrss_provider.cli.evaluate import evaluate
from mrss_provider.cli.output import CommandError
from mrss_provider.config import EngineConfig
from mrss_provider.errors import MRSSError


def main() -> None:
    """Parse the command line, evaluate."""
    args = _parser().parse_args()
    config = EngineConfig(model=args.model, device=args.device, max_rows=args.max_rows)
    # They are of the data and the recipe of `knowledge`.
    has_baselines = args.knowledge == "knowledge"
    baselines = [args.pairs / f"baselines-{seed}" for seed in args.seeds if has_baselines]
    try:
        evaluate(
            config,
            knowledge=args.knowledge,
            tone="tone",
            pairs=[args.pairs / f"pair-{seed}" for seed in args.seeds],
            baselines=baselines,
            data=None,
            voice=None,
            samples=args.samples,
            seed=None,
            is_quick=args.quick,
            jobs=args.jobs,
            out=args.out,
            as_json=False,
        )
    except (MRSSError, CommandError) as exc:
        raise SystemExit(f"error: {exc}") from exc


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate the pairs of a folder.")
    parser.add_argument("--model", type=Path, default=EngineConfig.model)
    parser.add_argument("--pairs", type=Path, required=True, help="a folder of models.demo.pairs")
    parser.add_argument("--knowledge", default="knowledge", help="or knowledge-plain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--samples", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="pairs at once, a process each")
    parser.add_argument("--max-rows", type=int, default=EngineConfig.max_rows)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the report")
    return parser


if __name__ == "__main__":
    main()
