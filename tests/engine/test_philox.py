"""Philox4x32-10 against Random123's known answers, and the uniforms made of it."""

import numpy as np
import pytest

from mrss_provider.engine.philox import philox4x32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert philox4x32(counter, key) == answer


def test_uniform_is_tritons() -> None:
    """Oracle: `uint_to_uniform_float` of triton.language.random, in numpy's fp32 and int32."""
    for position in range(200):
        word = np.uint32(philox4x32((position, 3, 0, 0), (5, 1))[0]).view(np.int32)
        expected = np.float32(~word if word < 0 else word) * np.float32(4.6566127342e-10)
        assert uniform((1 << 32) + 5, 3, position) == expected


def test_uniform_stays_below_one() -> None:
    scale = np.float32(4.6566127342e-10)
    assert np.float32(2**31 - 1) * scale < 1


def test_negative_seeds_are_twos_complement() -> None:
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    assert uniform(-(2**63), 0, 0) == uniform(2**63, 0, 0)


def test_uniforms_are_uniform_over_each_argument() -> None:
    for draws in (
        [uniform(seed, 0, 0) for seed in range(4000)],
        [uniform(9, choice, 0) for choice in range(4000)],
        [uniform(9, 0, position) for position in range(4000)],
    ):
        counts = np.histogram(draws, bins=20, range=(0, 1))[0]
        chi_square = ((counts - 200) ** 2 / 200).sum()
        # 19 degrees of freedom: above 43.8 once in a thousand.
        assert chi_square < 43.8
        assert len(set(draws)) > 3990
