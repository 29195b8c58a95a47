"""Requests as the engine has them and as the tail's kernels read them, for the checks of both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mrss_kernels import tail as tail_ops
from mrss_kernels.tail_tensors import GATES, ORDERS, RULES, TailInputs, TailOutputs
from oracle import DEVICE, randn

from mrss_provider.engine.gates.learned import Learned
from mrss_provider.engine.gating_layer import GatingLayer
from mrss_provider.engine.logits_processors import Bias, Occurrences
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.tail import Pick, merge_rows, pick_tokens
from mrss_provider.mixture import parse_method
from mrss_provider.sampling_params import SamplingParams

SMALL = 77
LARGE = 1447
BLOCK = 256


def learned(seed=0):
    """Return a gate with a network of random numbers, which says things of about a nat."""
    cpu = torch.Generator().manual_seed(seed)
    layer = GatingLayer(
        hidden=torch.randn(16, 10, generator=cpu) * 0.3,
        bias=torch.randn(16, generator=cpu) * 0.3,
        score=torch.randn(16, generator=cpu) * 0.3,
    )
    return Learned("check", layer, None)


def mixture(*weights, merge="linear", gate="fixed", cut=0.0, base=False, seed=0):
    """Return a mixture of as many rows as weights; `base`: row 0 is the base."""
    return ResolvedMixture(
        canonical="check",
        states=(None,) * len(weights),
        names=tuple(f"row{k}" for k in range(len(weights))),
        groups=("",) * len(weights),
        ratios=weights,
        weights=weights,
        merge=parse_method(merge, "merge", "merge"),
        gate=parse_method(gate, "gate", "gate"),
        cut=cut,
        base_row=0 if base else None,
        fingerprint="fp_check",
        trained_gate=learned(seed) if gate.startswith("learned") else None,
    )


MIXTURES = [
    mixture(1.0),
    mixture(0.3, 0.7),
    mixture(0.1, 0.2, 0.3, 0.4),
    mixture(0.2, 0.3, 0.5, merge="geometric"),
    mixture(0.0, 0.25, 0.25, 0.5, gate="novelty", base=True),
    mixture(0.5, 0.25, 0.25, merge="geometric", gate="novelty", base=True),
    mixture(0.0, 1.0, 0.5, merge="delta", base=True, cut=0.2),
    mixture(0.0, 1.0, 1.0, 1.0, 0.5, merge="delta", gate="novelty", base=True, cut=0.1),
    mixture(0.2, 0.4, 0.4, merge="delta", gate="novelty", base=True, cut=0.1),
    mixture(0.0, 1.5, merge="delta", base=True),
]
"""A few of each kind, in every size."""


def sampling(**values):
    return SamplingParams(**({"temperature": 1.0, "top_p": 1.0, "seed": 5} | values))


SAMPLINGS = [
    sampling(temperature=0.0),
    sampling(seed=-3, logit_bias={5: 3.0, 6: -100}),
    sampling(seed=2**63 + 11, temperature=0.7, top_p=0.8),
    sampling(temperature=1.3, top_p=0.9, sampling_order="rwkv", min_p=0.01),
    sampling(top_k=4),
    sampling(temperature=2.0, top_k=30, top_p=0.6),
    sampling(temperature=0.5, top_k=30, top_p=0.9, sampling_order="rwkv"),
    sampling(temperature=1.7, min_p=0.05),
    sampling(temperature=3.0, top_p=0.97),
    sampling(top_k=10_000),
    sampling(temperature=1e-9, top_p=0.5),
    sampling(top_p=0.9, frequency_penalty=0.5, presence_penalty=0.3, repetition_penalty=1.4),
]


class Batch:
    """Requests as the engine has them, and the same in the kernels' tensors."""

    def __init__(self, logits, picks, *, capacity=None, banned=(), block=BLOCK, max_rows=8):
        rows, vocab = logits.shape
        size = capacity or len(picks)
        self.picks = picks
        self.logits = logits
        self.banned = torch.tensor(banned, dtype=torch.int64)
        self.inputs = TailInputs.allocate(
            size,
            rows,
            vocab,
            num_count_rows=size,
            num_bias_rows=size,
            num_gate_rows=size,
            device=DEVICE,
        )
        self.inputs.banned[list(banned)] = 1
        self.token_ids, self.check_guard = guarded_ids(rows)
        self.outputs = TailOutputs.allocate(
            self.token_ids, size, rows, vocab, max_rows=max_rows, block=block
        )
        for g, pick in enumerate(picks):
            fill(self.inputs, g, pick)

    def expected(self):
        """Return what the engine picks, and the merged logits; counts move on."""
        logits = self.logits.cpu().clone()
        picked = pick_tokens(logits, self.picks, self.banned)
        merged = merge_rows(logits, [(pick.rows, pick.mixture) for pick in self.picks])
        for pick, one in zip(self.picks, picked, strict=True):
            if pick.occurrences is not None and one.token_id is not None:
                pick.occurrences.push(one.token_id)
        self.picks = [dataclasses.replace(pick, position=pick.position + 1) for pick in self.picks]
        return picked, merged

    def launch(self, **flags):
        tail_ops.launch_tail(self.logits.clone(), self.inputs, self.outputs, **flags)
        self.check_guard()

    @property
    def ids(self):
        return self.outputs.ids.tolist()


def guarded_ids(rows):
    room = torch.full((rows + 16,), 7, dtype=torch.int64, device=DEVICE)
    room[8 : 8 + rows] = -5

    def check():
        assert (room[:8] == 7).all()
        assert (room[8 + rows :] == 7).all()

    return room[8 : 8 + rows], check


def fill(inputs, g, pick):
    """Write one request into the tensors, as an engine would."""
    params, mixed = pick.sampling, pick.mixture
    first = pick.rows[0]
    values = {
        "first_row": first,
        "num_rows": len(pick.rows),
        "next_row": first,
        "rule": RULES.index(mixed.merge.name),
        "gate": GATES.index(mixed.gate.name),
        "base_named": int(mixed.base_row is not None and mixed.weights[0] > 0),
        "keep_merged": 1,
        "top_k": params.top_k,
        "order": ORDERS.index(params.sampling_order or "openai"),
        "choice": pick.choice,
        "position": pick.position,
        "cut": mixed.cut,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
    }
    given = mixed.gate.parameters
    if mixed.merge.name == "power":
        values["exponent"] = mixed.merge.number("exponent")
    if "tau" in given:
        values |= {"tau": given["tau"], "sharpness": given.get("exponent", 1.0)}
    if mixed.trained_gate is not None:
        values["gate_row"] = g
        inputs.gates[g] = mixed.trained_gate.layer.table
    seed = params.seed % 2**64
    inputs.seeds[g] = seed - 2**64 if seed >= 2**63 else seed
    inputs.named[first : first + len(pick.rows)] = torch.tensor(mixed.weights)
    if pick.occurrences is not None:
        values |= {
            "count_row": g,
            "repetition": params.repetition_penalty,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
            "decay": params.penalty_decay,
        }
        inputs.counts[g] = 0
        inputs.marks[g] = 0
        ids = torch.from_numpy(pick.occurrences.ids).to(DEVICE)
        inputs.counts[g, ids] = torch.from_numpy(pick.occurrences.counts).to(DEVICE)
        sampled = torch.from_numpy(pick.occurrences.sampled).to(DEVICE)
        inputs.marks[g, ids] = 1 + 2 * sampled.to(torch.uint8)
    if params.logit_bias:
        values["bias_row"] = g
        inputs.bias[g] = 0
        for i in pick.bias.banned:
            inputs.bias[g, i] = -torch.inf
        inputs.bias[g, torch.from_numpy(pick.bias.ids)] = torch.from_numpy(pick.bias.values).to(
            DEVICE
        )
    for name, value in values.items():
        inputs.column(name)[g] = value


def pick_of(rows, mixed, params, *, prompt=(), choice=0, position=0):
    params = dataclasses.replace(params, logprobs=True)
    seen = Occurrences(prompt, params) if params.has_penalties else None
    return Pick(rows, mixed, params, Bias(params), seen, choice, position)


def batch_of(mixtures, samplings, vocab, *, seed=0, scale=3.0, **options):
    """Return a batch of one request a pair, each with rows of its own."""
    picks, rows = [], 0
    for g, (mixed, params) in enumerate(zip(mixtures, samplings, strict=True)):
        own = range(rows, rows + mixed.rows)
        picks.append(pick_of(own, mixed, params, prompt=(1, 2), choice=g % 3, position=10 * g))
        rows += mixed.rows
    return Batch(randn(rows, vocab, seed=seed, scale=scale), picks, **options)


def assert_same(batch, picked):
    assert batch.ids[: len(picked)] == [-1 if p.token_id is None else p.token_id for p in picked]
    for g, one in enumerate(picked):
        if one.token_id is not None:
            assert float(batch.outputs.log_probs[g]) == pytest.approx(one.logprob, abs=2e-4)
