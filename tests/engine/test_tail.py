"""The tail of a step: the order of operations, and requests that do not see each other."""

import math

import pytest
import torch
from fake_model import fake_state, mixture
from torch import Tensor

from mrss_provider.engine.logits_processors import Bias, Occurrences
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.tail import Pick, merge_rows, pick_tokens
from mrss_provider.sampling_params import SamplingParams

V = 64
NOTHING = torch.tensor([], dtype=torch.int64)
A, B, C = (fake_state(name) for name in "abc")

MIXTURES = [
    mixture(A),
    mixture(None),
    mixture(A, B, weights=[0.3, 0.7]),
    mixture(A, B, C, merge="geometric"),
    mixture(None, A, B, weights=[0, 1, 1], merge="delta", gate="novelty", cut=0.1),
    mixture(None, A, B, weights=[0, 1, 0.5], merge="delta", cut=0.2),
    mixture(None, A, B, weights=[0.2, 0.4, 0.4], merge="delta", gate="novelty", cut=0.1),
    mixture(None, A, B, weights=[0, 0.5, 0.5], gate="novelty"),
    mixture(None, A, B, weights=[0.5, 0.25, 0.25], merge="geometric", gate="novelty"),
    mixture(A, B, C, weights=[1, 1, 0.5], merge="product", gate="confidence"),
    mixture(None, A, B, weights=[0, 1, 0.5], merge="product", gate="novelty:1,2"),
    mixture(A, B, C, merge="power", gate="confidence:2"),
    mixture(A, B, weights=[0.1, 0.9], merge="power:-2"),
    mixture(A, B, C, merge="power:0.001"),
    mixture(None, A, B, weights=[1, 0.5, -0.5], merge="contrast", cut=0.1),
    mixture(None, A, B, weights=[0, 1, -0.5], merge="contrast", gate="novelty", cut=0.1),
    mixture(None, A, B, C, weights=[0, 0.3, 0.3, 0.4], merge="route", gate="novelty"),
    mixture(None, A, B, weights=[0, 1, 0.5], merge="delta", gate="posterior-novelty", cut=0.1),
]


def rows_of(mixed: ResolvedMixture, seed: int, vocab_size: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mixed.rows, vocab_size, generator=generator) * 3


def pick(
    rows: list[int] | range, mixed: ResolvedMixture, position: int = 0, **sampling: object
) -> Pick:
    values = {"temperature": 1.0, "top_p": 1.0, "seed": 5} | sampling
    params = SamplingParams(**values)  # type: ignore[arg-type]
    seen = Occurrences([], params) if params.has_penalties else None
    return Pick(rows, mixed, params, Bias(params), seen, 0, position)


def test_one_row_comes_back_bit_for_bit() -> None:
    logits = rows_of(MIXTURES[5], 0)
    assert merge_rows(logits, [([1], mixture(A))]).equal(logits[1:2])
    assert merge_rows(logits, [([2], mixture(A)), ([0], mixture(None))]).equal(logits[[2, 0]])


@pytest.mark.parametrize("count", [2, 60])
def test_a_batch_equals_its_requests_one_by_one_bit_for_bit(count: int) -> None:
    """Mixtures of all kinds and sizes, their rows scattered over the batch."""
    mixed = [MIXTURES[i % len(MIXTURES)] for i in range(count)]
    logits = [rows_of(m, seed) for seed, m in enumerate(mixed)]
    total = sum(len(z) for z in logits)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)).tolist()
    batch = torch.empty(total, V)
    parts, used = [], 0
    for z, m in zip(logits, mixed, strict=True):
        rows = order[used : used + len(z)]
        batch[rows] = z
        parts.append((rows, m))
        used += len(z)
    together = merge_rows(batch, parts)
    for g, (z, m) in enumerate(zip(logits, mixed, strict=True)):
        assert together[g].equal(merge_rows(z, [(range(len(z)), m)])[0]), m


@pytest.mark.parametrize("vocab_size", [1472, 16_384])
def test_neighbours_do_not_change_a_bit_of_a_merge_of_any_kind(vocab_size: int) -> None:
    """At these sizes matrix products take other kernels for one request than for several."""
    for mixed in MIXTURES:
        logits = torch.cat([rows_of(mixed, seed, vocab_size) for seed in range(4)])
        parts = [(range(g * mixed.rows, (g + 1) * mixed.rows), mixed) for g in range(4)]
        together = merge_rows(logits, parts)
        for g, part in enumerate(parts):
            assert merge_rows(logits, [part])[0].equal(together[g]), (
                mixed.merge.text,
                mixed.gate.text,
            )


def test_the_vocabulary_of_a_group_may_exceed_a_chunk() -> None:
    """Groups are cut into chunks that fit a cache: same numbers as one by one."""
    mixed = mixture(None, A, weights=[0, 1], merge="delta", cut=0.1)
    logits = torch.randn(10, 1 << 17, generator=torch.Generator().manual_seed(0))
    together = merge_rows(logits, [([2 * g, 2 * g + 1], mixed) for g in range(5)])
    for g in range(5):
        assert together[g].equal(merge_rows(logits[2 * g : 2 * g + 2], [([0, 1], mixed)])[0])


def test_ids_without_an_entry_are_never_picked() -> None:
    logits = torch.zeros(1, V)
    logits[0, 60:] = 50.0
    picked = pick_tokens(logits, [pick([0], mixture(A), 3)], torch.arange(60, V))
    assert picked[0].token_id is not None
    assert picked[0].token_id < 60


@pytest.mark.parametrize("mixed", MIXTURES)
def test_a_banned_token_is_never_picked_under_any_rule(mixed: ResolvedMixture) -> None:
    logits = rows_of(mixed, 0)
    logits[:, 7] = 80.0
    logits[:, 9] = 60.0
    for position in range(20):
        picked = pick_tokens(
            logits.clone(),
            [pick(range(mixed.rows), mixed, position, logit_bias={7: -100})],
            NOTHING,
        )
        assert picked[0].token_id == 9


def test_the_cut_is_taken_over_the_allowed_set() -> None:
    """A token that is banned does not set the threshold: the next best does."""
    mixed = mixture(None, A, B, weights=[0, 1, 1], merge="delta", cut=0.1)
    logits = torch.full((3, V), -20.0)
    logits[:, 7], logits[:, 9], logits[:, 11] = 20.0, 5.0, 4.0
    draws = [
        pick_tokens(
            logits.clone(), [pick([0, 1, 2], mixed, position, logit_bias={7: -100})], NOTHING
        )[0].token_id
        for position in range(40)
    ]
    assert set(draws) == {9, 11}


def test_penalties_act_after_the_merge_and_once() -> None:
    """Oracle: the same penalty on the merged logits by hand, then a greedy pick."""
    mixed = mixture(A, B)
    logits = torch.zeros(2, V)
    logits[:, 3], logits[:, 4] = 5.0, 4.0
    one = pick([0, 1], mixed, temperature=0.0, presence_penalty=1.5)
    assert one.occurrences is not None
    assert pick_tokens(logits.clone(), [one], NOTHING)[0].token_id == 3
    one.occurrences.push(3)
    assert pick_tokens(logits.clone(), [one], NOTHING)[0].token_id == 4
    two = pick([0, 1], mixed, temperature=0.0, presence_penalty=0.9)
    assert two.occurrences is not None
    two.occurrences.push(3)
    # Penalising both rows would count twice: 5 - 1.8 < 4.
    assert pick_tokens(logits.clone(), [two], NOTHING)[0].token_id == 3


def test_log_probs_are_of_the_merge_before_penalties_and_temperature() -> None:
    mixed = MIXTURES[2]
    logits = rows_of(mixed, 3)
    merged = merge_rows(logits, [([0, 1], mixed)]).log_softmax(-1)[0]
    best = int(merged.argmax())
    one = pick(
        [0, 1], mixed, temperature=0.1, logit_bias={best: -50.0}, logprobs=True, top_logprobs=3
    )
    picked = pick_tokens(logits, [one], NOTHING)[0]
    assert picked.token_id != best
    assert picked.logprob == pytest.approx(float(merged[picked.token_id or 0]), abs=1e-5)
    assert picked.top[0][0] == best
    assert [i for i, _ in picked.top] == merged.topk(3).indices.tolist()
    assert sum(math.exp(value) for _, value in picked.top) <= 1


def test_log_probs_leave_out_what_the_cut_removed() -> None:
    mixed = MIXTURES[4]
    logits = torch.full((3, V), -20.0)
    logits[:, 5] = 10.0
    one = pick([0, 1, 2], mixed, logprobs=True, top_logprobs=5)
    picked = pick_tokens(logits, [one], NOTHING)[0]
    assert picked.token_id == 5
    assert picked.top == ((5, pytest.approx(0.0, abs=1e-6)),)
    assert pick_tokens(logits, [pick([0, 1, 2], mixed)], NOTHING)[0].logprob is None


@pytest.mark.parametrize("mixed", MIXTURES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_end_their_request_alone(
    mixed: ResolvedMixture, bad: float
) -> None:
    good = rows_of(mixed, 1)
    broken = rows_of(mixed, 2)
    broken[-1, 13] = bad
    size = mixed.rows
    for top_p in (1.0, 0.5):
        picks = [
            pick(range(g * size, (g + 1) * size), mixed, top_p=top_p, logprobs=True)
            for g in range(3)
        ]
        picked = pick_tokens(torch.cat((good, broken, good)), picks, NOTHING)
        alone = pick_tokens(good.clone(), picks[:1], NOTHING)
        assert picked[1].token_id is None
        assert picked[0] == picked[2] == alone[0]


def test_one_uniform_a_token_whatever_the_number_of_rows() -> None:
    """Equal rows: one row and three of them pick the same ids, position by position."""
    row = torch.randn(1, V, generator=torch.Generator().manual_seed(4))
    for position in range(30):
        one = pick_tokens(row.clone(), [pick([0], mixture(A), position)], NOTHING)
        three = pick_tokens(
            row.repeat(3, 1), [pick([0, 1, 2], mixture(A, B, C), position)], NOTHING
        )
        assert one[0].token_id == three[0].token_id


def test_choices_that_share_rows_draw_their_own_tokens() -> None:
    logits = torch.zeros(1, V)
    picks = []
    for choice in range(8):
        shared = pick([0], mixture(A))
        picks.append(
            Pick([0], shared.mixture, shared.sampling, shared.bias, None, choice, position=0)
        )
    ids = [p.token_id for p in pick_tokens(logits, picks, NOTHING)]
    assert len(set(ids)) > 4
