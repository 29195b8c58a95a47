"""The tail's kernels against the engine's own tail in torch, and against the plain form in fp64."""

from __future__ import annotations

import dataclasses

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

# In the interpreter numpy warns of log 0 and -inf - -inf, which the kernels know how to take.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


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
