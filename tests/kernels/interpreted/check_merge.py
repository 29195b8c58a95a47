"""The tail's gates and merges against the engine's in torch, and the plain form in fp64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from mrss_kernels import gate_weights, merge_rules, tail_common
from mrss_kernels import reference_merge as plain
from mrss_kernels.tail_tensors import GATE_SIZE, GATES, RULES
from oracle import DEVICE, INTERPRETED, assert_as_good_as_reference
from tail_batch import (
    LARGE,
    MIXTURES,
    SMALL,
    Batch,
    assert_same,
    batch_of,
    learned,
    mixture,
    sampling,
)

from mrss_provider.engine import gating_layer
from mrss_provider.engine.gates import GATES as ENGINE_GATES
from mrss_provider.engine.gates import novelty
from mrss_provider.engine.merges import LOG_PROB_FLOOR, MERGE_RULES, power

# In the interpreter numpy warns of log 0 and -inf - -inf, which the kernels know how to take.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MERGES = (
    "linear",
    "geometric",
    "product",
    "power",
    "power:-1",
    "power:0.002",
    "power:-0.001",
    "power:8",
    "delta",
    "contrast",
    "route",
)
ROW_GATES = (
    "fixed",
    "novelty",
    "novelty:0.1,2",
    "novelty:0.3,0",
    "confidence",
    "confidence:2",
    "learned:check",
    "posterior-novelty",
)


def every_pair():
    """Return a mixture of each rule and gate, of 2 to 5 rows, with and without a named base."""
    found = []
    for n, (merge, gate) in enumerate(itertools.product(MERGES, ROW_GATES)):
        is_share = merge.split(":")[0] not in plain.STRENGTHS
        weights = [float(n % 2), 1.0, 0.5, 0.75, 0.25][: 2 + n % 4]
        if merge == "contrast" and len(weights) > 2:
            weights[-1] *= -1
        if is_share:
            weights = [w / sum(weights) for w in weights]
        cut = 0.0 if is_share else (0.0, 0.1)[n % 3 > 0]
        found.append(mixture(*weights, merge=merge, gate=gate, cut=cut, base=True, seed=n))
    return found


PAIRS = every_pair()


def mixing_of(mixed):
    """Return the same for the plain form."""
    given = mixed.gate.parameters
    network = mixed.trained_gate and mixed.trained_gate.layer.table.to(DEVICE)
    return plain.Mixing(
        rule=mixed.merge.name,
        gate=mixed.gate.name,
        cut=mixed.cut,
        base_named=mixed.base_named,
        exponent=mixed.merge.parameters.get("exponent", 1.0),
        tau=given.get("tau", 1.0),
        sharpness=given.get("exponent", 1.0),
        network=network,
    )


def exact_merge(batch, pick):
    """Return the plain form's merge of a request in fp64."""
    rows = batch.logits[list(pick.rows)].double()
    named = torch.tensor(pick.mixture.weights, dtype=torch.float64, device=DEVICE)
    return plain.merge(rows, named, mixing_of(pick.mixture))


def assert_merged(batch, same):
    """The kernels' merges are as good as the engine's, `same` [G, V]."""
    for g, pick in enumerate(batch.picks):
        exact, got = exact_merge(batch, pick), batch.outputs.merged[g]
        there = exact > -torch.inf
        label = f"{pick.mixture.merge.text}~{pick.mixture.gate.text} of {pick.mixture.weights}"
        assert there.equal(got > -torch.inf), label
        reference = same[g].to(DEVICE)
        # Or its own error would allow any.
        close = reference[there].double().isclose(exact[there], atol=1e-3, rtol=1e-3)
        assert close.all(), f"the engine's {label} is another merge"
        try:
            assert_as_good_as_reference(got[there], reference[there], exact[there], torch.float32)
        except AssertionError as exc:
            raise AssertionError(f"{label}: {exc}") from None


class TestMerge:
    @pytest.mark.parametrize("vocab", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
    def test_every_rule_and_gate_is_as_good_as_the_engines(self, vocab):
        mixed = PAIRS if vocab == SMALL else PAIRS[:: len(ROW_GATES) + 1]
        batch = batch_of(mixed, [sampling()] * len(mixed), vocab)
        _, same = batch.expected()
        batch.launch(truncate=False)
        assert_merged(batch, same)

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

    @pytest.mark.skipif(INTERPRETED, reason="as many tokens take the interpreter minutes")
    def test_every_rule_and_gate_is_as_good_as_the_engines_in_a_whole_vocabulary(self):
        batch = batch_of(PAIRS, [sampling()] * len(PAIRS), 65536, block=None)
        _, same = batch.expected()
        batch.launch(truncate=False)
        assert_merged(batch, same)

    @pytest.mark.slow
    def test_rows_of_other_places_and_more_than_a_tile_are_gated(self):
        """19 rows of which some are silenced, under every gate; 12 are more than one tile."""
        named = [0.0, *[1.0, 0.0, 0.5] * 6]
        mixed = [mixture(*named, merge="delta", gate=gate, base=True) for gate in ROW_GATES]
        mixed += [mixture(*named[:12], merge="product", gate=gate, base=True) for gate in ROW_GATES]
        batch = batch_of(mixed, [sampling()] * len(mixed), SMALL, max_rows=32)
        _, same = batch.expected()
        batch.launch(truncate=False)
        assert_merged(batch, same)

    def test_silence_of_all_states_leaves_the_base(self):
        """What a schedule may do under a rule that begins with the base."""
        mixed = [mixture(0.0, 0.0, 0.0, merge="delta", gate=g, base=True) for g in ROW_GATES]
        batch = batch_of(mixed, [sampling()] * len(mixed), SMALL)
        batch.launch(truncate=False)
        for g, pick in enumerate(batch.picks):
            base = batch.logits[pick.rows[0]]
            torch.testing.assert_close(batch.outputs.merged[g], base, atol=1e-5, rtol=1e-5)

    @pytest.mark.slow
    def test_a_row_alone_and_a_chosen_row_keep_every_bit(self):
        weights = ((0.0, 1.0, 0.0), (0.2, 0.4, 0.4), (0.6, 0.4))
        mixed = [mixture(*weights[0], merge=m) for m in ("linear", "geometric", "power", "power:0")]
        mixed += [mixture(*weights[0], merge="product"), mixture(*weights[0], merge="route")]
        mixed += [mixture(*weights[1], merge="route"), mixture(*weights[2], merge="route")]
        batch = batch_of(mixed, [sampling()] * len(mixed), LARGE)
        batch.launch(truncate=False)
        for g, pick in enumerate(batch.picks):
            row = pick.rows[0 if g == 7 else 1]
            assert batch.outputs.merged[g].equal(batch.logits[row]), g

    @pytest.mark.slow
    def test_equal_and_lonely_likeliest_tokens_have_a_margin(self):
        """A learned gate: ties within a block, across blocks, and rows of one token."""
        mixed = [mixture(0.2, 0.3, 0.5, gate="learned:check", base=True, seed=g) for g in range(4)]
        batch = batch_of(mixed, [sampling()] * len(mixed), LARGE)
        for g, pick in enumerate(batch.picks):
            rows = list(pick.rows)
            likeliest = ((5, 9), (5, 1400), (1400,), (300, 301, 900))[g]
            batch.logits[rows[1], list(likeliest)] = 20.0
            batch.logits[rows[2]] = -torch.inf
            batch.logits[rows[2], 700 + g] = 1.0
        _, same = batch.expected()
        batch.launch(truncate=False)
        assert_merged(batch, same)

    @pytest.mark.slow
    def test_neighbours_and_place_do_not_change_a_bit(self):
        """Each rule under another gate, beside all others and alone."""
        mixed = PAIRS[:: len(ROW_GATES) + 1]
        together = batch_of(mixed, [sampling()] * len(mixed), SMALL)
        together.launch()
        for g, pick in enumerate(together.picks):
            alone = Batch(
                together.logits[list(pick.rows)].clone(),
                [dataclasses.replace(pick, rows=range(len(pick.rows)))],
            )
            alone.launch(truncate=False, gated=pick.mixture.gate.name != "fixed")
            assert alone.ids == together.ids[g : g + 1]
            assert alone.outputs.merged.equal(together.outputs.merged[g : g + 1])

    def test_a_gate_that_sees_no_number_ends_the_request_as_in_the_engine(self):
        """NaN in the base, which no rule here needs but every gate that compares with it."""
        chosen = itertools.product(("linear", "route", "product"), ROW_GATES)
        mixed = [mixture(0.0, 0.6, 0.4, merge=m, gate=g, base=True) for m, g in chosen]
        batch = batch_of(mixed, [sampling()] * len(mixed), SMALL)
        for pick in batch.picks:
            batch.logits[pick.rows[0], 30] = torch.nan
        picked, _ = batch.expected()
        batch.launch()
        assert_same(batch, picked)
        assert {one.token_id is None for one in picked} == {True, False}

    def test_constants_and_tables_are_the_engines(self):
        assert set(RULES) == set(MERGE_RULES)
        assert set(GATES) <= {*ENGINE_GATES, "learned"}
        assert tail_common.LOG_PROB_FLOOR.value == plain.LOG_PROB_FLOOR == LOG_PROB_FLOOR
        assert gate_weights.MAX_NATS.value == plain.MAX_NATS == gating_layer.MAX_NATS
        assert gate_weights.MAX_NATS.value == novelty.MAX_DIVERGENCE
        assert gate_weights.MIN_DIVERGENCE.value == plain.MIN_DIVERGENCE == novelty.MIN_DIVERGENCE
        assert merge_rules.SMALL_EXPONENT.value == plain.SMALL_EXPONENT == power.SMALL_EXPONENT
        assert learned().layer.table.shape == (GATE_SIZE,)
