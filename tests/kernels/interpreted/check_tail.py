"""The tail's kernels against the engine's own tail in torch, and against the plain form in fp64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from mrss_kernels import reference_tail as plain
from mrss_kernels import tail as tail_ops
from mrss_kernels import tail_common as kernels
from mrss_kernels.tail_tensors import choose_block
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

from mrss_provider.engine import sampler
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


class TestOneRow:
    def test_one_row_comes_back_bit_for_bit_with_and_without_a_copy(self):
        batch = batch_of([MIXTURES[0]] * 2, [sampling(seed=1), sampling(seed=2)], LARGE)
        picked, _ = batch.expected()
        batch.inputs.column("keep_merged")[1] = 0
        batch.outputs.merged.fill_(-7.0)
        batch.launch(mixed=False, truncate=False)
        assert batch.outputs.merged[0].equal(batch.logits[0])
        assert (batch.outputs.merged[1] == -7).all()
        assert_same(batch, picked)

    def test_constants_are_the_engines(self):
        assert kernels.MIN_TEMPERATURE.value == sampler._MIN_TEMPERATURE == plain.MIN_TEMPERATURE


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


class TestPenalties:
    @pytest.mark.slow
    def test_counts_decay_and_grow_as_the_engines(self):
        """Five steps: tokens, and at the end counts and marks, which the kernels kept alone."""
        params = [
            sampling(seed=1, frequency_penalty=1.5, penalty_decay=0.9),
            sampling(seed=2, presence_penalty=2.0, top_p=0.9),
            sampling(seed=3, repetition_penalty=3.0, temperature=0.0),
            sampling(seed=4, repetition_penalty=0.5, frequency_penalty=-1.0, logit_bias={4: 2.0}),
        ]
        mixed = [MIXTURES[0], MIXTURES[1], MIXTURES[0], MIXTURES[6]]
        batch = batch_of(mixed, params, SMALL, seed=5, scale=1.0)
        for _ in range(5):
            picked, _ = batch.expected()
            batch.launch()
            assert_same(batch, picked)
        for g, pick in enumerate(batch.picks):
            counts, marks = torch.zeros(SMALL), torch.zeros(SMALL, dtype=torch.uint8)
            counts[torch.from_numpy(pick.occurrences.ids)] = torch.from_numpy(
                pick.occurrences.counts
            )
            sampled = torch.from_numpy(pick.occurrences.sampled).to(torch.uint8)
            marks[torch.from_numpy(pick.occurrences.ids)] = 1 + 2 * sampled
            assert batch.inputs.counts[g].cpu().equal(counts)
            assert batch.inputs.marks[g].cpu().equal(marks)
            assert int(batch.inputs.column("position")[g]) == pick.position

    def test_every_tokens_bias_counts(self):
        values = (torch.arange(SMALL) * 7 % 13 - 6.0).tolist()
        biased = sampling(logit_bias=dict(enumerate(values)))
        batch = batch_of([MIXTURES[0], MIXTURES[1]], [biased, biased], SMALL, seed=8)
        picked, _ = batch.expected()
        batch.launch()
        assert_same(batch, picked)
        bias = torch.tensor(values, device=DEVICE)
        assert batch.outputs.scratch.scores[:2].equal(batch.outputs.merged[:2] + bias)

    def test_bans_come_before_the_gate_and_bias_after_the_penalties(self):
        """A banned token sets no threshold; a positive bias is not divided by a penalty."""
        logits = torch.full((4, SMALL), -20.0, device=DEVICE)
        logits[:3, 7], logits[:3, 9], logits[:3, 11] = 20.0, 5.0, 4.0
        logits[3, 5], logits[3, 6] = 4.0, 3.0
        banned = sampling(logit_bias={7: -100})
        biased = sampling(temperature=0.0, logit_bias={6: 2.0}, repetition_penalty=2.0)
        picks = [
            pick_of(range(3), MIXTURES[6], banned),
            pick_of([3], MIXTURES[0], biased, prompt=(6,)),
        ]
        batch = Batch(logits, picks)
        for _ in range(6):
            picked, _ = batch.expected()
            batch.launch()
            assert_same(batch, picked)
            assert batch.ids[0] in (9, 11)


class TestRequests:
    def test_only_the_request_whose_numbers_are_not_finite_fails(self):
        """NaN in a row of each kind, +inf, and nothing possible at all."""
        mixed = [m for m in MIXTURES for _ in range(2)]
        batch = batch_of(mixed, [SAMPLINGS[g % 11] for g in range(len(mixed))], SMALL, seed=7)
        for g, pick in enumerate(batch.picks[::2]):
            row = pick.rows[-1 - g % len(pick.rows)]
            batch.logits[row, 30 + g] = (torch.nan, torch.inf)[g % 3 == 1]
        batch.logits[list(batch.picks[0].rows)] = -torch.inf
        picked, _ = batch.expected()
        assert [p.token_id is None for p in picked] == [True, False] * len(MIXTURES)
        batch.launch()
        assert_same(batch, picked)
        rows = [batch.token_ids[list(pick.rows)].unique().tolist() for pick in batch.picks]
        assert rows == [[one.token_id or 0] for one in picked]
        moved = [int(p) - 10 * g for g, p in enumerate(batch.inputs.column("position"))]
        assert moved == [0, 1] * len(MIXTURES)

    def test_padding_requests_write_nothing_but_minus_one(self):
        batch = batch_of(MIXTURES[:2], SAMPLINGS[2:4], SMALL, capacity=5)
        picked, _ = batch.expected()
        batch.inputs.column("next_row")[1] = -1
        before = batch.inputs.ints[:, 2:].clone()
        batch.outputs.ids.fill_(5)
        batch.launch()
        assert_same(batch, picked)
        assert batch.ids[2:] == [-1, -1, -1]
        assert batch.inputs.ints[:, 2:].equal(before)
        assert batch.token_ids.tolist() == [batch.ids[0], -5, -5]

    @pytest.mark.slow
    def test_answers_share_the_rows_of_their_prompt(self):
        params = [sampling(seed=9, logit_bias={3: -100, 4: 1.0}, top_p=0.9)] * 4
        picks = [pick_of(range(1, 5), MIXTURES[4], p, choice=g) for g, p in enumerate(params)]
        batch = Batch(randn(5, LARGE, seed=8, scale=2.0), picks)
        batch.inputs.column("next_row").fill_(-1)
        picked, _ = batch.expected()
        assert len({p.token_id for p in picked}) > 1
        batch.launch()
        assert_same(batch, picked)

    def test_neighbours_place_and_flags_do_not_change_a_bit(self):
        mixed = [MIXTURES[g] for g in (7, 0, 1, 5)]
        params = [SAMPLINGS[g] for g in (2, 8, 1, 11)]
        together = batch_of(mixed, params, LARGE, capacity=6)
        together.launch()
        for g, pick in enumerate(together.picks):
            alone = Batch(
                together.logits[list(pick.rows)].clone(),
                [dataclasses.replace(pick, rows=range(len(pick.rows)))],
            )
            truncate = pick.sampling.top_p < 1
            alone.launch(
                truncate=truncate,
                mixed=len(pick.rows) > 1,
                gated=pick.mixture.gate.name != "fixed",
                num_groups=1,
            )
            assert alone.ids == together.ids[g : g + 1]
            assert alone.outputs.log_probs.equal(together.outputs.log_probs[g : g + 1])
            assert alone.outputs.merged.equal(together.outputs.merged[g : g + 1])

    @pytest.mark.slow
    def test_the_plain_form_picks_the_same(self):
        """The twin has the kernels' arguments, and changes the same tensors."""
        mixed = [*MIXTURES, MIXTURES[0], MIXTURES[0]]
        batch = batch_of(mixed, SAMPLINGS, SMALL, seed=4)
        twin = batch_of(mixed, SAMPLINGS, SMALL, seed=4)
        for _ in range(2):
            batch.launch()
            plain.tail(twin.logits.clone(), twin.inputs, twin.outputs)
        assert batch.ids == twin.ids
        assert batch.inputs.ints.equal(twin.inputs.ints)
        assert batch.inputs.counts.equal(twin.inputs.counts)
        assert batch.inputs.marks.equal(twin.inputs.marks)
        assert batch.token_ids.equal(twin.token_ids)
        torch.testing.assert_close(
            batch.outputs.log_probs, twin.outputs.log_probs, atol=1e-5, rtol=1e-5
        )


class TestWrongArguments:
    def test_the_tail_names_what_is_wrong(self):
        batch = batch_of(MIXTURES[:2], SAMPLINGS[:2], SMALL)
        call = tail_ops.launch_tail
        with pytest.raises(ValueError, match=r"logits must be \[B, V\] with V in"):
            call(batch.logits[0], batch.inputs, batch.outputs)
        with pytest.raises(ValueError, match="logits must have dtype"):
            call(batch.logits.double(), batch.inputs, batch.outputs)
        with pytest.raises(ValueError, match=r"num_groups must be in \[0, 2\], got 3"):
            call(batch.logits, batch.inputs, batch.outputs, num_groups=3)
        with pytest.raises(ValueError, match="outputs must be allocated for 4 rows or more, got 3"):
            call(randn(4, SMALL, seed=1), batch.inputs, batch.outputs)
        with pytest.raises(ValueError, match=r"seeds must have shape \[2\], got \[1\]"):
            call(
                batch.logits,
                dataclasses.replace(batch.inputs, seeds=batch.inputs.seeds[:1]),
                batch.outputs,
            )
        with pytest.raises(ValueError, match="marks must have dtype"):
            call(
                batch.logits,
                dataclasses.replace(batch.inputs, marks=batch.inputs.marks.int()),
                batch.outputs,
            )

    def test_blocks_are_as_few_as_their_parts_allow(self):
        assert [choose_block(v) for v in (1, 77, 65536, 131072, 131073, 1 << 18)] == [
            1024, 1024, 1024, 1024, 2048, 2048,
        ]  # fmt: skip
