"""Bans, penalties and bias against a loop over a dictionary of occurrences."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrss_provider.engine.logits_processors import (
    Bias,
    Occurrences,
    apply_bias,
    apply_penalties,
    ban,
)
from mrss_provider.sampling_params import SamplingParams

V = 30
tokens = st.lists(st.integers(0, V - 1), max_size=40)


def penalised_by_hand(
    logits: torch.Tensor, prompt: list[int], answer: list[int], sampling: SamplingParams
) -> torch.Tensor:
    counts: dict[int, float] = {}
    for token in answer:
        counts = {key: count * sampling.penalty_decay for key, count in counts.items()}
        counts[token] = counts.get(token, 0.0) + 1
    expected = logits.double().clone()
    for token in set(prompt) | set(answer):
        value = expected[token]
        repetition = sampling.repetition_penalty
        expected[token] = value / repetition if value > 0 else value * repetition
    for token, count in counts.items():
        expected[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    return expected.float()


@given(
    tokens,
    tokens,
    st.builds(
        SamplingParams,
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0.1, 10),
        penalty_decay=st.floats(0.1, 1),
    ),
)
@settings(max_examples=80, deadline=None)
def test_penalties_equal_a_dictionary_of_occurrences(
    prompt: list[int], answer: list[int], sampling: SamplingParams
) -> None:
    logits = torch.linspace(-3, 3, V)
    logits[4] = -torch.inf
    seen = Occurrences(prompt, sampling)
    for token in answer:
        seen.push(token)
    ours = logits.clone()[None]
    apply_penalties(ours, [sampling], [seen])
    expected = penalised_by_hand(logits, prompt, answer, sampling)
    torch.testing.assert_close(ours[0], expected, atol=1e-4, rtol=1e-4)


def test_the_prompt_counts_for_repetition_only() -> None:
    logits = torch.ones(1, V)
    seen = Occurrences([1, 2], SamplingParams(presence_penalty=1.0, repetition_penalty=2.0))
    apply_penalties(logits, [SamplingParams(presence_penalty=1.0, repetition_penalty=2.0)], [seen])
    assert logits[0, :4].tolist() == [1.0, 0.5, 0.5, 1.0]


def test_a_prompt_that_no_penalty_looks_at_is_not_kept() -> None:
    assert len(Occurrences(range(1000), SamplingParams(presence_penalty=1.0)).ids) == 0


def test_each_request_has_its_own_penalties() -> None:
    params = [
        SamplingParams(presence_penalty=1.0),
        SamplingParams(),
        SamplingParams(frequency_penalty=0.5),
    ]
    seen = [Occurrences([], params[0]), None, Occurrences([], params[2])]
    for token in (3, 3, 5):
        for own in seen:
            if own is not None:
                own.push(token)
    logits = torch.zeros(3, V)
    apply_penalties(logits, params, seen)
    assert logits[:, [3, 5, 6]].tolist() == [[-1.0, -1.0, 0.0], [0.0] * 3, [-1.0, -0.5, 0.0]]


def test_occurrences_grow_past_their_first_capacity() -> None:
    sampling = SamplingParams(frequency_penalty=1.0)
    seen = Occurrences([], sampling)
    for token in list(range(300)) * 2:
        seen.push(token)
    assert seen.ids.tolist() == list(range(300))
    assert set(seen.counts.tolist()) == {2.0}


def test_bias_of_minus_100_bans_in_all_rows_of_its_request() -> None:
    logits = torch.zeros(5, V)
    with_bans = Bias(SamplingParams(logit_bias={3: -100, 7: -100.0, 8: -99.0}))
    ban(logits, [[0, 2], [1, 3, 4]], [with_bans, Bias(SamplingParams())])
    assert logits.isneginf().nonzero().tolist() == [[0, 3], [0, 7], [2, 3], [2, 7]]


def test_bias_is_added_to_its_own_request() -> None:
    logits = torch.zeros(2, V)
    logits[1, 5] = -torch.inf
    biases = [
        Bias(SamplingParams(logit_bias={2: 1.5, 3: -100})),
        Bias(SamplingParams(logit_bias={5: 100.0, 2: -99.5})),
    ]
    apply_bias(logits, biases)
    assert logits[0, :6].tolist() == [0, 0, 1.5, 0, 0, 0]
    assert logits[1, [2, 5]].tolist() == [-99.5, -torch.inf]


def test_nothing_to_do_changes_nothing() -> None:
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    nothing = SamplingParams(penalty_decay=0.5)
    apply_penalties(logits, [nothing] * 2, [None, Occurrences([1], nothing)])
    apply_bias(logits, [Bias(nothing)] * 2)
    ban(logits, [[0], [1]], [Bias(nothing)] * 2)
    assert logits.equal(before)
