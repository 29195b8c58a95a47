"""ToneClassifier: is a text in a manner of speaking? Logistic regression on words, pairs, triples.

Small on purpose: what a person would call the manner shows in a few words, and a few hundred texts
are all there is. Its accuracy on texts that it was not trained on is measured, always.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NUM_FEATURES = 1 << 14
_MAX_GRAM = 3
_STEPS = 300
_RATE = 1.0
_PENALTY = 1e-3
_HELD_OUT_SHARE = 0.2
_WORD = re.compile(r"\w+|[^\w\s]")

Weights = NDArray[np.float64]


@dataclass(frozen=True)
class ToneClassifier:
    """A trained classifier.

    Attributes:
        weights: one a feature, and the bias, last.
        held_out_accuracy: share of held-out texts that a classifier trained without them got
            right.
    """

    weights: Weights
    held_out_accuracy: float

    @classmethod
    def train(cls, toned: Sequence[str], others: Sequence[str], *, seed: int = 0) -> ToneClassifier:
        """Train on texts in the manner and texts that are not; measure on a fifth held out."""
        features = [_features(text) for text in (*toned, *others)]
        labels = np.array([1.0] * len(toned) + [0.0] * len(others))
        order = np.random.default_rng(seed).permutation(len(labels))
        num_held_out = max(1, int(_HELD_OUT_SHARE * len(labels)))
        held_out, rest = order[:num_held_out], order[num_held_out:]
        trial = _fit([features[i] for i in rest], labels[rest])
        told = np.array([_score(features[i], trial) > 0 for i in held_out])
        right = told == (labels[held_out] > 0.5)
        return cls(_fit(features, labels), float(right.mean()))

    def is_toned(self, text: str) -> bool:
        """Tell whether a text is in the manner, as far as it goes."""
        return _score(_features(text), self.weights) > 0


@dataclass(frozen=True)
class _Features:
    """Hashed words, pairs and triples that a text has, and a 1: places and values, of length 1."""

    places: NDArray[np.int64]
    values: Weights


def _features(text: str) -> _Features:
    words = [word.lower() for word in _WORD.findall(text)]
    grams = [
        zlib.crc32(" ".join(words[start : start + length]).encode()) % _NUM_FEATURES
        for length in range(1, _MAX_GRAM + 1)
        for start in range(len(words) - length + 1)
    ]
    places, counts = np.unique(np.array(grams, dtype=np.int64), return_counts=True)
    values = counts / (np.linalg.norm(counts) or 1.0)
    return _Features(np.append(places, _NUM_FEATURES), np.append(values, 1.0))


def _score(features: _Features, weights: Weights) -> float:
    return float(weights[features.places] @ features.values)


def _fit(features: Sequence[_Features], labels: Weights) -> Weights:
    """Go down the mean log loss, both kinds weighing the same, with an L2 penalty."""
    places = np.concatenate([one.places for one in features])
    values = np.concatenate([one.values for one in features])
    # Which text each value is of: most texts have few of the features, and none need be kept.
    rows = np.repeat(np.arange(len(features)), [len(one.places) for one in features])
    weights = np.zeros(_NUM_FEATURES + 1)
    share = np.where(labels > 0.5, 0.5 / max(1.0, labels.sum()), 0.5 / max(1.0, (1 - labels).sum()))
    penalty = np.full(len(weights), _PENALTY)
    penalty[-1] = 0.0
    velocity = np.zeros_like(weights)
    for _ in range(_STEPS):
        scores = np.bincount(rows, weights[places] * values, len(features))
        errors = share * (1 / (1 + np.exp(-np.clip(scores, -30, 30))) - labels)
        gradient = np.bincount(places, errors[rows] * values, len(weights)) + penalty * weights
        velocity = 0.9 * velocity - _RATE * gradient
        weights = weights + velocity
    return weights
