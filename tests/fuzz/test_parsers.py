"""Whatever is put before a parser, it understands it or says what is wrong with it."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS

from mrss_provider.errors import MRSSError

# Where formats have their turns: what a number, a name or a frame may not be.
TOKENS = [
    b"",
    b"\0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b'"',
    b"[",
    b"{}",
    b"\r\n",
    b"\xff\xff",
    b"[" * 2000,
]


@st.composite
def mutated(draw, seeds):
    """Return a seed with pieces replaced, removed, repeated or cut off; or anything at all."""
    data = draw(st.sampled_from([*seeds, b""]))
    for _ in range(draw(st.integers(0, 4))):
        # Headers and numbers are at the front.
        limit = draw(st.sampled_from([min(len(data), 64), len(data)]))
        at = draw(st.integers(0, limit))
        length = draw(st.integers(0, 8))
        piece = draw(
            st.one_of(st.sampled_from(TOKENS), st.binary(max_size=8), st.just(data[at : at + 40]))
        )
        data = data[:at] + piece + data[at + length :]
    end = draw(st.one_of(st.none(), st.integers(0, len(data))))
    return data[:end]


def check(name, num_examples):
    target = TARGETS[name]
    for seed in target.seeds:
        # What is mutated is understood before.
        with contextlib.nullcontext():
            target.run(seed)

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(target.seeds))
    def run(data):
        with contextlib.suppress(MRSSError):
            target.run(data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_understands_or_says_what_is_wrong(name):
    check(name, 150)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_withstands_much_more(name):
    check(name, 2000)
