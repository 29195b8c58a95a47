"""What quantised weights cost and give: speed, memory, and how well the model predicts.

    python benchmarks/quantize.py speed --model 0.1B      # random weights in the official shapes
    python benchmarks/quantize.py memory --model 0.1B
    python benchmarks/quantize.py accuracy                # the bundled model, unseen documents
    python benchmarks/quantize.py mixtures                # its mixtures: who knows, who has a voice
    python benchmarks/quantize.py gpu                     # all but the last on CUDA, 1.5B

Kinds of weights are timed in turns, on one thread, in its own CPU time: neighbours on the machine
make that longer by what they take of memory and caches, but not by the cores that they hold.
`load_before` is how many processes wanted a core in the minute before. `int8 pack` is the form for
processors without AVX-512 VNNI. JSON lines go to benchmarks/results/quantize.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from cpu_decode import MODELS, commit, cpu_name
from mrss_kernels.quantized import Format, dequantize
from quantize_scores import SEED, against, interval, scores, unseen_documents
from safetensors.torch import save_file

from mrss_provider.config import BUNDLED_STATES, DEMO_MODEL
from mrss_provider.model import Model, load_model
from mrss_provider.model.int8 import pick_int8_form
from mrss_provider.model.quantized import quantize

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_model import checkpoint  # noqa: E402

from models.demo.answers import DECODINGS  # noqa: E402
from models.demo.measure import ask, open_bench, questions, systems  # noqa: E402

RESULTS = ROOT / "benchmarks/results/quantize.jsonl"
KINDS: dict[str, dict[str, object]] = {
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "int8": {"quantize": "int8"},
    "int8 pack": {"quantize": "int8", "packed": False},
}
CHUNK_LEN = 128


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["speed", "memory", "accuracy", "mixtures", "gpu", "load"])
    parser.add_argument("--model", choices=MODELS, default="0.1B")
    parser.add_argument("--version", type=int, choices=[6, 7], default=7)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--samples", type=int, default=2)
    # What `memory` runs in a process of its own.
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--file", type=Path)
    args = parser.parse_args()
    if args.part == "load":
        print(json.dumps(loaded_memory(args.file, args.kind)))
        return
    if args.part == "gpu":
        # Here and not above: it needs a CUDA device and Triton.
        from quantize_gpu import KINDS as CUDA_KINDS
        from quantize_gpu import gpu

        gpu("1.5b", list(CUDA_KINDS))
        return
    load_before = round(os.getloadavg()[0], 2)
    parts = {"speed": speed, "memory": memory, "accuracy": accuracy, "mixtures": mixtures}
    lines = parts[args.part](args)
    facts: dict[str, object] = {
        "benchmark": f"quantize {args.part}",
        "cpu": cpu_name(),
        "torch": torch.__version__,
    }
    facts |= {"int8_form": pick_int8_form(packed=True), "commit": commit()}
    facts |= {"date": time.strftime("%Y-%m-%d"), "load_before": load_before}
    with RESULTS.open("a") as file:
        for line in lines:
            text = json.dumps(facts | line)
            print(text)
            if args.model != "tiny":
                file.write(text + "\n")


def speed(args: argparse.Namespace) -> list[dict[str, object]]:
    """Time decode steps and prompts; all kinds in turns."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_random(args, Path(folder))
        models = {
            kind: load_model(path, device="cpu", threads=1, **options)  # type: ignore[arg-type]
            for kind, options in KINDS.items()
        }
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(args.rounds + 1):
        for kind, model in models.items():
            for name, run, repeats in cases(model):
                for _ in range(repeats):
                    started = time.thread_time()
                    run()
                    # The first round warms up.
                    if turn:
                        times.setdefault((kind, name), []).append(time.thread_time() - started)
    lines: list[dict[str, object]] = []
    for (kind, name), seconds in times.items():
        median = statistics.median(seconds)
        line: dict[str, object] = {"model": named(args), "kind": kind, "case": name}
        line |= {"threads": 1, "cpu_ms": round(median * 1e3, 3)}
        line["best_cpu_ms"] = round(min(seconds) * 1e3, 3)
        reference = statistics.median(times["bf16", name])
        line["times_bf16s_speed"] = round(reference / median, 3)
        if name == "prompt":
            line["tokens_per_s"] = round(CHUNK_LEN / median, 1)
        else:
            line["steps_per_s"] = round(1 / median, 1)
        lines.append(line)
    return lines


def cases(model: Model) -> list[tuple[str, Callable[[], object], int]]:
    """Return what is timed: a name, what to run, and how often in a turn."""
    pool = model.new_pool(8)
    ids = torch.randint(1, model.config.vocab_size, (CHUNK_LEN,), generator=torch.manual_seed(0))

    def step(rows: int) -> Callable[[], object]:
        slots = torch.arange(rows)
        return lambda: model.head(model.decode(ids[:rows], slots, pool))

    steps = [(f"{rows} rows", step(rows), 6) for rows in (1, 4, 8)]
    slot = torch.tensor([0])
    return [*steps, ("prompt", lambda: model.prefill(ids, [0, CHUNK_LEN], slot, pool), 2)]


def memory(args: argparse.Namespace) -> list[dict[str, object]]:
    """Load each kind in a process of its own."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_random(args, Path(folder))
        for kind in KINDS:
            command = [sys.executable, __file__, "load", "--kind", kind, "--file", str(path)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            lines.append({"model": named(args), "kind": kind} | json.loads(run.stdout))
    return lines


def loaded_memory(path: Path, kind: str) -> dict[str, int]:
    """Return the MB of own memory that a loaded model has added, now and at the most."""
    before, peaks, ended = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            peaks.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(path, device="cpu", threads=1, **KINDS[kind])  # type: ignore[arg-type]
    ended.set()
    watcher.join()
    model.head(model.decode(torch.tensor([1]), torch.tensor([0]), model.new_pool(1)))
    return {
        "file_mb": path.stat().st_size >> 20,
        "added_mb": (own_memory() - before) >> 20,
        "peak_added_mb": (max(peaks) - before) >> 20,
    }


def own_memory() -> int:
    """Return the bytes of this process that are not pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def accuracy(args: argparse.Namespace) -> list[dict[str, object]]:
    """Score documents that the bundled model has not seen, with each kind and in fp32."""
    documents = unseen_documents(args.documents)
    wanted = scores(load_kind({"dtype": "fp32"}), documents)
    lines = []
    for kind, options in KINDS.items():
        line: dict[str, object] = {"model": "bundled", "kind": kind, "documents": len(documents)}
        line["tokens"] = sum(map(len, documents))
        lines.append(line | against(scores(load_kind(options), documents), wanted, documents))
    return lines


def load_kind(options: dict[str, object]) -> Model:
    """Load the bundled model."""
    return load_model(DEMO_MODEL, device="cpu", threads=1, **options)  # type: ignore[arg-type]


def mixtures(args: argparse.Namespace) -> list[dict[str, object]]:
    """Ask the bundled mixtures, with weights as they are and as codes and scales hold them."""
    lines: list[dict[str, object]] = []
    asked = questions(args.samples, seed=SEED)
    texts: dict[str, dict[str, list[str]]] = {}
    for kind in ("none", "int8", "fp8", "int4"):
        bench, library = open_bench(DEMO_MODEL, BUNDLED_STATES, "cpu")
        for name, weight in bench.weights.items():
            is_large = name.endswith(".weight") and weight.ndim == 2 and name != "emb.weight"
            if is_large and kind != "none":
                held = quantize(weight, cast(Format, kind), torch.empty(0))
                weight.copy_(dequantize(held, torch.float32))
        for title, system in systems(bench, library).items():
            if title not in ("knowledge alone", "tone alone", "linear novelty", "delta novelty"):
                continue
            judged, said = ask(bench, system, DECODINGS[1], asked, voice="pirate", seed=SEED)
            texts.setdefault(title, {})[kind] = said
            line: dict[str, object] = {"model": "bundled", "kind": kind, "mixture": title}
            line |= {"answers": len(asked)}
            for part in ("know", "tone", "both"):
                line |= interval(part, [float(getattr(one, part)) for one in judged])
            lines.append(line)
    for line, title in itertools.product(lines, texts):
        if line["kind"] != "none" and line["mixture"] == title:
            pairs = zip(texts[title]["none"], texts[title][str(line["kind"])], strict=True)
            line["same_answers"] = round(statistics.fmean(a == b for a, b in pairs), 4)
    return lines


def write_random(args: argparse.Namespace, folder: Path) -> Path:
    """Write a model of random weights in bf16, as official files are."""
    path = folder / "model.safetensors"
    save_file(checkpoint(args.version, MODELS[args.model], dtype=torch.bfloat16), path)
    return path


def named(args: argparse.Namespace) -> str:
    """Return what the random model is called."""
    return f"RWKV-{args.version} {args.model} (random weights)"


if __name__ == "__main__":
    main()
