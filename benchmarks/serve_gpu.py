"""The whole path on CUDA: tokens that clients get over HTTP, against the engine and its graph.

A random model of an official shape is written to a folder and served by `mrss serve` in a process
of its own, over a Unix socket. Clients are other processes; each stream brings a fixed number of
tokens. Rates are taken while all streams run. Three ways at each load:

- `graph`: replays of the decode graph alone, token ids to logits;
- `bare`: `Engine.add` and `Engine.step` in a loop, no text, no HTTP;
- `http`: what the clients receive.

    python benchmarks/serve_gpu.py --models 1.5b --loads 1 32 256 1x4
    python benchmarks/serve_gpu.py --models 1.5b --only mixed

A load `1x4` is one request to a mixture of 4 states. `mixed` is in `serve_mixed.py`: it sends a
prompt of 32,768 tokens to a server with 32 running streams and compares their inter-token times
with and without it. Ends with JSON lines in benchmarks/results/serve.jsonl. Every part stops by
itself within its limit.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, Machine, capture, machine, time_replays, write_line
from random_models import SHAPES, state_bytes, weight_bytes
from serve_mixed import MIXED_STREAMS, measure_mixed
from served_model import LOAD_S, PART_S, Files, Load, served, written
from streams import Gaps, Tape, merge_tapes, steady_window

from mrss_provider.async_engine.loading import load
from mrss_provider.client import Client
from mrss_provider.engine.request import EngineRequest, resolve_sampling

SHARE_OF_BARE = 0.9
# A client process keeps up with this many streams; more take more processes.
STREAMS_A_CLIENT = 64
_RESULT = "result: "
_READY = "ready"


def run_bare(args: argparse.Namespace, files: Files) -> None:
    """Time the graph and the engine's loop at each load; prints a line of JSON for each."""
    loads: list[Load] = args.loads
    loaded = load(files.config(args, max(load_.rows for load_ in loads)))
    for load_ in loads:
        requests = []
        for index in range(load_.num_requests):
            asked = load_.request(index, args.tokens, args.top_p)
            assert isinstance(asked.prompt, tuple)
            mixture = loaded.library.resolve(asked.model, asked.mixture)
            sampling = resolve_sampling(asked.sampling, mixture)
            requests.append(EngineRequest(f"b{index}", asked.prompt, mixture, sampling))
        # Once for nothing: kernels are compiled and graphs captured. Then up to the last token but
        # one: the step in which all answers end, and their states are kept, is not one of many.
        for num_tokens in (8, args.tokens - 1):
            tape = _bare_tape(loaded.engine, requests, num_tokens)
        rate = steady_window([tape]).tokens_per_s
        print(_RESULT + json.dumps({"rate": rate}), flush=True)


def _bare_tape(engine: Any, requests: list[EngineRequest], num_tokens: int) -> Tape:
    """Step the engine until each request has `num_tokens`; return the arrivals."""
    tape = Tape(len(requests))
    numbers = {request.id: number for number, request in enumerate(requests)}
    deadline = time.monotonic() + PART_S
    for request in requests:
        engine.add(request)
    while engine.has_work:
        outputs = engine.step()
        now = time.monotonic()
        for output in outputs:
            if output.error is not None:
                raise output.error
            tape.add(numbers[output.request_id], now, 1)
        if tape.fewest() >= num_tokens:
            for request in requests:
                engine.abort(request.id)
        if now > deadline:
            sys.exit(f"the engine's loop took longer than {PART_S:g} s")
    return tape


def run_graph(args: argparse.Namespace, files: Files) -> None:
    """Time replays of the decode graph at each load; prints a line of JSON for each."""
    from mrss_provider.model import load_model

    config = files.config(args, 1)
    model = load_model(
        files.model,
        device="cuda",
        dtype=args.dtype,
        state_dtype=args.state_dtype,
        sparse_ffn=config.sparse_ffn,
    )
    fused = model.fused
    if fused is None:
        sys.exit("this model has no fused decode step on this device")
    for load_ in args.loads:
        pool = model.new_pool(load_.rows)
        ids = torch.randint(model.config.vocab_size, (load_.rows,), device="cuda")
        slots = torch.arange(load_.rows, device="cuda")
        graph = capture(lambda: fused.decode_logits(ids, slots, pool))  # noqa: B023
        rate = load_.num_requests * 1e3 / time_replays(graph).median_ms
        print(_RESULT + json.dumps({"rate": rate}), flush=True)


def run_client(args: argparse.Namespace) -> None:
    """Read a share of a load's streams; prints their arrivals as one line of JSON."""
    load_: Load = args.loads[0]
    mine = range(args.client[0], min(args.client[0] + STREAMS_A_CLIENT, load_.num_requests))
    requests = [load_.request(i, args.tokens, args.top_p) for i in mine]
    tape = Tape(len(requests))
    gc.disable()
    # All clients begin together, however long each has taken to get here.
    print(_READY, flush=True)
    sys.stdin.readline()
    asyncio.run(tape.read(Client(args.address), requests))
    print(_RESULT + json.dumps(tape.arrivals), flush=True)


def measure_http(args: argparse.Namespace, address: str, load_: Load) -> list[Tape]:
    """Send a load from as many client processes as it takes; return what they got."""
    text = f"{load_.num_requests}x{load_.num_states}"
    command = [*_me(), "--part", "client", "--address", address, "--loads", text]
    command += ["--tokens", str(args.tokens), "--top-p", str(args.top_p)]
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen([*command, "--client", str(first)], stdin=pipe, stdout=pipe, text=True)
        for first in range(0, load_.num_requests, STREAMS_A_CLIENT)
    ]
    tapes = []
    deadline = time.monotonic() + PART_S
    for child in children:
        assert child.stdout is not None
        if child.stdout.readline().strip() != _READY:
            sys.exit(f"a client did not start at {text}")
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        try:
            said, _ = child.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            said = ""
        tapes += [Tape.of(json.loads(x)) for x in _results(said)]
    if len(tapes) != len(children):
        sys.exit(f"a client failed at {text}")
    return tapes


def serve_fields(
    name: str, args: argparse.Namespace, load_: Load, rates: dict[str, float], tapes: list[Tape]
) -> dict[str, object]:
    """Return the fields of a load's line, without its limit."""
    gaps = Gaps.within(merge_tapes(tapes), 0.0, float("inf"))
    return {
        "model": name,
        "rows": load_.rows,
        "states": load_.num_states,
        "requests": load_.num_requests,
        "tokens_per_s": round(rates["http"], 1),
        "steps_per_s": round(rates["http"] / load_.num_requests, 1),
        "bare_tokens_per_s": round(rates["bare"], 1),
        "graph_tokens_per_s": round(rates["graph"], 1),
        "of_bare": round(rates["http"] / rates["bare"], 3),
        "of_graph": round(rates["http"] / rates["graph"], 3),
        "bare_of_graph": round(rates["bare"] / rates["graph"], 3),
        "gap_p50_ms": round(gaps.p50_ms, 3),
        "gap_p99_ms": round(gaps.p99_ms, 3),
        "tokens_an_event": round(gaps.tokens_an_event, 2),
        "top_p": args.top_p,
        "dtype": args.dtype,
        "state_dtype": args.state_dtype,
        "scope": "tokens delivered over HTTP",
    }


def run_part(args: argparse.Namespace, part: str, files: Files) -> list[float]:
    """Run `bare` or `graph` in a process of its own; return tokens per second by load."""
    loads = [f"{x.num_requests}x{x.num_states}" for x in args.loads]
    command = [*_me(), "--part", part, "--model-folder", str(files.model)]
    command += ["--state-folder", str(files.states), "--loads", *loads, "--dtype", args.dtype]
    command += ["--state-dtype", args.state_dtype, "--tokens", str(args.tokens)]
    try:
        limit_s = LOAD_S + PART_S * len(loads)
        run = subprocess.run(
            [*command, "--top-p", str(args.top_p)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        sys.exit(f"the {part} part took longer than {limit_s:g} s")
    rates = [json.loads(x)["rate"] for x in _results(run.stdout)]
    if len(rates) != len(loads):
        sys.exit(f"the {part} part failed with status {run.returncode}")
    return rates


def measure_model(name: str, args: argparse.Namespace, on: Machine) -> None:
    """Measure all that is asked for of one model."""
    shape = SHAPES[name]
    read = on.read_tb_per_s * 1e12
    limits = [
        read / (weight_bytes(shape, args.dtype) + 2 * x.rows * state_bytes(shape, args.state_dtype))
        for x in args.loads
    ]
    for load_, limit in zip(args.loads, limits, strict=True):
        print(f"limit: {name}, {load_.rows} rows: {limit * load_.num_requests:.0f} tokens/s")
    with written(name) as files:
        rates: dict[str, list[float]] = {"graph": [], "bare": []}
        if args.only != "mixed":
            rates = {part: run_part(args, part, files) for part in rates}
        rows = max(MIXED_STREAMS + 1, *(load_.rows for load_ in args.loads))
        with served(files.config(args, rows)) as address:
            for i, load_ in enumerate(args.loads if args.only != "mixed" else []):
                # Once for nothing, as above: long enough for all streams to run side by side.
                few = {"tokens": max(16, min(args.tokens // 2, 2 * load_.num_requests))}
                measure_http(argparse.Namespace(**(vars(args) | few)), address, load_)
                tapes = measure_http(args, address, load_)
                found = {part: rate[i] for part, rate in rates.items()}
                found["http"] = steady_window(tapes).tokens_per_s
                fields = serve_fields(name, args, load_, found, tapes)
                fields["limit_per_s"] = round(limits[i], 1)
                write_line("serve", fields, on, args.out)
                if found["http"] < SHARE_OF_BARE * found["bare"]:
                    print(f"below {SHARE_OF_BARE:g} of the bare loop")
            if args.only != "loads":
                write_line("serve", measure_mixed(args, address, name), on, args.out)


def main() -> None:
    """Parse, print the machine and the limits, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["1.5b"])
    parser.add_argument(
        "--loads", nargs="+", type=Load.parse, default=[Load(1), Load(32), Load(256), Load(1, 4)]
    )
    parser.add_argument("--tokens", type=int, default=512, help="tokens a stream")
    parser.add_argument("--top-p", type=float, default=0.7)
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--state-dtype", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--only", choices=["loads", "mixed"])
    parser.add_argument("--mixed-s", type=float, default=1.5, help="seconds before each prompt")
    parser.add_argument("--mixed-prompts", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=["bare", "graph", "client"], help=argparse.SUPPRESS)
    parser.add_argument("--model-folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--state-folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs=1, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "client":
        run_client(args)
        return
    if args.part is not None:
        run = run_bare if args.part == "bare" else run_graph
        run(args, Files(args.model_folder, args.state_folder))
        # Nothing is left to say, and tearing down CUDA's graphs takes seconds.
        sys.stdout.flush()
        os._exit(0)
    on = machine()
    print(on)
    for name in args.models:
        measure_model(name, args, on)


def _results(said: str) -> list[str]:
    return [x.removeprefix(_RESULT) for x in said.splitlines() if x.startswith(_RESULT)]


def _me() -> list[str]:
    return [sys.executable, str(Path(__file__).resolve())]


if __name__ == "__main__":
    main()
