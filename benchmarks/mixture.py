"""What a mixture of states costs on CUDA: the engine's own decode step, K states against one.

A step goes from token ids to token ids: every row's next token, head, gate, merge, temperature 1
with top-p 0.7, one draw, the token fed back. `steps_per_s` is one graph replay after the other
(device events); `loop_steps_per_s` is `Engine.step` in a loop (wall clock), scheduling included.
Random weights of official shapes, random tuned states.

    python benchmarks/mixture.py --models 1.5b --states 1 4 8
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from decode import gate as gate_decode
from measure import RESULTS, Machine, machine, write_line
from random_models import SHAPES, Shape, random_model, state_bytes, weight_bytes

from mrss_provider.config import EngineConfig
from mrss_provider.engine.device_runner import DeviceRunner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.gates import make_gate
from mrss_provider.engine.merges import make_merge
from mrss_provider.engine.request import EngineRequest, ResolvedMixture
from mrss_provider.engine.step_runner import HostRunner
from mrss_provider.mixture import Method
from mrss_provider.model import Model
from mrss_provider.model.tuned_state import TunedState
from mrss_provider.sampling_params import SamplingParams

STATES = (1, 2, 3, 4, 8)
REQUESTS = (1, 32)
KINDS = (("linear", "fixed"), ("delta", "novelty"))
# Of a step, in the gate: texts part for good at the first tie that falls otherwise.
GATE_TOKENS = 3


@dataclass(frozen=True)
class Cell:
    """One measurement: K states a request, merged by a rule under a gate."""

    num_states: int
    num_requests: int
    merge: str
    gate: str

    @property
    def rows_a_request(self) -> int:
        """The states, and the base where the gate or the rule needs it."""
        if self.num_states == 1:
            return 1
        gate, rule = make_gate(Method(self.gate)), make_merge(Method(self.merge))
        needs_base = gate.needs_base or rule.anchored
        return self.num_states + int(needs_base)

    @property
    def num_rows(self) -> int:
        """Rows of a step."""
        return self.num_requests * self.rows_a_request


def random_states(shape: Shape, count: int) -> list[TunedState]:
    """Return tuned states whose rows differ as those of real ones do, and the same each time."""
    size = (shape.num_layers, shape.num_heads, shape.head_size, shape.head_size)
    generator = torch.Generator().manual_seed(1)
    return [TunedState(f"s{i}", torch.randn(size, generator=generator) * 0.3) for i in range(count)]


def resolve(cell: Cell, states: list[TunedState]) -> ResolvedMixture:
    """Lay out a mixture's rows as the library does."""
    own = states[: cell.num_states]
    # A single state comes back as it is.
    merge, gate = (cell.merge, cell.gate) if cell.num_states > 1 else ("linear", "fixed")
    rule = make_merge(Method(merge))
    has_base = cell.rows_a_request > cell.num_states
    ratios = (0.0,) * has_base + (1.0,) * cell.num_states
    return ResolvedMixture(
        canonical="+".join(state.name for state in own),
        states=(None,) * has_base + tuple(own),
        names=("base",) * has_base + tuple(state.name for state in own),
        groups=("",) * cell.rows_a_request,
        ratios=ratios,
        weights=rule.scale(ratios, base_named=False),
        merge=Method(merge),
        gate=Method(gate),
        cut=0.1 if rule.has_cut else 0.0,
        base_row=0 if has_base else None,
        fingerprint="bench",
    )


def ask(cell: Cell, mixture: ResolvedMixture, *, max_tokens: int, greedy: bool = False) -> list:
    """Return the cell's requests."""
    return [
        EngineRequest(
            f"r{i}",
            (1 + i, 2, 3),
            mixture,
            SamplingParams(
                temperature=0.0 if greedy else 1.0,
                top_p=1.0 if greedy else 0.7,
                seed=i,
                max_tokens=max_tokens,
                ignore_eos=True,
                sampling_order="openai",
            ),
        )
        for i in range(cell.num_requests)
    ]


def make_engine(model: Model, num_rows: int, *, on_host: bool = False) -> Engine:
    """Return an engine with room for so many rows."""
    config = EngineConfig(max_rows=num_rows, prepare_rows=0)
    banned = torch.zeros(0, dtype=torch.int64, device=model.device)
    runner = HostRunner(model, num_rows, banned) if on_host else None
    allowed = range(model.config.vocab_size)
    return Engine(model, None, config, allowed_ids=allowed, runner=runner)  # type: ignore[arg-type]


def gate(shape: Shape, dtype: str) -> None:
    """Stop unless the device's steps pick what torch's do, two layers deep, greedily."""
    small = dataclasses.replace(shape, num_layers=2)
    states = random_states(small, 4)
    same = total = 0
    for kind in KINDS:
        cell = Cell(4, 8, *kind)
        texts = []
        for on_host in (False, True):
            model = random_model(small, dtype=dtype)
            engine = make_engine(model, cell.num_rows, on_host=on_host)
            for request in ask(cell, resolve(cell, states), max_tokens=GATE_TOKENS, greedy=True):
                engine.add(request)
            text: dict[tuple[str, int], int | None] = {}
            while engine.has_work:
                for output in engine.step():
                    text[output.request_id, len(text)] = output.token_id
            texts.append([token for _, token in sorted(text.items())])
        same += sum(one == other for one, other in zip(*texts, strict=True))
        total += len(texts[0])
    print(f"gate: {same} of {total} greedy tokens equal torch's")
    if same < 0.9 * total:
        sys.exit("the device's tail picks other tokens")


def measure(
    name: str, model: Model, cell: Cell, states: list[TunedState], on: Machine, out: Path, one: dict
) -> None:
    """Time one cell and write its line; `one` has the rates of one state and is filled by it."""
    engine = make_engine(model, cell.num_rows)
    for request in ask(cell, resolve(cell, states), max_tokens=100_000):
        engine.add(request)
    # Prompts, and the step's capture.
    for _ in range(8):
        engine.step()
    loop = time_loop(engine)
    replay = time_replay(engine)
    shape, dtype = SHAPES[name], model.config.dtype
    moved = weight_bytes(shape, dtype) + 2 * cell.num_rows * state_bytes(shape, "fp32")
    limit = on.read_tb_per_s * 1e12 / moved
    rates = {"steps_per_s": 1e3 / replay, "loop_steps_per_s": 1e3 / loop}
    if cell.num_states == 1:
        one |= rates
    fields: dict[str, object] = {
        "model": name,
        "rows": cell.num_rows,
        "states": cell.num_states,
        "requests": cell.num_requests,
        "merge": cell.merge if cell.num_states > 1 else "none",
        "gate": cell.gate if cell.num_states > 1 else "none",
        "tokens_per_s": round(rates["steps_per_s"] * cell.num_requests, 1),
        **{key: round(rate, 1) for key, rate in rates.items()},
        "limit_per_s": round(limit, 1),
        "of_one_state": round(rates["steps_per_s"] / one["steps_per_s"], 3),
        "loop_of_one_state": round(rates["loop_steps_per_s"] / one["loop_steps_per_s"], 3),
        "dtype": dtype,
        "state_dtype": "fp32",
        "scope": "token ids to token ids, one graph replay; top-p 0.7",
    }
    write_line("mixture", fields, on, out)


def time_loop(engine: Engine, *, count: int = 100) -> float:
    """Return milliseconds a step of the engine's loop, the median."""
    torch.cuda.synchronize()
    marks = [time.perf_counter()]
    for _ in range(count):
        outputs = engine.step()
        marks.append(time.perf_counter())
        if any(output.error for output in outputs):
            sys.exit(f"a step failed: {outputs[0].error}")
    return sorted(1e3 * (b - a) for a, b in itertools.pairwise(marks))[count // 2]


def time_replay(engine: Engine, *, count: int = 60) -> float:
    """Return milliseconds a step on the device, the median."""
    runner = engine._runner
    assert isinstance(runner, DeviceRunner)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for _ in range(5):
        runner.replay()
    marks[0].record()
    for mark in marks[1:]:
        runner.replay()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return times[count // 2]


def main() -> None:
    """Parse, print the machine and the limits, gate, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["1.5b", "7.2b"])
    parser.add_argument("--states", nargs="+", type=int, default=list(STATES))
    parser.add_argument("--requests", nargs="+", type=int, default=list(REQUESTS))
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    on = machine()
    print(on)
    for name in args.models:
        shape = SHAPES[name]
        read = on.read_tb_per_s * 1e12
        for states in args.states:
            moved = weight_bytes(shape, args.dtype) + 2 * states * state_bytes(shape, "fp32")
            print(f"limit: {name}, {states} rows: {read / moved:.0f} steps/s")
        gate_decode(shape, args.dtype, "fp32")
        gate(shape, args.dtype)
        model = random_model(shape, dtype=args.dtype)
        tuned = random_states(shape, max(args.states))
        for requests in args.requests:
            one: dict[str, float] = {}
            for states in sorted({1, *args.states}):
                for kind in KINDS if states > 1 else KINDS[:1]:
                    measure(name, model, Cell(states, requests, *kind), tuned, on, args.out, one)
                    torch.cuda.empty_cache()
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
