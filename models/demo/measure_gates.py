"""Every gate under every merge rule: on home facts that no gate was trained on.

    python -m models.demo.measure_gates --out benchmarks/results/gates.json

The fixed weights called `best` are chosen, like the learned gate, on the other half of the facts.
With `--domains FOLDER` it measures two states of knowledge beside the voice instead, see
`tune_domains`. Both add to a file that is there. Some fifteen minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.demo.answers import DECODINGS, Bench, System, mixed, single
from models.demo.measure import PARTS, Question, ask, open_bench, questions, toned_texts
from models.demo.train_gate import HELD_OUT_FACTS, LEARNT_FACTS, NAME, VOICE
from models.demo.tune_domains import DOMAINS
from mrss_provider.config import EngineConfig
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.evaluate.world import Fact, Score
from mrss_provider.tune.gate_report import bootstrap

MERGES = ("linear", "geometric", "power", "product", "delta")
GATES = ("fixed", "confidence", "novelty", f"learned:{NAME}")
ROUTED = ("confidence", "novelty", f"learned:{NAME}")

RATIOS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
"""What the weaker state may weigh beside the stronger one."""

CHOOSING_SAMPLES = 4

GREEDY_SAMPLES = 4
"""Questions a fact for greedy answers, which differ by the question's phrasing only."""


@dataclass(frozen=True)
class Measured:
    """A system's answers and texts as numbers, in the order of the questions and texts.

    Attributes:
        scores: decoding -> one score an answer.
        nats: [M] of the answers' tokens in toned texts.
        fact_of: [M] which fact each is about.
        is_fact: [M] whether the token states it.
    """

    scores: Mapping[str, Sequence[Score]]
    nats: Tensor
    fact_of: Tensor
    is_fact: Tensor


class Table:
    """Measures systems on the same questions and texts about some facts."""

    def __init__(self, bench: Bench, facts: Sequence[Fact], samples: int, seed: int) -> None:
        self.bench = bench
        self.facts = facts
        self.seed = seed
        self.docs = toned_texts(facts, VOICE, seed=seed)
        asked = questions(samples, seed=seed, facts=facts)
        few = questions(GREEDY_SAMPLES, seed=seed, facts=facts)
        self.asked = {d.name: asked if d.temperature else few for d in DECODINGS}

    def measure(self, system: System) -> Measured:
        """Answer every question under every decoding, and score the toned texts."""
        scores = {}
        for decoding in DECODINGS:
            asked = self.asked[decoding.name]
            scores[decoding.name], _ = ask(
                self.bench, system, decoding, asked, voice=VOICE, seed=self.seed
            )
        nats, document, is_fact = self.bench.nll(system, self.docs)
        fact_of = document // (len(self.docs) // len(self.facts))
        return Measured(scores, nats, fact_of, is_fact)

    def row(self, found: Measured) -> dict[str, object]:
        """Return shares and nats, each with its 95 % interval over facts."""
        row: dict[str, object] = {}
        for name, scores in found.scores.items():
            index = self._fact_index(self.asked[name])
            row[name] = {part: self._interval(_flags(scores, part), index) for part in PARTS}
        for name, chosen in (("nll_fact", found.is_fact), ("nll_other", ~found.is_fact)):
            row[name] = self._interval(found.nats[chosen], found.fact_of[chosen])
        row["nll"] = self._interval(found.nats, found.fact_of)
        return row

    def difference(self, one: Measured, other: Measured) -> dict[str, list[float]]:
        """Return how much more of `both` `one` has, and how many nats less, with intervals."""
        out = {}
        for name, scores in one.scores.items():
            gain = _flags(scores, "both") - _flags(other.scores[name], "both")
            out[name] = self._interval(gain, self._fact_index(self.asked[name]))
        out["nll"] = self._interval(other.nats - one.nats, one.fact_of)
        return out

    def _fact_index(self, asked: Sequence[Question]) -> Tensor:
        return torch.tensor([self.facts.index(q.fact) for q in asked])

    def _interval(self, values: Tensor, fact_of: Tensor) -> list[float]:
        found = bootstrap(values, fact_of, seed=self.seed)
        return [round(value, 4) for value in (found.mean, found.low, found.high)]


def _flags(scores: Sequence[Score], part: str) -> Tensor:
    return torch.tensor([float(getattr(score, part)) for score in scores], dtype=torch.float64)


def fixed_names(merge: str) -> Iterator[str]:
    """Yield mixtures of fixed weights, from little knowledge to much."""
    for ratio in RATIOS:
        yield f"knowledge:{ratio}+tone~{merge}~fixed"
    for ratio in reversed(RATIOS[:-1]):
        yield f"knowledge+tone:{ratio}~{merge}~fixed"


def best_fixed(table: Table, library: StateLibrary, merge: str) -> dict[str, str]:
    """Return the fixed weights with the most `both` at T=1, and those with the least nats."""
    both, nats = {}, {}
    for name in fixed_names(merge):
        system = mixed(library.resolve(name))
        decoding = DECODINGS[0]
        asked = table.asked[decoding.name]
        scores, _ = ask(table.bench, system, decoding, asked, voice=VOICE, seed=table.seed)
        both[name] = statistics.fmean(score.both for score in scores)
        nats[name] = float(table.bench.nll(system, table.docs)[0].mean())
    return {
        "best by both": max(both, key=lambda name: both[name]),
        "best by nll": min(nats, key=lambda name: nats[name]),
    }


def measure_alone(table: Table) -> dict[str, object]:
    """Measure the base and each state alone."""
    return {name: table.row(table.measure(single(name))) for name in ("base", "knowledge", "tone")}


def measure_merge(
    table: Table, dev: Table, library: StateLibrary, merge: str
) -> tuple[dict[str, object], dict[str, object]]:
    """Measure a merge rule with every gate.

    Returns:
        rows by title, and what the learned gate gains over others.
    """
    if merge == "route":
        names = {gate: f"knowledge+tone~{merge}~{gate}" for gate in ROUTED}
    else:
        names = {gate: f"knowledge+tone~{merge}~{gate}" for gate in GATES}
        names |= best_fixed(dev, library, merge)
    if merge == "linear":
        names["posterior"] = "knowledge+tone~linear~posterior"
    found = {gate: table.measure(mixed(library.resolve(name))) for gate, name in names.items()}
    rows: dict[str, object] = {
        f"{merge}, {gate.split(':')[0]}": {"mixture": names[gate], **table.row(measured)}
        for gate, measured in found.items()
    }
    learned = found[f"learned:{NAME}"]
    pairs: dict[str, object] = {
        f"{merge}: learned - {other}": table.difference(learned, found[other])
        for other in ("novelty", "best by both", "best by nll")
        if other in found
    }
    return rows, pairs


def measure_domains(
    bench: Bench, library: StateLibrary, *, samples: int, seed: int
) -> dict[str, object]:
    """Measure two states of knowledge beside a voice, on the facts that one of them knows."""
    states = "+".join((*DOMAINS, "tone"))
    table = Table(bench, [fact for facts in DOMAINS.values() for fact in facts], samples, seed)
    rows: dict[str, object] = {}
    found: dict[str, Measured] = {}
    for name in (*DOMAINS, "tone"):
        rows[name] = table.row(table.measure(single(name)))
    for merge in ("linear", "delta", "product"):
        for gate in ("fixed", "novelty", "posterior-novelty"):
            title = f"{merge}, {gate}"
            found[title] = table.measure(mixed(library.resolve(f"{states}~{merge}~{gate}")))
            rows[title] = table.row(found[title])
            print(title, json.dumps(rows[title]), flush=True)
    pairs = {
        merge: table.difference(found[f"{merge}, posterior-novelty"], found[f"{merge}, novelty"])
        for merge in ("linear", "delta", "product")
    }
    right = round(right_state(bench, library, table), 4)
    return {"rows": rows, "posterior-novelty - novelty": pairs, "right_state": right}


def right_state(bench: Bench, library: StateLibrary, table: Table) -> float:
    """Return the share of questions after which the posterior prefers the state that knows."""
    system = mixed(library.resolve(f"{'+'.join((*DOMAINS, 'tone'))}~linear~posterior-novelty"))
    asked = table.asked[DECODINGS[0].name]
    named = bench.named_weights(system, [q.prompt for q in asked])
    places = [system.rows.index(name) for name in DOMAINS]
    preferred = named[:, places].argmax(-1).tolist()
    knows = [[q.fact in facts for facts in DOMAINS.values()].index(True) for q in asked]
    return statistics.fmean(a == b for a, b in zip(preferred, knows, strict=True))


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description="Measure every gate under every merge rule.")
    parser.add_argument("--model", type=Path, default=EngineConfig.model)
    parser.add_argument("--states", type=Path, default=EngineConfig.states)
    parser.add_argument("--merges", nargs="*", default=["alone", *MERGES, "route"])
    parser.add_argument("--domains", type=Path, help="measure a folder of `tune_domains` instead")
    parser.add_argument("--samples", type=int, default=8, help="answers a fact")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="a .json to write or add to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    report = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}, "pairs": {}}
    report |= {"samples_a_fact": args.samples, "seed": args.seed}
    bench, library = open_bench(args.model, args.domains or args.states, args.device)

    def keep() -> None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    if args.domains:
        report["domains"] = measure_domains(bench, library, samples=args.samples, seed=args.seed)
        keep()
        return
    report["states"] = {name: state.sha256 for name, state in library.states.items()}
    report["gate"] = library.gates[NAME].sha256
    dev = Table(bench, LEARNT_FACTS, CHOOSING_SAMPLES, args.seed + 1)
    table = Table(bench, HELD_OUT_FACTS, args.samples, args.seed)
    for merge in args.merges:
        if merge == "alone":
            report["rows"] |= measure_alone(table)
        else:
            rows, pairs = measure_merge(table, dev, library, merge)
            report["rows"] |= rows
            report["pairs"] |= pairs
        keep()
        print("measured", merge, flush=True)


if __name__ == "__main__":
    main()
