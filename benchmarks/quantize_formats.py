"""Which 4 bits: how well the bundled model predicts with weights rounded in several ways.

    python benchmarks/quantize_formats.py

Weights are rounded and the model is computed in fp32 on a CPU: what is measured is the rounding
alone. All that CUDA quantises is rounded, unless a line says otherwise. JSON lines go to
benchmarks/results/quantize.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable

import torch
from cpu_decode import commit, cpu_name
from measure import RESULTS
from quantize_scores import against, scores, unseen_documents
from torch import Tensor

from mrss_provider.config import DEMO_MODEL
from mrss_provider.model import Model
from mrss_provider.model.weights import load_weights

FIRST_HALVES = (".w1", ".a1", ".g1", ".v1")
LARGE = (".receptance.weight", ".key.weight", ".value.weight", ".output.weight")
HEAD = ("head.weight",)
EVERYTHING = LARGE + FIRST_HALVES + HEAD
SHRINKS = tuple(1 - 0.04 * i for i in range(10))

# Of QLoRA (arXiv:2305.14314), appendix E, and OCP's e2m1 over its largest number.
NF4_BELOW = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105)
NF4_ABOVE = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0)
NF4 = (*NF4_BELOW, 0.0, *NF4_ABOVE)
FP4 = tuple(n / 6 for n in (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6))

Round = Callable[[Tensor, float], Tensor]


def even(groups: Tensor, shrink: float) -> Tensor:
    """Round to 16 even steps, the largest of which is negative times the scale's sign."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (largest * (-shrink / 8)).half().float()
    scale = torch.where(scale == 0, 2.0**-24, scale)
    return (groups / scale).round().clamp(-8, 7) * scale


def between(groups: Tensor, shrink: float) -> Tensor:
    """Round to 16 even steps from the least to the largest."""
    least, largest = (shrink * end for end in (groups.amin(-1, True), groups.amax(-1, True)))
    scale = ((largest - least) / 15).clamp_min(1e-7).half().float()
    zero = (-least / scale).round()
    return (((groups / scale).round() + zero).clamp(0, 15) - zero) * scale


def of_numbers(numbers: tuple[float, ...]) -> Round:
    """Return what rounds to the nearest of some numbers, the largest of which is 1."""
    table = torch.tensor(numbers)
    edges = (table[1:] + table[:-1]) / 2

    def nearest(groups: Tensor, shrink: float) -> Tensor:
        scale = (groups.abs().amax(-1, True) * shrink).clamp_min(1e-7).half().float()
        return table[torch.bucketize((groups / scale).contiguous(), edges)] * scale

    return nearest


FORMS: dict[str, Round] = {
    "even steps around zero": even,
    "even steps from least to largest": between,
    "nf4": of_numbers(NF4),
    "fp4": of_numbers(FP4),
}
CELLS = [
    *((form, size, 10, EVERYTHING) for form in FORMS for size in (64, 128)),
    ("even steps around zero", 32, 10, EVERYTHING),
    ("even steps around zero", 64, 1, EVERYTHING),
    ("nf4", 64, 1, EVERYTHING),
    ("even steps around zero", 64, 10, LARGE + HEAD),
    ("even steps around zero", 64, 10, LARGE + FIRST_HALVES),
]


def rounded(weight: Tensor, form: str, group_size: int, num_scales: int) -> Tensor:
    """Return a matrix [R, K] whose groups have the scale that leaves the least squared error."""
    groups = weight.float().contiguous().view(weight.shape[0], -1, group_size)
    best, least = groups, torch.full_like(groups[..., :1], torch.inf)
    for shrink in SHRINKS[:num_scales]:
        found = FORMS[form](groups, shrink)
        error = (found - groups).square().sum(-1, keepdim=True)
        best = torch.where(error < least, found, best)
        least = torch.minimum(error, least)
    return best.view(weight.shape)


def model_of(form: str | None, group_size: int, num_scales: int, names: tuple[str, ...]) -> Model:
    """Return the bundled model in fp32, with some of its matrices rounded."""
    weights = load_weights(DEMO_MODEL)
    tensors = dict(weights.tensors)
    for name, tensor in tensors.items():
        if form is not None and name.endswith(names) and tensor.ndim == 2:
            tensors[name] = rounded(tensor, form, group_size, num_scales)
    weights = dataclasses.replace(weights, tensors=tensors)
    return Model(weights, torch.device("cpu"), "fp32", "fp32", "onednn")


def main() -> None:
    """Score each cell, and write its line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=120)
    args = parser.parse_args()
    torch.set_num_threads(1)
    documents = unseen_documents(args.documents)
    wanted = scores(model_of(None, 0, 0, ()), documents)
    facts: dict[str, object] = {
        "benchmark": "quantize formats",
        "cpu": cpu_name(),
        "torch": torch.__version__,
    }
    facts |= {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "model": "bundled"}
    facts |= {"documents": len(documents), "tokens": sum(map(len, documents))}
    left_out = {LARGE + HEAD: "first halves of LoRAs", LARGE + FIRST_HALVES: "head"}
    for form, group_size, num_scales, names in CELLS:
        line = facts | {"form": form, "group_size": group_size, "scales_tried": num_scales}
        line |= {"not_rounded": left_out[names]} if names in left_out else {}
        got = scores(model_of(form, group_size, num_scales, names), documents)
        text = json.dumps(line | against(got, wanted, documents))
        print(text, flush=True)
        with (RESULTS / "quantize.jsonl").open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
