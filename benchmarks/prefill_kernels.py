"""What the kernels of a packed pass take on CUDA, cut in several ways.

Prints only; what is in use is marked. The bytes that a share refers to are those that must move
between the kernel and the memory, LoRAs' weights and states not counted; few tokens stay in the
L2, and may pass 100 %. Kernels are compiled by several processes before the first is timed.

    python benchmarks/prefill_kernels.py --models 1.5b 7.2b --tokens 160 8192
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from measure import capture, machine, time_replays
from mrss_kernels import (
    lora_down7,
    ragged_index,
    ragged_lora7,
    ragged_norm,
    rows_linear,
    time_inputs7,
    time_output7,
    wkv7_chunk,
)
from mrss_kernels.blocked import Form
from mrss_kernels.lora_down7 import DownConfig
from mrss_kernels.ragged_lora7 import TimeCut
from random_models import SHAPES, Shape
from torch import Tensor

from mrss_provider.model.config import DTYPES

BLOCKS_T = (1, 2, 4, 8, 16)
DOWN_CONFIGS = (
    DownConfig(16, 64, 128, 4, 4),
    DownConfig(16, 64, 256, 4, 3),
    DownConfig(32, 64, 128, 4, 4),
    DownConfig(32, 64, 256, 4, 3),
    DownConfig(64, 64, 64, 4, 4),
    DownConfig(64, 128, 64, 4, 4),
    DownConfig(128, 64, 64, 4, 3),
    DownConfig(128, 64, 64, 4, 4),
    DownConfig(128, 64, 128, 8, 3),
    DownConfig(128, 128, 64, 4, 3),
    DownConfig(128, 128, 64, 8, 3),
    DownConfig(128, 128, 64, 8, 4),
    DownConfig(256, 64, 64, 8, 3),
)
TIME_CUTS = (
    TimeCut(16, 4, 3),
    TimeCut(16, 8, 3),
    TimeCut(32, 4, 2),
    TimeCut(32, 4, 3),
    TimeCut(32, 8, 3),
    TimeCut(64, 4, 2),
    TimeCut(64, 4, 3),
    TimeCut(64, 8, 2),
    TimeCut(64, 8, 3),
    TimeCut(128, 8, 2),
    TimeCut(128, 8, 3),
)
FORMS = (
    Form("fp16", 64, 4, 3, 1),
    Form("fp16", 64, 4, 3, 2),
    Form("fp16", 64, 4, 3, 4),
    Form("fp16", 64, 4, 2, 1),
    Form("fp16", 64, 4, 4, 1),
    Form("fp16", 32, 2, 3, 1),
)
BF16_FORMS = (
    Form("bf16x3", 64, 4, 2, 2),
    Form("bf16x3", 64, 4, 3, 2),
    Form("bf16x3", 64, 4, 2, 4),
    Form("bf16x3", 16, 1, 3, 2),
)
FFN_CHUNKS = (1024, 2048, 4096, 8192)
COMPILERS = 12
COMPILE_S = 60.0
# Tokens of calls that only compile: a kernel does not depend on how many there are.
COMPILE_TOKENS = 160
PROMPTS = 8


class Cell(NamedTuple):
    """A call to be timed, and how many [T, C] of 16 bits it moves; None: it is no matter of them.

    `chosen` is the cut that is in use at this number of tokens, where the call has one.
    """

    kernel: str
    cut: object
    planes: int | None
    call: Callable[[], object]
    chosen: object = None


def lengths_of(tokens: int) -> list[int]:
    """Return the sequences' lengths: prompts, or one of 128 tokens behind decoding rows."""
    if tokens < 1024:
        prompt = min(tokens, 128)
        return [1] * (tokens - prompt) + [prompt]
    return [tokens // PROMPTS] * PROMPTS


class Kernels:
    """The inputs of one layer's kernels at some number of tokens."""

    def __init__(self, shape: Shape, lengths: list[int], dtype: torch.dtype) -> None:
        """Draw them for packed sequences of `lengths`."""
        w, a, v, g = (-(-rank // 64) * 64 for rank in shape.ranks)
        self.ranks = (w, a, g, v)
        self.size, self.dtype = shape.head_size, dtype
        count, c, n = sum(lengths), shape.hidden_size, len(lengths)
        self.count, self.heads = count, c // self.size
        self.bounds = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda")
        self.slots = torch.arange(n, device="cuda")
        self.index = ragged_index.ragged_index(self.bounds, self.slots, count)
        self.x, self.vectors = self.draw(count, c, fp32=True), self.draw(8, c, fp32=True)
        self.parts, self.mixed = self.draw(1, count, c), self.draw(6, count, c)
        self.shift, self.mix = self.draw(n, c, fp32=True), self.draw(6, c, fp32=True)
        self.down, self.up = self.draw(sum(self.ranks), c), self.draw(c, sum(self.ranks))
        self.projected, self.first = self.draw(3, count, c), self.draw(count, c)
        self.y, self.hidden = self.draw(count, c), self.draw(count, shape.ffn_size)
        self.key, self.value = self.draw(shape.ffn_size, c), self.draw(c, shape.ffn_size)
        self.pool = self.draw(n, self.heads, self.size, self.size, fp32=True)
        self.low = lora_down7.lora_down7(self.mixed, self.down, self.ranks)
        self.inputs = self.time_inputs(None)

    def draw(self, *sizes: int, fp32: bool = False) -> Tensor:
        return torch.randn(*sizes, device="cuda").to(torch.float32 if fp32 else self.dtype)

    def norm_mix(self, block_t: int, mixes: int) -> object:
        norm = self.vectors[0]
        return ragged_norm.ragged_norm_mix(
            self.x, self.parts, norm, norm, self.shift, self.shift, self.index,
            self.mix[:mixes], dtype=self.dtype, block_t=block_t,
        )  # fmt: skip

    def lora_down(self, config: DownConfig) -> object:
        return lora_down7.lora_down7(self.mixed, self.down, self.ranks, config=config)

    def library_down(self) -> object:
        weights = torch.split(self.down, list(self.ranks))
        return [self.mixed[i] @ w.mT for i, w in zip((3, 4, 5, 2), weights, strict=True)]

    def time_inputs(self, cut: TimeCut | None) -> time_inputs7.TimeInputs:
        return time_inputs7.time_inputs7(
            self.projected, self.up, self.vectors, self.ranks, self.first, self.size,
            low=self.low, cut=cut,
        )  # fmt: skip

    def time_output(self, cut: TimeCut) -> object:
        return time_output7.time_output7(
            self.y, self.inputs, self.low[None], self.up, self.vectors, self.ranks, self.index,
            cut=cut,
        )  # fmt: skip

    def recurrence(self, form: Form) -> object:
        vectors = [x.view(self.count, self.heads, self.size) for x in self.inputs[:6]]
        return wkv7_chunk.wkv7_prefill(
            *vectors, self.pool, self.slots, self.bounds, out_dtype=self.dtype, form=form
        )

    def ffn(self, chunk_len: int) -> object:
        for first in range(0, self.count, chunk_len):
            chunk = slice(first, first + chunk_len)
            hidden = rows_linear.square_relu_(torch.mm(self.parts[0, chunk], self.key.t()))
            torch.mm(hidden, self.value.t(), out=self.first[chunk])
        return self.first

    def cells(self) -> Iterator[Cell]:
        """Yield what is to be compared."""
        for mixes, block_t in itertools.product((6, 1), BLOCKS_T):
            call = partial(self.norm_mix, block_t, mixes)
            yield Cell(f"norm_mix, {mixes} mixes", block_t, 5 + mixes, call)
        chosen = lora_down7._down_config(self.count)
        for config in DOWN_CONFIGS:
            yield Cell("lora_down", config, 4, partial(self.lora_down, config), chosen)
        yield Cell("lora_down", "four library products", 4, self.library_down)
        chosen_cut = ragged_lora7.choose_cut(self.count)
        for cut in TIME_CUTS:
            yield Cell("time_inputs", cut, 10, partial(self.time_inputs, cut), chosen_cut)
        for cut in TIME_CUTS:
            yield Cell("time_output", cut, 3, partial(self.time_output, cut), chosen_cut)
        states = len(self.slots) * self.heads
        chosen_form = wkv7_chunk.choose_form(states, self.size, self.dtype)
        for form in FORMS if self.dtype == torch.float16 else BF16_FORMS:
            yield Cell("recurrence", form, 8, partial(self.recurrence, form), chosen_form)
        yield Cell("relu^2", "in place", 8, lambda: rows_linear.square_relu_(self.hidden))
        for chunk_len in FFN_CHUNKS:
            if chunk_len <= self.count:
                yield Cell("ffn, tokens at a time", chunk_len, None, partial(self.ffn, chunk_len))


def report(cell: Cell, plane: int, read_tb_per_s: float) -> None:
    """Time ten calls in a row, as a pass has them: one would show what a launch takes."""
    graph = capture(lambda: [cell.call() for _ in range(10)])
    us = time_replays(graph, count=20).median_ms * 100
    cut = tuple(cell.cut) if isinstance(cell.cut, tuple) else cell.cut
    line = f"  {cell.kernel:22} {cut!s:38} {us:8.1f} us"
    if cell.planes is not None:
        line += f", {cell.planes * plane / (us * 1e6 * read_tb_per_s):5.0%} of the read bandwidth"
    print(line + (", in use" if cell.cut == cell.chosen else ""))


def compile_only(shape: Shape, dtype: torch.dtype, kernels: str, part: int) -> None:
    """Launch every `COMPILERS`-th cell once, which leaves its kernels in Triton's cache."""
    # Two batches, because a kernel of the recurrence is compiled for a number of sequences.
    for lengths in (lengths_of(COMPILE_TOKENS), [COMPILE_TOKENS // PROMPTS] * PROMPTS):
        for i, cell in enumerate(Kernels(shape, lengths, dtype).cells()):
            if i % COMPILERS == part and kernels in cell.kernel:
                cell.call()
    torch.cuda.synchronize()


def compile_in_parallel(args: argparse.Namespace) -> None:
    """Fill Triton's cache from several processes; what fails shows later, where it is used."""
    started = time.monotonic()
    command = [sys.executable, __file__, "--dtype", args.dtype, "--kernels", args.kernels]
    for name in args.models:
        options = [*command, "--models", name, "--compile-only"]
        children = [subprocess.Popen([*options, str(i)]) for i in range(COMPILERS)]
        for child in children:
            try:
                child.wait(max(1.0, started + COMPILE_S - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    print(f"compiled in {time.monotonic() - started:.0f} s")


def main() -> None:
    """Parse, print the machine, sweep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models = [name for name, shape in SHAPES.items() if shape.version == 7]
    parser.add_argument("--models", nargs="+", choices=models, default=["1.5b", "7.2b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[160, 8192])
    parser.add_argument("--kernels", default="", help="only kernels whose name holds this")
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--compile-only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    dtype = DTYPES[args.dtype]
    if args.compile_only is not None:
        compile_only(SHAPES[args.models[0]], dtype, args.kernels, args.compile_only)
        return
    on = machine()
    print(on)
    compile_in_parallel(args)
    for name, tokens in itertools.product(args.models, args.tokens):
        print(f"kernels: {name}, {tokens} tokens")
        kernels = Kernels(SHAPES[name], lengths_of(tokens), dtype)
        for cell in kernels.cells():
            if args.kernels in cell.kernel:
                report(cell, tokens * SHAPES[name].hidden_size * 2, on.read_tb_per_s)
        del kernels
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
