"""Stop strings. Oracle: `str.find` on the whole text."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mrss_provider.stop import StopMatcher

letters = st.text("ab\n", max_size=24)
stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


def cut(text, stops):
    """Return what is before the stop string that is complete first, and that string."""
    found = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    return (text[: min(found)[1]], min(found)[2]) if found else (text, None)


@given(letters, stop_lists, st.lists(st.integers(0, 24)))
@example("aab", ["ab"], [1, 2])
@example("abab", ["aba", "b"], [1, 2, 3])
def test_any_split_gives_the_text_before_the_first_complete_stop(text, stops, cuts):
    matcher = StopMatcher(stops)
    edges = sorted({0, len(text), *(at for at in cuts if at <= len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    shown = ""
    for at, piece in zip(edges[1:], pieces, strict=True):
        is_open, passed = matcher.matched is None, matcher.push_open(piece)
        finds = passed is None
        shown += matcher.push(piece) if passed is None else passed
        so_far, matched = cut(text[:at], stops)
        # Nothing that could still be part of a stop string was shown, and nothing else is held.
        held = so_far[len(shown) :]
        assert so_far.startswith(shown)
        assert matcher.matched == matched
        assert not is_open or finds == (matched is not None)
        assert not held or (matched is None and any(s.startswith(held) for s in stops))
    shown += matcher.flush()
    assert (shown, matcher.matched) == cut(text, stops)


def test_nothing_is_held_that_cannot_begin_a_stop():
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("hello") == "hello"
    assert matcher.push(" you\n") == " you"
    assert matcher.push("\nU") == ""
    assert matcher.push("p") == "\n\nUp"
    assert matcher.matched is None


def test_after_a_match_nothing_comes():
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == "a"
    assert matcher.push("c") == ""
    assert matcher.flush() == ""
    assert matcher.matched == "."


def test_an_empty_stop_is_a_defect_of_the_caller():
    with pytest.raises(AssertionError):
        StopMatcher([""])
