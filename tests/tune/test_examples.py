"""Marking answers and facts in tokens, and padding them to batches."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mrss_provider.tune import Example, mark_example
from mrss_provider.tune.examples import make_batch


def by_pairs(text):
    """Encode two bytes a token: tokens that cut through characters and ranges."""
    data = text.encode()
    return list(range(-(-len(data) // 2)))


def pair_bytes(text):
    data = text.encode()
    return lambda token: data[2 * token : 2 * token + 2]


def test_a_token_is_marked_if_it_overlaps_the_range():
    text = "Q: é? A: née."
    example = mark_example(
        text, [(6, 13)], [(9, 12)], encode=by_pairs, token_bytes=pair_bytes(text)
    )
    # Bytes: "Q: é? A: née." has its é at bytes 3-4, the answer at 7-15, the fact at 10-14.
    assert len(example.token_ids) == 8
    assert example.answer == (False, False, False, True, True, True, True, True)
    assert example.fact == (False, False, False, False, False, True, True, False)


@given(st.text(min_size=1, max_size=30), st.data())
def test_marks_cover_exactly_the_bytes_of_the_range(text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    example = mark_example(text, [(start, end)], [], encode=by_pairs, token_bytes=pair_bytes(text))
    first, last = len(text[:start].encode()), len(text[:end].encode())
    for token, marked in zip(example.token_ids, example.answer, strict=True):
        overlaps = set(range(2 * token, 2 * token + 2)) & set(range(first, last))
        assert marked == bool(overlaps)
    assert not any(example.fact)


def test_a_batch_shifts_pads_and_cuts():
    long = Example((5, 6, 7, 8, 9), (False, False, True, True, True), (False,) * 4 + (True,))
    short = Example((1, 2), (False, True), (False, False))
    batch = make_batch([long, short], 3, torch.device("cpu"))
    assert batch.inputs.tolist() == [[5, 6, 7], [1, 2, 0]]
    assert batch.targets.tolist() == [[6, 7, 8], [2, 0, 0]]
    assert batch.answer.tolist() == [[False, True, True], [True, False, False]]
    assert not batch.fact.any()
    assert batch.real.sum(1).tolist() == [3, 1]
    assert batch.lengths == (3, 1)
