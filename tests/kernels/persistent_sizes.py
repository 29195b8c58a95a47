"""Sizes of models that the persistent decode step is tested with."""

from __future__ import annotations

# By C, ranks of the LoRAs of w, a, g, v as first halves have them, and as second halves do.
RANKS = {1024: (64, 64, 128, 64), 2048: (128, 128, 256, 64), 4096: (128, 128, 512, 128)}
UP_RANKS = RANKS | {2048: (96, 96, 256, 64)}

RANK_SUMS = {width: (sum(RANKS[width]), sum(UP_RANKS[width])) for width in RANKS}
"""Of first halves, and columns of second halves."""
