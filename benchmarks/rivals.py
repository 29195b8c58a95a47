"""Other engines beside ours: the same random weights, rows and card, one run.

    python benchmarks/rivals.py --rival albatross:../Albatross --models 1.5b
    python benchmarks/rivals.py --rival rwkv --rival fla --rows 1 8 32

A step goes from token ids to logits. An engine is timed where its logits agree with ours after
three tokens, two layers deep (more random layers amplify a last bit beyond any limit); as a CUDA
graph where its step can be captured, else by the clock, launches included; the faster of the two
counts. Ends with JSON lines in `decode.jsonl` under its name in `engine`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_checkpoint
from decode import MODELS, decode_fields, relative_error
from measure import RESULTS, Machine, capture, machine, time_replays, write_line
from random_models import SHAPES, Shape, random_model
from rival_engines import Engine, Rival, Stepper

from mrss_provider.model import Model
from mrss_provider.model.rwkv7_cuda import FusedDecoder

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NUM_TOKENS = 3
CHECKED_LAYERS = 2
# fp16 states, sums and products, against our fp32 states.
MAX_ERROR = 0.02
CELL_S = 0.5
# For one engine and one model: its compiler, its weights, its rows.
CHILD_S = 420.0
_RESULT = "rival-result: "


def token_ids(rows: int, step: int, vocab_size: int) -> list[int]:
    """Return the ids that every engine reads at a step."""
    return [(7919 * row + 104_729 * step + 1) % vocab_size for row in range(rows)]


def our_engine(shape: Shape, state_dtype: str) -> tuple[Model, FusedDecoder]:
    """Return our model of a shape, and its decode step."""
    model = random_model(shape, dtype="bf16", compute_dtype="fp16", state_dtype=state_dtype)
    if not isinstance(model.fused, FusedDecoder):
        sys.exit("this shape has no fused decode step on this device")
    return model, model.fused


def our_steps(shape: Shape, rows_sweep: list[int], state_dtype: str) -> dict[int, float]:
    """Return milliseconds of our step by rows."""
    model, fused = our_engine(shape, state_dtype)
    taken = {}
    for rows in rows_sweep:
        pool = model.new_pool(rows)
        slots = torch.arange(rows, device="cuda")
        ids = torch.tensor(token_ids(rows, 0, shape.vocab_size), device="cuda")
        graph = capture(lambda: fused.decode_logits(ids, slots, pool))  # noqa: B023
        taken[rows] = time_replays(graph, budget_s=CELL_S).median_ms
    return taken


def our_logits(shape: Shape, rows_sweep: list[int]) -> dict[int, torch.Tensor]:
    """Return our logits [rows, V] after `NUM_TOKENS` steps, by rows."""
    model, fused = our_engine(shape, "fp32")
    logits = {}
    for rows in rows_sweep:
        pool = model.new_pool(rows)
        slots = torch.arange(rows, device="cuda")
        for step in range(NUM_TOKENS):
            ids = torch.tensor(token_ids(rows, step, shape.vocab_size), device="cuda")
            hidden = fused.decode(ids, slots, pool)
        logits[rows] = fused.head(hidden).half().cpu()
    return logits


def shallow(shape: Shape) -> Shape:
    """Return the shape whose logits are compared."""
    return dataclasses.replace(shape, num_layers=CHECKED_LAYERS)


def child(args: argparse.Namespace) -> None:
    """Check or time one engine on one model; prints a line of JSON for each row count."""
    torch.set_grad_enabled(False)
    rival = Rival.parse(args.rival[0])
    if args.prepare:
        rival.prepare(args.rival_state)
        return
    shape = SHAPES[args.models[0]]
    logits = args.child.with_suffix(".logits")
    truth = torch.load(logits) if logits.is_file() else None
    shape = shape if truth is None else shallow(shape)
    engine = rival.load(args.child, shape, args.rival_state)
    for rows in args.rows:
        if rows > engine.max_rows:
            continue
        found = (
            _time_engine(engine, rows, shape.vocab_size)
            if truth is None
            else {"error": _error(engine, rows, truth[rows])}
        )
        print(_RESULT + json.dumps({"rows": rows} | found), flush=True)


def _error(engine: Engine, rows: int, truth: torch.Tensor) -> float:
    stepper = engine.start(rows)
    for step in range(NUM_TOKENS):
        logits = stepper.step(token_ids(rows, step, truth.shape[1]))
    return relative_error(logits.reshape(truth.shape).cpu(), truth)


def _time_engine(engine: Engine, rows: int, vocab_size: int) -> dict[str, Any]:
    stepper = engine.start(rows)
    times = {"eager": _eager_ms(stepper, rows, vocab_size)}
    with contextlib.suppress(RuntimeError):
        times |= _graph_ms(stepper)
    mode = min(times, key=times.__getitem__)
    return {
        "ms": times[mode],
        "mode": mode,
        "state_dtype": engine.state_dtype,
        "note": engine.note,
    }


def _eager_ms(stepper: Stepper, rows: int, vocab_size: int) -> float:
    """Return the median of single steps by the clock, the device idle before and after each."""
    ids = token_ids(rows, 0, vocab_size)
    taken: list[float] = []
    deadline = time.perf_counter() + CELL_S
    while len(taken) < 10 or (time.perf_counter() < deadline and len(taken) < 200):
        torch.cuda.synchronize()
        started = time.perf_counter()
        stepper.step(ids)
        torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def _graph_ms(stepper: Stepper) -> dict[str, float]:
    step = stepper.graph_step
    if step is None:
        return {}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # TorchScript optimises in its first calls.
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return {"graph": time_replays(capture(step), budget_s=CELL_S).median_ms}


def run_child(command: list[str], env: dict[str, str]) -> list[dict[str, Any]]:
    """Run a child of this script and return its results; what it says goes to stderr."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=env, stdout=said, stderr=subprocess.STDOUT)
        try:
            process.wait(CHILD_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said.seek(0)
        lines = said.read().splitlines()
    found = [json.loads(x.removeprefix(_RESULT)) for x in lines if x.startswith(_RESULT)]
    if process.returncode != 0:
        print("\n".join(lines[-25:]), file=sys.stderr)
        print(f"ended with status {process.returncode}: {' '.join(command)}", file=sys.stderr)
    return found


@contextlib.contextmanager
def preparing(rivals: list[Rival], envs: list[dict[str, str]], state: str) -> Iterator[None]:
    """Let all rivals compile while the body runs; returns when they are done."""
    children = [
        subprocess.Popen(
            [*_me(), "--rival", str(rival), "--prepare", "--rival-state", state],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        for rival, env in zip(rivals, envs, strict=True)
    ]
    try:
        yield
        deadline = time.monotonic() + CHILD_S
        for process in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(1.0, deadline - time.monotonic()))
    finally:
        for process in children:
            process.kill()
            process.wait()


def agreeing_rows(name: str, rival: Rival, checks: list[dict[str, Any]]) -> dict[int, float]:
    """Return the error of the logits by rows, where it is small enough; say so where it is not."""
    for found in checks:
        if not found["error"] <= MAX_ERROR:
            error = found["error"]
            print(f"{name} {rival.kind} {found['rows']} rows: error {error:.2e}, not the same")
    return {x["rows"]: x["error"] for x in checks if x["error"] <= MAX_ERROR}


def report(
    name: str, rival: Rival, found: dict[str, Any], ours: dict[str, dict[int, float]], on: Machine
) -> dict[str, object]:
    """Print a result beside ours; return the fields of its line."""
    rows = found["rows"]
    fields = decode_fields(name, rows, found["ms"], "fp16", found["state_dtype"], on)
    for state_dtype, taken in ours.items():
        # How many times as fast ours is.
        fields[f"mrss_ratio_{state_dtype}_state"] = round(found["ms"] / taken[rows], 3)
    print(
        f"{name} {rival.kind} {rows} rows: {1e3 / found['ms']:.1f} steps/s ({found['mode']}), ours "
        + ", ".join(f"{1e3 / taken[rows]:.1f} ({state} state)" for state, taken in ours.items()),
        flush=True,
    )
    return fields | {
        "engine": rival.kind,
        "engine_commit": rival.version(),
        "scope": f"token ids to logits, {found['mode']}",
        "note": found["note"],
    }


def main() -> None:
    """Write the weights, time ours, then each rival in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rival", action="append", required=True, help="may be given again")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.5b", "7.2b"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--rival-state", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--work", type=Path, help="folder for weights and what rivals compile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child or args.prepare:
        child(args)
        return
    rivals = [Rival.parse(text) for text in args.rival]
    torch.set_grad_enabled(False)
    on = machine()
    print(on)
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mrss")))
        work.mkdir(parents=True, exist_ok=True)
        envs = [_environment(work / f"built_{i}") for i in range(len(rivals))]
        for index, name in enumerate(args.models):
            prepared = contextlib.nullcontext()
            if index == 0:
                prepared = preparing(rivals, envs, args.rival_state)
            shape = SHAPES[name]
            with prepared:
                checked = write_checkpoint(work / f"{name}-shallow.pth", shallow(shape))
                torch.save(our_logits(shallow(shape), args.rows), checked.with_suffix(".logits"))
                file = write_checkpoint(work / f"{name}.pth", shape)
                ours = {state: our_steps(shape, args.rows, state) for state in ("fp32", "fp16")}
                torch.cuda.empty_cache()
            for rival, env in zip(rivals, envs, strict=True):
                command = [*_me(), "--rival", str(rival), "--models", name]
                command += ["--rival-state", args.rival_state]
                rows = list(map(str, args.rows))
                checks = run_child([*command, "--child", str(checked), "--rows", *rows], env)
                errors = agreeing_rows(name, rival, checks)
                if not errors:
                    continue
                rows = list(map(str, errors))
                for found in run_child([*command, "--child", str(file), "--rows", *rows], env):
                    fields = report(name, rival, found, ours, on)
                    fields["logits_error"] = round(errors[found["rows"]], 5)
                    write_line("decode", fields, on, args.out)
            for path in (file, checked):
                path.unlink()


def _me() -> list[str]:
    return [sys.executable, str(Path(__file__).resolve())]


def _environment(built: Path) -> dict[str, str]:
    """Return the environment of one rival: two may compile extensions of the same name."""
    built.mkdir(exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    return os.environ | {
        "TORCH_EXTENSIONS_DIR": str(built),
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
    }


if __name__ == "__main__":
    main()
