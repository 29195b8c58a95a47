"""The tail's kernels against the engine's own tail in torch, and against the plain form in fp64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from mrss_kernels import merge_rows as kernels
from mrss_kernels import reference_tail as plain
from mrss_kernels import tail as tail_ops
from mrss_kernels.tail_tensors import GATES, ORDERS, RULES, TailInputs, TailOutputs, choose_block
from oracle import DEVICE, assert_as_good_as_reference, randn

from mrss_provider.engine import gates, merge, sampler
from mrss_provider.engine.logits_processors import Bias, Occurrences
from mrss_provider.engine.philox import uniform
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.tail import Pick, merge_rows, pick_tokens
from mrss_provider.sampling_params import SamplingParams

# In the interpreter numpy warns of log 0 and -inf - -inf, which the kernels know how to take.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SMALL = 77
LARGE = 1447
BLOCK = 256


def mixture(*weights, merge="linear", gate="fixed", cut=0.0, base=False):
    """Return a mixture of as many rows as weights; `base`: row 0 is the base."""
    return ResolvedMixture(
        canonical="check",
        states=(None,) * len(weights),
        weights=weights,
        merge=merge,
        gate=gate,
        cut=cut,
        base_row=0 if base else None,
        fingerprint="fp_check",
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
NAMES = [f"{m.merge}-{m.gate}-{m.rows}-{m.weights[0]}" for m in MIXTURES]


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
            size, rows, vocab, num_count_rows=size, num_bias_rows=size, device=DEVICE
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
        "rule": RULES.index(mixed.merge),
        "gate": GATES.index(mixed.gate),
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


class TestMerge:
    @pytest.mark.parametrize("vocab", [SMALL, LARGE])
    def test_every_rule_and_gate_is_as_good_as_the_engines(self, vocab):
        batch = batch_of(MIXTURES, [sampling()] * len(MIXTURES), vocab)
        _, same = batch.expected()
        batch.launch(truncate=False)
        for g, pick in enumerate(batch.picks):
            rows, mixed = batch.logits[list(pick.rows)], pick.mixture
            named = torch.tensor(mixed.weights, dtype=torch.float64, device=DEVICE)
            based = mixed.base_row is not None and mixed.weights[0] > 0
            exact = plain.merge(
                rows.double(), named, mixed.merge, mixed.gate, mixed.cut, base_named=based
            )
            got = batch.outputs.merged[g]
            there = exact > -torch.inf
            assert there.equal(got > -torch.inf), NAMES[g]
            reference = same[g].to(DEVICE)
            assert_as_good_as_reference(got[there], reference[there], exact[there], torch.float32)

    def test_one_row_comes_back_bit_for_bit_with_and_without_a_copy(self):
        batch = batch_of([MIXTURES[0]] * 2, [sampling(seed=1), sampling(seed=2)], LARGE)
        picked, _ = batch.expected()
        batch.inputs.column("keep_merged")[1] = 0
        batch.outputs.merged.fill_(-7.0)
        batch.launch(mixed=False, truncate=False)
        assert batch.outputs.merged[0].equal(batch.logits[0])
        assert (batch.outputs.merged[1] == -7).all()
        assert_same(batch, picked)

    def test_more_rows_than_a_tile_are_merged(self):
        mixed = mixture(*[1 / 19] * 19)
        batch = batch_of([mixed], [sampling()], SMALL, max_rows=32)
        picked, same = batch.expected()
        batch.launch()
        torch.testing.assert_close(batch.outputs.merged.cpu(), same, atol=2e-5, rtol=1e-5)
        assert_same(batch, picked)

    def test_impossible_tokens_are_what_they_are_in_the_engine(self):
        """-inf in one row, in all rows, in the base only, and rows of nothing but one token."""
        batch = batch_of(MIXTURES, [sampling()] * len(MIXTURES), SMALL)
        for pick in batch.picks:
            first, last = pick.rows[0], pick.rows[-1]
            batch.logits[first, 3:20] = -torch.inf
            batch.logits[last, 10:30] = -torch.inf
            batch.logits[first : last + 1, 40] = -torch.inf
        batch.logits[batch.picks[2].rows[1]] = -torch.inf
        batch.logits[batch.picks[2].rows[1], 50] = 1.0
        picked, same = batch.expected()
        batch.launch()
        torch.testing.assert_close(batch.outputs.merged.cpu(), same, atol=1e-4, rtol=1e-4)
        assert_same(batch, picked)

    def test_agreeing_states_weigh_what_the_name_says(self):
        """Anchored novelty below the least divergence; rows that are the same and a tie of all."""
        mixed = MIXTURES[7]
        batch = batch_of([mixed, mixed], [sampling()] * 2, SMALL)
        batch.logits[:5] = batch.logits[0]
        batch.logits[5:] = 1.5
        picked, same = batch.expected()
        batch.launch()
        torch.testing.assert_close(batch.outputs.merged.cpu(), same, atol=2e-5, rtol=1e-5)
        assert_same(batch, picked)

    def test_constants_and_tables_are_the_engines(self):
        assert tuple(merge.MERGE_RULES) == RULES
        assert tuple(gates.GATES) == GATES
        assert kernels.LOG_PROB_FLOOR.value == plain.LOG_PROB_FLOOR == merge.LOG_PROB_FLOOR
        for name in ("NOVELTY_TEMPERATURE", "MAX_DIVERGENCE", "MIN_DIVERGENCE"):
            assert getattr(kernels, name).value == getattr(plain, name) == getattr(gates, name)
        assert kernels.MIN_TEMPERATURE.value == sampler._MIN_TEMPERATURE == plain.MIN_TEMPERATURE


class TestDraw:
    @pytest.mark.parametrize("vocab", [SMALL, LARGE])
    def test_draws_equal_the_engines(self, vocab):
        """Every sampling under changing mixtures, several steps, one banned id."""
        mixed = list(itertools.islice(itertools.cycle(MIXTURES), len(SAMPLINGS)))
        batch = batch_of(mixed, SAMPLINGS, vocab, seed=2, banned=(vocab - 1,))
        for _ in range(2 if vocab == SMALL else 1):
            picked, _ = batch.expected()
            batch.launch()
            assert_same(batch, picked)

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

    @pytest.mark.parametrize("pairs", [2, 256])
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
                gated=pick.mixture.gate == "novelty",
                num_groups=1,
            )
            assert alone.ids == together.ids[g : g + 1]
            assert alone.outputs.log_probs.equal(together.outputs.log_probs[g : g + 1])
            assert alone.outputs.merged.equal(together.outputs.merged[g : g + 1])

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
