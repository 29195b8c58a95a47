"""Philox4x32-10: random numbers as a function of (seed, choice, position), without any state.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). The draw for a token depends
on nothing else in the batch, and a GPU kernel gets the same bits from
`tl.philox(seed, position, choice, 0, 0)` and the same float from `tl.uint_to_uniform_float`.
"""

from __future__ import annotations

import numpy as np

_MASK32 = 0xFFFFFFFF
_ROUND_A = 0xD2511F53
_ROUND_B = 0xCD9E8D57
_KEY_A = 0x9E3779B9
_KEY_B = 0xBB67AE85
# The largest scale that keeps the result below 1 after rounding to fp32 (Triton's).
_SCALE = np.float32(4.6566127342e-10)


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int], num_rounds: int = 10
) -> tuple[int, int, int, int]:
    """Return four random 32-bit words for a counter and a key of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(num_rounds):
        a, b = _ROUND_A * c0, _ROUND_B * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK32, (a >> 32) ^ c3 ^ k1, a & _MASK32
        k0, k1 = (k0 + _KEY_A) & _MASK32, (k1 + _KEY_B) & _MASK32
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """Return the draw in [0, 1) of token `position` of answer `choice` (an fp32 number).

    `seed` is any 64-bit integer; a negative one is its two's complement.
    """
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    word = philox4x32((position, choice, 0, 0), key)[0]
    # As Triton: the word is a signed integer, a negative one is inverted.
    magnitude = word if word < 1 << 31 else word ^ _MASK32
    return float(np.float32(magnitude) * _SCALE)
