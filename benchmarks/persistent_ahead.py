"""How many blocks of weights the persistent decode step should have under way, found by search.

`mrss_kernels.persistent7_ahead.AHEAD` has the results. A run starts at what stands there and keeps
every change that makes the whole step faster twice; each number of rows takes the given seconds.

    python benchmarks/persistent_ahead.py --models 1.5b 7.2b --rows 1 4 8 --seconds 12
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable

import torch
from measure import capture, time_replays
from mrss_kernels import persistent7_ahead
from mrss_kernels.persistent7 import PersistentLayers7
from mrss_kernels.persistent7_choice import ROWS
from random_models import SHAPES, random_model

from mrss_provider.model.rwkv7_cuda import FusedDecoder

# A change is kept if it saves more than this share of a step's time, in two measurements.
_GAIN = 5e-4
# Measurements after which the best one is measured again, as clocks drift.
_DRIFT = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["1.5b"], choices=sorted(SHAPES))
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1, 2, 4, 5, 8, 12], choices=ROWS, metavar="N"
    )
    parser.add_argument("--seconds", type=float, default=12.0)
    options = parser.parse_args()
    os.environ["MRSS_DECODE"] = "persistent"
    torch.set_grad_enabled(False)
    for name in options.models:
        model = random_model(SHAPES[name], dtype="fp16")
        fused = model.fused
        assert isinstance(fused, FusedDecoder)
        if fused.persistent_obstacle is not None:
            raise SystemExit(f"{name} does not run in one launch: {fused.persistent_obstacle}")
        for rows in options.rows:
            pool = model.new_pool(rows)
            ids = torch.arange(rows, device="cuda")

            def step(fused=fused, ids=ids, pool=pool) -> torch.Tensor:
                return fused.decode_logits(ids, ids, pool)

            fused.persistent_rows = ()
            launches = time_replays(capture(step), budget_s=0.1).median_ms
            fused.persistent_rows = ROWS
            print(f"{name}, {rows} rows: launch by launch {launches:.4f} ms")
            _search(fused, step, SHAPES[name].hidden_size, rows, options.seconds)


def _search(
    fused: FusedDecoder,
    step: Callable[[], torch.Tensor],
    channels: int,
    rows: int,
    seconds: float,
) -> None:
    """Print the best digits that were found for steps of so many rows, and their time."""
    assert fused._persistent is not None
    layers = fused._persistent._layers
    card = torch.cuda.get_device_name()
    by_rows = dict(persistent7_ahead.table_of(card, channels))
    persistent7_ahead.AHEAD.setdefault(card, {})[channels] = by_rows

    def time_of(words: list[str], budget_s: float = 0.04) -> float:
        by_rows[rows] = " ".join(words)
        fused._persistent = PersistentLayers7(layers, [rows])
        return time_replays(capture(step), budget_s=budget_s).median_ms

    nearest = min((limit for limit in by_rows if limit >= rows), default=max(by_rows))
    best = by_rows[nearest].split()
    fastest = first = time_of(best, 0.1)
    draw = random.Random(rows)
    tried, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        words = _change(best, draw)
        tried += 1
        if time_of(words) < fastest * (1 - _GAIN):
            found = time_of(words, 0.08)
            if found < fastest * (1 - _GAIN):
                best, fastest = words, found
        if tried % _DRIFT == 0:
            fastest = time_of(best, 0.1)
    print(f"  in one launch {first:.4f} ms, after {tried} tries {time_of(best, 0.2):.4f} ms")
    print(f'  {rows}: "{" ".join(best)}",', flush=True)


def _change(words: list[str], draw: random.Random) -> list[str]:
    """Return the words with one or two runs of digits set to another one."""
    changed = [list(word) for word in words]
    for _ in range(draw.choice((1, 1, 2))):
        word = draw.choices(changed, weights=[len(word) for word in changed])[0]
        first = draw.randrange(len(word))
        length = min(draw.choice((1, 1, 2, 3, 4, 8)), len(word) - first)
        word[first : first + length] = draw.choice("00112") * length
    return ["".join(word) for word in changed]


if __name__ == "__main__":
    main()
