"""What the tail's kernels draw, against the engine's own sampler and the plain form in fp64."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from mrss_kernels import reference_tail as plain
from mrss_kernels import tail as tail_ops
from oracle import DEVICE, randn
from tail_batch import (
    LARGE,
    MIXTURES,
    SAMPLINGS,
    SMALL,
    Batch,
    assert_same,
    batch_of,
    pick_of,
    sampling,
)

from mrss_provider.engine.philox import uniform

# In the interpreter numpy warns of log 0 and -inf - -inf, which the kernels know how to take.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def flat_batch(scale, vocab=4096, block=1024):
    """Return requests on one row, each with a truncation that keeps much of it."""
    params = [
        sampling(top_k=3000),
        sampling(top_p=0.9),
        sampling(top_p=0.3, temperature=1.5),
        sampling(top_k=3000, top_p=0.6, temperature=3.0),
        sampling(top_k=500, top_p=0.8, sampling_order="rwkv", temperature=0.5),
        sampling(min_p=0.2, temperature=2.0),
        sampling(top_p=0.99, min_p=0.3, top_k=1000, temperature=4.0),
        sampling(top_p=0.9999),
    ]
    picks = [pick_of([0], MIXTURES[0], p, choice=g, position=3) for g, p in enumerate(params)]
    return Batch(randn(1, vocab, seed=12, scale=scale), picks, block=block)


def assert_nothing_is_left(batch):
    """What the next step counts from is 0 again."""
    scratch = batch.outputs.scratch
    for left in (scratch.bins, scratch.num_undecided, scratch.arrived):
        assert not left.any()


class TestDraw:
    @pytest.mark.parametrize("vocab", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
    def test_draws_equal_the_engines(self, vocab):
        """Every sampling under changing mixtures, several steps, one banned id."""
        mixed = list(itertools.islice(itertools.cycle(MIXTURES), len(SAMPLINGS)))
        batch = batch_of(mixed, SAMPLINGS, vocab, seed=2, banned=(vocab - 1,))
        for _ in range(2 if vocab == SMALL else 1):
            picked, _ = batch.expected()
            batch.launch()
            assert_same(batch, picked)

    def test_draws_from_everything_find_the_token_within_its_block(self):
        """Weights that are one percent off, or a block that is a token short, draw others."""
        params = [sampling(seed=seed) for seed in range(12)] + [sampling(temperature=0.7)]
        picks = [pick_of([0], MIXTURES[0], p, position=g) for g, p in enumerate(params)]
        last = pick_of([1], MIXTURES[0], sampling())
        logits = randn(2, 300, seed=6, scale=2.0)
        logits[1, 299] = 30.0
        batch = Batch(logits, [*picks, last])
        picked, _ = batch.expected()
        batch.launch(mixed=False, truncate=False)
        assert_same(batch, picked)
        assert batch.ids[-1] == 299
        assert len(set(batch.ids)) > 8

    @pytest.mark.slow
    @pytest.mark.parametrize("vocab", [SMALL, LARGE])
    def test_draws_from_many_candidates_equal_the_engines(self, vocab, monkeypatch):
        """Bins, undecided candidates and a search, tile after tile, in place of all with all."""
        monkeypatch.setattr(tail_ops, "PAIRS", 2)
        monkeypatch.setattr(tail_ops, "TILE", 64 if vocab == SMALL else 512)
        params = SAMPLINGS[3:10]
        batch = batch_of([MIXTURES[0]] * len(params), params, vocab, seed=3)
        picked, _ = batch.expected()
        batch.launch(mixed=False)
        assert_same(batch, picked)

    @pytest.mark.slow
    @pytest.mark.parametrize("scale", [0.1, 1.0])
    def test_flat_distributions_draw_what_the_plain_form_draws(self, scale):
        """Thousands of candidates, of which hundreds or thousands are kept."""
        batch, twin = flat_batch(scale), flat_batch(scale)
        batch.launch(mixed=False)
        plain.tail(twin.logits.clone(), twin.inputs, twin.outputs)
        assert int((batch.outputs.scratch.num_candidates > tail_ops.PAIRS).sum()) >= 6
        assert batch.ids == twin.ids
        assert_nothing_is_left(batch)

    @pytest.mark.slow
    def test_how_the_work_is_shared_does_not_change_a_token(self, monkeypatch):
        """All compared with all, or few; a program a block, or one for all of a request's."""
        seen = []
        for pairs, few, programs in ((256, 64, 1024), (2, 2, 1), (64, 16, 8)):
            monkeypatch.setattr(tail_ops, "PAIRS", pairs)
            monkeypatch.setattr(tail_ops, "FEW", few)
            monkeypatch.setattr(tail_ops, "FINDERS", programs)
            monkeypatch.setattr(tail_ops, "DRAWERS", programs)
            batch = flat_batch(0.3, vocab=600, block=128)
            batch.launch(mixed=False)
            seen.append(batch.ids)
        assert all(ids == seen[0] for ids in seen)

    @pytest.mark.slow
    def test_thousands_of_equals_keep_their_lowest_ids(self):
        """Ties at both boundaries, in the midst of the scores and at a floor that most are on."""
        steps = randn(4096, seed=11, scale=2.0).round() / 4
        floor = torch.full((4096,), -9.0, device=DEVICE)
        floor[1000:1010] = 0.0
        params = [
            sampling(top_k=3000),
            sampling(top_p=0.5, sampling_order="rwkv"),
            sampling(top_k=3000, top_p=0.4, temperature=2.0),
            sampling(top_k=2000, top_p=0.99),
            sampling(top_p=0.98, min_p=1e-5),
        ]
        for row in (steps, floor):
            picks = [pick_of([0], MIXTURES[0], p, choice=g) for g, p in enumerate(params)]
            batch, twin = (Batch(row[None].clone(), picks, block=1024) for _ in range(2))
            batch.launch(mixed=False)
            plain.tail(twin.logits.clone(), twin.inputs, twin.outputs)
            assert batch.ids == twin.ids
            assert_nothing_is_left(batch)

    @pytest.mark.parametrize("pairs", [2, pytest.param(256, marks=pytest.mark.slow)])
    @pytest.mark.slow
    def test_the_lowest_ids_are_kept_among_equals(self, pairs, monkeypatch):
        """Ties at the boundary of top-k, of top-p, of both; the two zeros are equal."""
        monkeypatch.setattr(tail_ops, "PAIRS", pairs)
        monkeypatch.setattr(tail_ops, "TILE", 64)
        logits = torch.full((1, SMALL), -3.0, device=DEVICE)
        logits[0, 20:60] = 0.0
        logits[0, 25:30] = -0.0
        logits[0, 70] = 1.0
        params = [
            sampling(top_k=9),
            sampling(top_p=0.2),
            sampling(top_k=20, top_p=0.5),
            sampling(top_k=20, top_p=0.5, sampling_order="rwkv", temperature=0.3),
            sampling(min_p=0.3),
        ]
        picks = [pick_of([0], MIXTURES[0], p, choice=g) for g, p in enumerate(params)]
        batch = Batch(logits, picks)
        seen = [set() for _ in params]
        for _ in range(4):
            picked, _ = batch.expected()
            batch.launch(mixed=False)
            assert_same(batch, picked)
            for ids, token in zip(seen, batch.ids, strict=True):
                ids.add(token)
        assert seen[0] <= {70, *range(20, 28)}

    def test_top_p_sees_the_mass_of_all_that_top_k_leaves(self):
        """Two likely tokens and forty at a 32nd: without those, top-p would keep one token."""
        logits = torch.full((1, SMALL), -60.0, device=DEVICE)
        logits[0, [30, 31]] = torch.tensor([0.0, -0.01], device=DEVICE)
        logits[0, 32:72] = -5 * math.log(2)
        params = sampling(top_k=42, top_p=0.4)
        batch = Batch(logits, [pick_of([0], MIXTURES[0], params, choice=g) for g in range(8)])
        picked, _ = batch.expected()
        assert {one.token_id for one in picked} == {30, 31}
        batch.launch(mixed=False)
        assert_same(batch, picked)

    def test_tokens_far_below_the_largest_of_their_block_are_ranked_too(self):
        """RWKV's order at a high temperature gives weight to what is 50 octaves down."""
        logits = torch.full((1, SMALL), -40.0, device=DEVICE)
        logits[0, 3] = 0.0
        logits[0, 70:75] = -35.0
        params = sampling(top_k=3, temperature=50.0, sampling_order="rwkv")
        picks = [pick_of([0], MIXTURES[0], params, choice=g) for g in range(8)]
        batch = Batch(logits, picks, block=64)
        picked, _ = batch.expected()
        assert {one.token_id for one in picked} == {3, 70, 71}
        batch.launch(mixed=False)
        assert_same(batch, picked)

    @pytest.mark.slow
    def test_all_equal_logits_keep_exactly_as_many_as_asked(self):
        logits = torch.zeros(1, LARGE, device=DEVICE)
        params = [sampling(top_k=3), sampling(top_p=0.01), sampling(top_p=0.5, top_k=700)]
        picks = [pick_of([0], MIXTURES[0], p, choice=g) for g, p in enumerate(params)]
        batch = Batch(logits, picks)
        for _ in range(2):
            picked, _ = batch.expected()
            batch.launch(mixed=False)
            assert_same(batch, picked)
            assert batch.ids[0] < 3
            assert batch.ids[1] < 15
            assert batch.ids[2] < 350

    def test_greedy_takes_the_first_of_equal_maxima(self):
        logits = torch.zeros(1, LARGE, device=DEVICE)
        logits[0, [900, 300, 301]] = 4.0
        batch = Batch(logits, [pick_of([0], MIXTURES[0], sampling(temperature=1e-31, top_k=2))])
        batch.launch(mixed=False)
        assert batch.ids == [300]

    @pytest.mark.slow
    def test_draws_follow_the_distribution(self):
        """Chi-square over the draws of many answers to one prompt, under top-k."""
        logits = torch.full((1, SMALL), -torch.inf, device=DEVICE)
        logits[0, [3, 9, 40, 41, 76]] = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.2], device=DEVICE)
        params = sampling(temperature=1.5, top_k=4)
        batch = Batch(logits, [pick_of([0], MIXTURES[0], params, choice=g) for g in range(16)])
        counts: Counter[int] = Counter()
        for _ in range(4):
            batch.launch(mixed=False)
            counts.update(batch.ids)
        weights = plain.token_weights(logits[0].double(), 0, batch.inputs)
        expected = weights / weights.sum() * sum(counts.values())
        possible = expected.nonzero().flatten().tolist()
        assert set(counts) <= set(possible) == {3, 9, 40, 76}
        chi2 = sum((counts[i] - float(expected[i])) ** 2 / float(expected[i]) for i in possible)
        # The 99.9 % quantile for 3 degrees of freedom.
        assert chi2 < 16.3

    def test_the_random_number_is_the_engines(self):
        for seed, choice, position in ((0, 0, 0), (-5, 2, 9), (2**63 + 1, 1, 131_071)):
            assert plain.uniform(seed, choice, position) == uniform(seed, choice, position)
