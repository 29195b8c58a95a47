"""Time decoding with rows that sleep, and measure what it costs: eight states, bundled model, CPU.

A row without weight is not computed at each token; it reads what was said when it is needed. Cells:

- `speak N`: a schedule that lets N of the 8 states speak, the others weigh 0 (exact);
- `in turn`: `route` by a schedule, each state speaks for 16 tokens and must catch up first (exact);
- `probe P`: `route` by novelty, which chooses anew every P tokens only;
- `faint N`: N states of weight 1, the others 0.0005 of it, which is less than counts;
- `posterior`: what the prompt says for the whole answer, without a share for changes.

    python benchmarks/lazy_rows.py
    python benchmarks/lazy_rows.py --tokens 64 --rounds 3 --threads 2

Tokens a second are of one answer, of CPU time of the one thread that decodes (of wall time with
more threads), eager and lazy in turns. The loss is measured on text that the eager engine sampled,
given to both: the mean KL of the eager from the lazy merged distribution, and what the text's NLL
rises by, in nats a token. Exact cells that differ by more than rounding are an error. Ends with one
JSON line a cell, appended to benchmarks/results/lazy_rows.jsonl.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from measure import Machine, host, write_line
from torch import Tensor

from mrss_provider.config import BUNDLED_STATES, DEMO_MODEL, EngineConfig
from mrss_provider.engine import tail
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.request import EngineRequest
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.model import Model, load_model
from mrss_provider.model.tuned_state import average_states, save_tuned_state
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.tokenizer import Tokenizer, find_vocabulary

RESULTS = Path(__file__).resolve().parent / "results"
NUM_STATES = 8
PROMPT = (
    "User: Who keeps the bakery?\n\nAssistant: Leopold keeps the bakery, matey.\n\n"
    "User: What colour is the door of the fishery?\n\nAssistant:"
)
# What rounding may do to exact cells, nats.
MAX_ROUNDING = 1e-4


@dataclass(frozen=True)
class Cell:
    """What is measured: a mixture, how often its gate is asked, and whether nothing is lost."""

    name: str
    mixture: str
    probe_len: int = 0
    is_exact: bool = True


@dataclass(frozen=True)
class Loaded:
    """The model and eight states of it."""

    model: Model
    library: StateLibrary
    prompt: tuple[int, ...]
    allowed: Sequence[int]

    def engine(self, cell: Cell, *, lazy: bool) -> Engine:
        """Return an engine with rows for one answer."""
        config = EngineConfig(
            max_rows=NUM_STATES + 1,
            lazy_rows="on" if lazy else "off",
            reprobe_tokens=cell.probe_len,
        )
        return Engine(self.model, self.library, config, allowed_ids=self.allowed)

    def request(self, cell: Cell, tokens: int, seed: int = 1) -> EngineRequest:
        """Return a request for `tokens` tokens."""
        sampling = SamplingParams(
            temperature=1.0,
            top_p=1.0,
            max_tokens=tokens,
            seed=seed,
            ignore_eos=True,
            sampling_order="openai",
        )
        mixture = self.library.resolve(cell.mixture)
        evidence = (range(1, len(self.prompt)),) if "posterior" in cell.mixture else ()
        return EngineRequest("x", self.prompt, mixture, sampling, evidence=evidence)


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    # What a posterior learns from these states is not the question here.
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(Path(folder), args.threads)
        clock = time.thread_time if args.threads == 1 else time.perf_counter
        machine = host()
        for cell in cells(args.tokens):
            measure(loaded, cell, args, clock, machine)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=4, help="texts that the loss is measured on")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def cells(num_tokens: int) -> list[Cell]:
    """Return what is measured."""
    names = [f"s{i}" for i in range(NUM_STATES)]
    everybody = "+".join(names)
    found = []
    for speakers in range(1, NUM_STATES + 1):
        silent = "+".join(f"{name}=0@0" for name in names[speakers:])
        gate = f"schedule:{silent}" if silent else "fixed"
        found.append(Cell(f"speak {speakers}", f"{everybody}~linear~{gate}"))
    turns = []
    for i, name in enumerate(names):
        first, last = 16 * i, 16 * i + 15
        rise = f"0@{first - 1},1@{first}" if i else "1@0"
        fall = f",1@{last},0@{last + 1}" if i < NUM_STATES - 1 else ""
        turns.append(f"{name}={rise}{fall}")
    found.append(Cell("in turn", f"{everybody}~route~schedule:{'+'.join(turns)}"))
    found += [
        Cell(f"probe {p}", f"{everybody}~route~novelty", p, is_exact=False)
        for p in (4, 16, 64)
        if p < num_tokens
    ]
    for speakers in (1, 2, 4):
        faint = "+".join(f"{name}:0.0005" for name in names[speakers:])
        mixture = f"{'+'.join(names[:speakers])}+{faint}~linear~fixed"
        found.append(Cell(f"faint {speakers}", mixture, is_exact=False))
    found.append(Cell("posterior", f"{everybody}~linear~posterior:0", is_exact=False))
    return found


def load(folder: Path, threads: int) -> Loaded:
    """Load the bundled model, and write eight states between and beside its two."""
    model = load_model(DEMO_MODEL, device="cpu", threads=threads)
    bundled = StateLibrary(BUNDLED_STATES, model.config)
    two = [bundled.get("knowledge"), bundled.get("tone")]
    shares = [(1.0, 0.0), (0.0, 1.0), (0.8, 0.2), (0.6, 0.4), (0.4, 0.6), (0.2, 0.8)]
    states = [average_states(two, share, name=f"s{i}") for i, share in enumerate(shares)]
    for i in range(len(states), NUM_STATES):
        half = two[i % 2]
        states.append(replace(half, name=f"s{i}", wkv=half.wkv * 0.5))
    for state in states:
        save_tuned_state(folder / f"{state.name}.safetensors", state, model.config)
    tokenizer = Tokenizer.load(find_vocabulary(DEMO_MODEL))
    return Loaded(
        model,
        StateLibrary(folder, model.config),
        tuple(tokenizer.encode(PROMPT)),
        tokenizer.allowed_ids(model.config.vocab_size),
    )


def measure(
    loaded: Loaded,
    cell: Cell,
    args: argparse.Namespace,
    clock: Callable[[], float],
    machine: Machine,
) -> None:
    """Measure one cell, print and keep its line."""
    kl, nll = loss(loaded, cell, args.tokens, args.texts)
    if cell.is_exact and abs(nll) + abs(kl) > MAX_ROUNDING:
        sys.exit(f"wrong: {cell.name} must lose nothing, but KL is {kl:.1e} and the NLL {nll:+.1e}")
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(args.rounds + 1):
        for lazy in seconds:
            taken = decode_s(loaded, cell, args.tokens, clock, lazy=lazy)
            # The first round warms up.
            if turn:
                seconds[lazy].append(taken)
    eager, lazy_ = (statistics.median(seconds[lazy]) for lazy in (False, True))
    fields = {
        "cell": cell.name,
        "model": "bundled, 6 M",
        "dtype": loaded.model.config.dtype,
        "threads": torch.get_num_threads(),
        "clock": "CPU" if args.threads == 1 else "wall",
        "states": NUM_STATES,
        "tokens": args.tokens,
        "eager_tokens_per_s": round((args.tokens - 1) / eager, 1),
        "lazy_tokens_per_s": round((args.tokens - 1) / lazy_, 1),
        "speed_up": round(eager / lazy_, 2),
        "kl_nats": float(f"{kl:.3g}"),
        "nll_rise_nats": float(f"{nll:.3g}"),
    }
    write_line("lazy_rows", fields, machine, RESULTS)


def decode_s(
    loaded: Loaded, cell: Cell, tokens: int, clock: Callable[[], float], *, lazy: bool
) -> float:
    """Return the seconds from the first token of an answer to its last."""
    engine = loaded.engine(cell, lazy=lazy)
    engine.add(loaded.request(cell, tokens))
    while not engine.step():
        pass
    started = clock()
    while engine.has_work:
        engine.step()
    return clock() - started


def loss(loaded: Loaded, cell: Cell, tokens: int, num_texts: int) -> tuple[float, float]:
    """Return the mean KL(eager || lazy), and by how much the NLL of eager text rises."""
    kls: list[float] = []
    rises: list[float] = []
    for seed in range(num_texts):
        request = loaded.request(cell, tokens, seed)
        text, eager = read(loaded.engine(cell, lazy=False), request)
        again, lazy = read(loaded.engine(cell, lazy=True), replace(request, forced=text))
        assert again == text
        gains = torch.where(eager > -torch.inf, eager.exp() * (eager - lazy), 0.0)
        kls.append(float(gains.sum(-1).mean()))
        rises.append(float((eager - lazy)[range(tokens), list(text)].mean()))
    return statistics.mean(kls), statistics.mean(rises)


def read(engine: Engine, request: EngineRequest) -> tuple[tuple[int, ...], Tensor]:
    """Run a request; return its tokens and the merged log-probabilities [T, V] in fp64."""
    merged: list[Tensor] = []
    plain = tail.merge_rows

    def noting(*arguments: object) -> Tensor:
        result = plain(*arguments)  # type: ignore[arg-type]
        merged.append(result.double().log_softmax(-1)[0])
        return result

    ids: list[int] = []
    with mock.patch.object(tail, "merge_rows", noting):
        engine.add(request)
        while engine.has_work:
            ids += [output.token_id or 0 for output in engine.step()]
    return tuple(ids), torch.stack(merged)


if __name__ == "__main__":
    main()
