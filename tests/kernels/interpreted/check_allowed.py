"""Masks of grammars in the tail's kernels: against the engine's tail in torch, and against fp64."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from mrss_kernels import reference_tail as plain
from mrss_kernels.tail_tensors import GATES, MAX_ENDS, RULES, no_masks
from oracle import DEVICE, randn
from tail_batch import (
    LARGE,
    MIXTURES,
    SAMPLINGS,
    SMALL,
    Batch,
    assert_same,
    batch_of,
    mixture,
    pick_of,
    sampling,
)

from mrss_provider.engine.constraint import AllowedTokens, mask_of

# In the interpreter numpy warns of log 0 and -inf - -inf, which the kernels know how to take.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

END = 33


class Fixed:
    """A constraint whose mask is always the same."""

    param = "response_format"

    def __init__(self, allowed, vocab, end_ids=()):
        self.num_words = -(-vocab // 32)
        self.words = mask_of(sorted(allowed), self.num_words)
        self.end_ids = end_ids

    def fill_mask(self, words):
        words[:] = self.words


def looked(allowed, vocab, *, banned=(), end_ids=()):
    """Return the tokens of one answer, looked for."""
    answer = AllowedTokens(Fixed(allowed, vocab, end_ids), banned)
    answer.look()
    return answer


def constrain(batch, answers):
    """Let the requests of a batch have masks, None for those that have none."""
    vocab = batch.logits.shape[1]
    rows = no_masks(len(answers), vocab)
    for row, answer in zip(rows, answers, strict=True):
        if answer is not None:
            answer.pack(row.numpy())
    inputs = dataclasses.replace(batch.inputs, allowed=rows.to(DEVICE))
    for g, answer in enumerate(answers):
        inputs.column("allowed_row")[g] = -1 if answer is None else g
    batch.inputs = inputs
    pairs = zip(batch.picks, answers, strict=True)
    batch.picks = [dataclasses.replace(pick, allowed=answer) for pick, answer in pairs]
    return batch


def masks(count, vocab, *, seed=0):
    """Return masks of every kind in turns: a few tokens, half of them, one, the end alone, none."""
    generator = np.random.default_rng(seed)
    kinds = []
    for g in range(count):
        few = generator.choice(vocab, 5, replace=False).tolist()
        half = generator.choice(vocab, vocab // 2, replace=False).tolist()
        one = [int(generator.integers(1, vocab))]
        kinds.append([{*few, 0}, half, one, [0], None][g % 5])
    return kinds


class TestMasks:
    @pytest.mark.parametrize("vocab", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
    def test_draws_equal_the_engines(self, vocab):
        """Every sampling under changing mixtures and masks, with tokens that mean the end."""
        mixed = list(itertools.islice(itertools.cycle(MIXTURES), len(SAMPLINGS)))
        batch = batch_of(mixed, SAMPLINGS, vocab, seed=2, banned=(vocab - 1,))
        answers = [
            None
            if allowed is None
            else looked(
                {*allowed} - {vocab - 1, END} | {7 + g},
                vocab,
                banned=pick.bias.banned,
                end_ids=(END, 50),
            )
            for g, (allowed, pick) in enumerate(zip(masks(12, vocab), batch.picks, strict=True))
        ]
        constrain(batch, answers)
        picked, _ = batch.expected()
        batch.launch()
        assert_same(batch, picked)
        for token, answer in zip(batch.ids, answers, strict=True):
            assert answer is None or answer.words[token // 32] >> np.uint32(token % 32) & 1

    @pytest.mark.slow
    def test_every_rule_and_gate_equals_the_plain_form(self):
        """Its log-probabilities are of what is allowed: over that the merge sums to 1."""
        pairs = [(rule, gate) for rule in RULES for gate in GATES]
        texts = {"power": "power:0.5", "novelty": "novelty:0.5,2", "learned": "novelty"}
        mixed = [
            mixture(
                *(0.0, 1.0, 1.0, 0.5 if rule != "contrast" else -0.5),
                merge=texts.get(rule, rule),
                gate=texts.get(gate, gate),
                base=True,
                cut=0.1 if rule in ("delta", "contrast") else 0.0,
            )
            for rule, gate in pairs
        ]
        params = [dataclasses.replace(SAMPLINGS[g % 11], logprobs=True) for g in range(len(mixed))]
        batch, twin = (batch_of(mixed, params, SMALL, seed=4) for _ in range(2))
        allowed = [{1, 9, 40, 64, 70 + g % 5} for g in range(len(mixed))]
        for one in (batch, twin):
            constrain(one, [looked(own, SMALL) for own in allowed])
            for g, (_, gate) in enumerate(pairs):
                one.inputs.column("gate")[g] = GATES.index(gate)
                one.inputs.gates.copy_(randn(*one.inputs.gates.shape, seed=9, scale=0.3))
        batch.launch()
        plain.tail(twin.logits.clone(), twin.inputs, twin.outputs)
        assert batch.ids == twin.ids
        for g, own in enumerate(allowed):
            assert batch.ids[g] in own
            whole = float(batch.outputs.merged[g].softmax(-1)[sorted(own)].sum())
            assert whole == pytest.approx(1.0, abs=1e-5)
        assert torch.allclose(batch.outputs.log_probs, twin.outputs.log_probs, atol=2e-4)

    def test_one_token_or_none_is_what_a_mask_leaves(self):
        """One token is drawn whatever it is worth; nothing at all fails its request alone."""
        batch = batch_of([MIXTURES[1], MIXTURES[0], MIXTURES[7]], [sampling(top_p=0.5)] * 3, SMALL)
        batch.logits[:2, 41] = -60.0
        nothing = looked([], SMALL, banned=[])
        assert nothing.error is not None
        constrain(batch, [looked([41], SMALL), nothing, looked([0], SMALL)])
        batch.launch()
        assert batch.ids == [41, -1, 0]
        assert batch.outputs.log_probs[[0, 2]].abs().max() < 1e-5

    def test_a_ban_and_a_mask_leave_what_both_do(self):
        params = sampling(logit_bias={5: -100}, temperature=0.0)
        batch = batch_of([MIXTURES[3]], [params], SMALL, banned=(6,))
        batch.logits[:, 5:8] = torch.tensor([9.0, 8.0, 1.0], device=DEVICE)
        constrain(batch, [looked([5, 6, 7], SMALL)])
        batch.launch()
        assert batch.ids == [7]

    def test_the_end_takes_the_probability_of_what_means_it_once(self):
        """Also where answers share the rows: then one of them has the mask."""
        logits = randn(2, SMALL, seed=8)
        expected = logits[:, [0, 33, 70]].double().logsumexp(-1).float()
        picks = [pick_of(range(2), mixture(1.0, 0.0), sampling(), choice=g) for g in range(2)]
        answer = looked([0, 5, 64], SMALL, end_ids=(33, 70))
        batch = constrain(Batch(logits.clone(), picks), [answer, None])
        batch.launch()
        batch.picks[1] = dataclasses.replace(batch.picks[1], allowed=answer)
        picked, _ = batch.expected()
        assert_same(batch, picked)
        merged = batch.outputs.merged
        for g in range(2):
            assert float(merged[g, 0] - merged[g, 5]) == pytest.approx(
                float(expected[0] - logits[0, 5]), abs=1e-5
            )
            assert merged[g, [33, 70, 6]].isinf().all()

    @pytest.mark.parametrize("vocab", [31, 32, 33, 95])
    def test_a_mask_is_read_to_its_last_bit(self, vocab):
        allowed = [0, vocab // 2, vocab - 1]
        batch = Batch(randn(1, vocab, seed=1), [pick_of([0], MIXTURES[0], sampling())], block=32)
        constrain(batch, [looked(allowed, vocab)])
        batch.inputs.column("bias_row")[0] = 0
        batch.inputs = dataclasses.replace(batch.inputs, bias=torch.zeros(1, vocab, device=DEVICE))
        batch.launch()
        left = batch.outputs.merged[0].isfinite().nonzero().flatten().tolist()
        assert left == allowed

    def test_requests_without_a_mask_have_the_bits_that_they_have_alone(self):
        mixed = [MIXTURES[0], MIXTURES[4], MIXTURES[7]]
        params = [sampling(top_p=0.8), sampling(), sampling(top_k=9)]
        alone, beside = (batch_of(mixed, params, SMALL, seed=6) for _ in range(2))
        constrain(beside, [None, looked([3, 4], SMALL), None])
        alone.launch(constrained=False)
        beside.launch()
        for g in (0, 2):
            assert alone.ids[g] == beside.ids[g]
            assert alone.outputs.log_probs[g].equal(beside.outputs.log_probs[g])
            assert alone.outputs.merged[g].equal(beside.outputs.merged[g])

    def test_a_mask_of_another_size_is_refused(self):
        batch = batch_of([MIXTURES[0]], [sampling()], SMALL)
        allowed = torch.zeros(1, 3 + MAX_ENDS - 1, dtype=torch.int32, device=DEVICE)
        batch.inputs = dataclasses.replace(batch.inputs, allowed=allowed)
        with pytest.raises(ValueError, match="allowed must have shape"):
            batch.launch()
