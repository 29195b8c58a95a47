"""How many blocks of weights the persistent decode step has under way.

More keep memory busier and make every wait for another program's numbers longer, as its reads stand
behind them in the L2. Where in a layer which of the two matters more was found by search, with
`benchmarks/persistent_ahead.py`.
"""

from __future__ import annotations

from mrss_kernels.persistent7_cuts import FFN_FACTOR, Cuts

H100 = "NVIDIA H100 80GB HBM3"
"""The card whose table is everybody's who has none."""

AHEAD = {
    H100: {
        1024: {
            1: "10000001 010 00 00000000 00112101",
            2: "11000000 111 00 00000000 00000011",
            4: "01010000 011 00 00000000 00000011",
            8: "11000002 000 00 00000001 00000000",
            16: "00000111 000 00 01000001 00000111",
            32: "10000111 000 00 00000001 00000111",
        },
        2048: {
            1: "11100221 012 00 00000022 11212222",
            2: "11001122 110 00 00000022 11111111",
            4: "11000120 011 00 00000022 11111111",
            5: "02000221 200 00 00000010 10101112",
            8: "00001111 000 10 00000012 11111111",
            9: "01100010 000 00 00000022 11111121",
            12: "00001110 000 00 00000022 11101112",
            16: "00000000 001 00 00000022 11111111",
            24: "00000000 000 00 00000011 11111111",
            32: "00000000 000 00 00000011 11010111",
        },
        4096: {
            1: "00111121 001 01 01122222 11111112",
            2: "00111121 000 01 00111111 11111111",
            4: "00112122 000 02 00102222 11111111",
            5: "00011220 000 11 01111221 11111111",
            8: "10111222 000 11 01111210 11112012",
            9: "00011222 000 11 00111210 10110111",
            16: "00011222 000 10 00111210 11111111",
        },
    },
    "NVIDIA H200": {
        2048: {
            1: "11100000 002 00 00000022 11111111",
            4: "11000110 000 00 00000011 10112112",
            8: "00001110 000 00 00000011 10111112",
        },
    },
}
"""By card, C and up to how many rows: how many blocks more than one may be under way, 0 to 3.

One word a product (r, k, v and first halves; second halves; Wo; the FFN's key; its value), one
digit a block of a unit of it, from the first to the last, stretched over as many as it has.
"""


def blocks_ahead(card: str, channels: int, up_sum: int, rows: int, cuts: Cuts) -> list[int]:
    """Return `AHEAD` for the blocks of the five products' units, each as `packed_digits`."""
    inner = FFN_FACTOR * channels
    columns = (
        channels,
        up_sum,
        channels // cuts.output_parts,
        channels,
        inner // cuts.value_parts,
    )
    by_rows = table_of(card, channels)
    limit = min((limit for limit in by_rows if rows <= limit), default=max(by_rows))
    words = by_rows[limit].split()
    return [packed_digits(word, -(-size // 256)) for word, size in zip(words, columns, strict=True)]


def table_of(card: str, channels: int) -> dict[int, str]:
    """Return a card's part of `AHEAD` for a width, the H100's if it has none."""
    return AHEAD.get(card, {}).get(channels) or AHEAD[H100][channels]


def packed_digits(word: str, num_blocks: int) -> int:
    """Return digits 0 to 3 stretched over up to 16 blocks as int32, two bits each, first lowest."""
    digits = (word[k * len(word) // num_blocks] for k in range(num_blocks))
    bits = sum(int(digit) << 2 * k for k, digit in enumerate(digits))
    return bits - (1 << 32) if bits >> 31 else bits
