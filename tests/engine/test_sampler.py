"""The sampler against a plain numpy one that sorts everything, and against its distribution."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from mrss_provider.engine.philox import uniform
from mrss_provider.engine.sampler import sample, top_tokens
from mrss_provider.sampling_params import SamplingParams

DRAWS = [(i + 0.5) / 40 for i in range(40)]


def params(**values: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "top_p": 1.0} | values)  # type: ignore[arg-type]


def reference(logits: Tensor, sampling: SamplingParams, draw: float) -> int:
    """Sort the whole vocabulary; truncate; draw in the order of ids. fp64."""
    z = logits.double().numpy()
    if sampling.temperature == 0:
        return int(z.argmax())
    rwkv = sampling.sampling_order == "rwkv"
    looked_at = z / (1.0 if rwkv else sampling.temperature)
    p = np.exp(looked_at - looked_at.max())
    p /= p.sum()
    order = np.lexsort((np.arange(len(p)), -p))
    ranked = p[order]
    kept = np.ones(len(p), dtype=bool)
    if sampling.top_k:
        kept[sampling.top_k :] = False
    total = 1.0 if rwkv else ranked[kept].sum()
    if sampling.top_p < 1:
        before = ranked.cumsum() - ranked
        kept &= before < sampling.top_p * total
    kept &= ranked >= sampling.min_p * ranked[0]
    weights = np.zeros(len(p))
    weights[order] = np.where(kept, ranked, 0)
    if rwkv:
        weights **= 1 / sampling.temperature
    cumulative = weights.cumsum()
    return int((cumulative <= draw * cumulative[-1]).sum())


def random_logits(seed: int, vocab_size: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab_size, generator=generator) * scale
    return logits.masked_fill(torch.rand(vocab_size, generator=generator) < 0.1, -torch.inf)


SETTINGS = [
    params(temperature=t, top_k=k, top_p=p, min_p=m, sampling_order=order)
    for t, k, p, m, order in itertools.product(
        (0.0, 0.3, 1.0, 1.7), (0, 1, 7), (1.0, 0.9, 0.2), (0.0, 0.1), ("openai", "rwkv")
    )
]


@pytest.mark.parametrize("vocab_size", [3, 60, 3000])
def test_equals_sorting_everything(vocab_size: int) -> None:
    """At 3,000 flat logits, many settings need more candidates than the first few."""
    logits = random_logits(vocab_size, vocab_size, scale=0.7 if vocab_size == 3000 else 2.0)
    draws = DRAWS if vocab_size < 3000 else DRAWS[::8]
    for sampling in SETTINGS:
        batch = logits.expand(len(draws), -1)
        ours = sample(batch, [sampling] * len(draws), draws)
        assert ours == [reference(logits, sampling, draw) for draw in draws], sampling


def test_among_equals_the_lowest_ids_are_kept() -> None:
    """Logits rounded to bf16 have many ties; so has a vocabulary of one value."""
    rounded = random_logits(1, 3000).bfloat16().float()
    for logits in (rounded, torch.zeros(3000)):
        for sampling in (
            params(top_k=5),
            params(top_k=300),
            params(top_p=0.3001),
            params(top_p=0.9501),
        ):
            ours = sample(logits.expand(5, -1), [sampling] * 5, DRAWS[::8])
            assert ours == [reference(logits, sampling, draw) for draw in DRAWS[::8]]
    # The last draw takes the highest id that is kept, whatever the size of the set.
    last = [1 - 2.0**-24] * 290
    by_size = [params(top_k=k) for k in range(10, 300)]
    ours = sample(rounded.expand(290, -1), by_size, last)
    assert ours == [reference(rounded, sampling, last[0]) for sampling in by_size]
    assert sample(torch.zeros(1, 9), [params(temperature=0.0)], [0.5]) == [0]


def test_greedy_takes_the_largest() -> None:
    logits = torch.stack([random_logits(seed, 500) for seed in range(5)])
    assert sample(logits, [params(temperature=0.0)] * 5, [0.9] * 5) == logits.argmax(-1).tolist()


def test_tiny_temperatures_are_greedy() -> None:
    logits = random_logits(0, 500)[None]
    for temperature in (1e-300, 1e-31, 1e-29, 1e-12):
        for order in ("openai", "rwkv"):
            for top_p in (1.0, 0.7):
                sampling = params(temperature=temperature, top_p=top_p, sampling_order=order)
                assert sample(logits, [sampling], [0.99]) == [int(logits.argmax())]


def test_neutral_values_change_nothing() -> None:
    logits = random_logits(2, 500).expand(40, -1)
    plain = sample(logits, [params()] * 40, DRAWS)
    for neutral in (
        params(top_k=500),
        params(top_k=10**9),
        params(min_p=1e-30),
        params(sampling_order="rwkv"),
        params(top_p=1 - 1e-12),
    ):
        assert sample(logits, [neutral] * 40, DRAWS) == plain


def test_each_row_has_its_own_settings() -> None:
    logits = torch.stack([random_logits(seed, 400) for seed in range(len(SETTINGS))])
    draws = [uniform(3, 0, g) for g in range(len(SETTINGS))]
    together = sample(logits, SETTINGS, draws)
    alone = [sample(logits[g : g + 1], [SETTINGS[g]], [draws[g]])[0] for g in range(len(SETTINGS))]
    assert together == alone


@pytest.mark.parametrize(
    "sampling",
    [params(), params(temperature=0.6), params(top_p=0.8), params(min_p=0.05, top_k=12)],
)
def test_draws_follow_the_distribution(sampling: SamplingParams) -> None:
    """Chi-square of 8,000 seeded draws against numpy's softmax on the kept set."""
    logits = random_logits(5, 20)
    p = np.exp(logits.double().numpy() / sampling.temperature)
    ranked = np.sort(p)[::-1] / p.sum()
    num_kept = min(sampling.top_k or 20, int((ranked >= sampling.min_p * ranked[0]).sum()))
    num_kept = min(num_kept, int((ranked.cumsum() - ranked < sampling.top_p).sum()))
    p = np.where(p >= np.sort(p)[-num_kept], p, 0)
    p /= p.sum()
    draws = [uniform(11, 0, position) for position in range(8000)]
    ids = sample(logits.expand(8000, -1), [sampling] * 8000, draws)
    counts = np.bincount(ids, minlength=20)
    assert (counts[p == 0] == 0).all()
    expected = 8000 * p[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    # The 99.9 % points of chi-square for up to 19 degrees of freedom.
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees) + 5


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [7, 9]] = 0.0
    last = float(np.nextafter(np.float32(1), np.float32(0)))
    for sampling in (params(), params(top_p=0.9), params(top_k=20), params(min_p=0.5)):
        assert sample(logits, [sampling], [0.0]) == [7]
        assert sample(logits, [sampling], [last]) == [9]


def test_top_tokens_are_the_largest_best_first() -> None:
    log_probs = random_logits(3, 2000).log_softmax(-1)
    expected = sorted(range(2000), key=lambda i: (-log_probs[i], i))[:20]
    assert top_tokens(log_probs, 20) == tuple((i, float(log_probs[i])) for i in expected)


def test_top_tokens_takes_the_lowest_ids_of_equals_and_nothing_impossible() -> None:
    ties = torch.zeros(2000)
    ties[1500] = 1.0
    assert [i for i, _ in top_tokens(ties, 4)] == [1500, 0, 1, 2]
    few = torch.full((2000,), -torch.inf)
    few[[3, 8]] = torch.tensor([-1.0, -0.5])
    assert top_tokens(few, 5) == ((8, -0.5), (3, -1.0))
    assert len(top_tokens(torch.zeros(3), 20)) == 3
