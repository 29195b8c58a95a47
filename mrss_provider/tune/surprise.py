"""Which tokens of an answer are facts where the data does not say: those that surprise a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mrss_provider.tune.chats import Line
from mrss_provider.tune.examples import make_batch
from mrss_provider.tune.network import Weights, base_state, logits, read_rows

_EXAMPLES_A_PASS = 8


def mark_surprising(
    weights: Weights, lines: Sequence[Line], share: float, max_len: int
) -> list[Line]:
    """Return `lines` in which the tokens of answers that surprise the base most are facts.

    A line that names its facts, or says that it has none, is left as it is.

    Args:
        weights: of the model.
        lines: of a file.
        share: of the answers' tokens (of all lines that do not say), in (0, 1].
        max_len: tokens that are predicted; what comes after them is no fact.
    """
    silent = [i for i, line in enumerate(lines) if line.facts is None]
    scored = dict(zip(silent, _nats(weights, [lines[i] for i in silent], max_len), strict=True))
    if not scored:
        return list(lines)
    everything = torch.cat([nats[nats >= 0] for nats in scored.values()])
    count = max(1, round(share * len(everything)))
    threshold = everything.topk(min(count, len(everything))).values[-1] if len(everything) else 0.0
    marked = list(lines)
    for i, nats in scored.items():
        line = lines[i]
        flags = (nats >= threshold) & (nats >= 0)
        size = len(line.example.token_ids)
        fact = tuple(flags.tolist()) + (False,) * (size - len(flags))
        marked[i] = replace(line, example=replace(line.example, fact=fact))
    return marked


@torch.no_grad()
def _nats(weights: Weights, lines: Sequence[Line], max_len: int) -> list[Tensor]:
    """Return what the base pays for every token of each example, -1 where no answer is."""
    base = base_state(weights)
    found = []
    for start in range(0, len(lines), _EXAMPLES_A_PASS):
        examples = [line.example for line in lines[start : start + _EXAMPLES_A_PASS]]
        batch = make_batch(examples, max_len, weights["emb.weight"].device)
        rows = base.expand(len(examples), *base.shape)
        hidden = read_rows(weights, batch.inputs, batch.lengths, rows)
        nats = torch.full(batch.inputs.shape, -1.0, device=hidden.device)
        log_probs = logits(weights, hidden[batch.answer]).log_softmax(-1)
        nats[batch.answer] = -log_probs.gather(-1, batch.targets[batch.answer][:, None])[:, 0]
        for row, example in zip(nats.cpu(), examples, strict=True):
            size = min(len(example.token_ids), max_len + 1) - 1
            found.append(torch.cat((torch.tensor([-1.0]), row[:size])))
    return found
