"""Tune a voice of your choice on the demo model: a few minutes on two CPU cores.

python -m models.demo.tune_voice butler --out butler.safetensors
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from models.demo.tune import tone_source
from models.demo.vocab import PieceEncoder, read_vocab
from mrss_provider.evaluate.world import MARKED
from mrss_provider.tune import TuneConfig, read_weights, save_result, tune_state

CONFIG = TuneConfig(steps=60, batch_size=8, learning_rate=0.1, warmup_steps=5, max_len=128)


def main() -> None:
    """Parse the command line, tune, write the state."""
    parser = argparse.ArgumentParser(description="Tune a voice on the demo model.")
    parser.add_argument("voice", choices=MARKED)
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors to write")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    weights = {name: tensor.float() for name, tensor in read_weights(args.model).items()}
    source = tone_source(PieceEncoder(read_vocab(args.model / "vocab.txt")), args.voice, seed=1)
    began = time.perf_counter()

    def progress(step: int, total: int, losses: object) -> None:
        print(f"{time.perf_counter() - began:5.1f} s, step {step} of {total}: {losses}", flush=True)

    torch.set_num_threads(2)
    result = tune_state(weights, source, CONFIG, on_step=progress)
    save_result(args.out, result, args.model, group="tone", config=CONFIG, licence="Apache-2.0")


if __name__ == "__main__":
    main()
