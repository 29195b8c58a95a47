"""The tail of a step on a CUDA device: the distributions and the draws of the CPU."""

import pytest
import torch
from fake_model import fake_state, mixture

from mrss_provider.engine.logits_processors import Bias, Occurrences
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.tail import Pick, merge_rows, pick_tokens
from mrss_provider.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu

V = 65536
A, B = fake_state("a"), fake_state("b")
MIXTURES = [
    mixture(A),
    mixture(A, B, weights=[0.3, 0.7]),
    mixture(A, B, merge="geometric"),
    mixture(None, A, B, weights=[0, 1, 1], merge="delta", gate="novelty", cut=0.1),
    mixture(None, A, B, weights=[0, 0.5, 0.5], gate="novelty"),
]
OTHERS = [
    mixture(A, B, weights=[0.3, 0.7], merge="power:-1"),
    mixture(A, B, merge="power:0.001", gate="confidence"),
    mixture(A, B, weights=[1, 0.5], merge="product", gate="confidence:1"),
    mixture(None, A, B, weights=[0, 1, -0.5], merge="contrast", gate="novelty:0.3,2", cut=0.1),
    mixture(None, A, B, weights=[0, 0.5, 0.5], merge="route", gate="novelty"),
    mixture(None, A, B, weights=[0, 1, 0.5], merge="delta", gate="posterior-novelty", cut=0.1),
]
SAMPLING = [
    SamplingParams(temperature=0.0, top_p=1.0, seed=1, logprobs=True, top_logprobs=3),
    SamplingParams(temperature=1.0, top_p=1.0, seed=2, logit_bias={5: 3.0, 6: -100}),
    SamplingParams(temperature=0.7, top_p=0.8, seed=3, frequency_penalty=0.5),
    SamplingParams(temperature=1.3, top_p=0.9, seed=4, sampling_order="rwkv", min_p=0.01),
    SamplingParams(temperature=1.0, top_p=1.0, seed=5, top_k=40, repetition_penalty=1.2),
]


def random_rows(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, V, generator=generator) * 4


@pytest.mark.parametrize("mixed", MIXTURES + OTHERS)
def test_merged_logits_equal_the_cpus(mixed: ResolvedMixture) -> None:
    parts = [(range(g * mixed.rows, (g + 1) * mixed.rows), mixed) for g in range(4)]
    logits = random_rows(0, 4 * mixed.rows)
    ours = merge_rows(logits.cuda(), parts).cpu()
    torch.testing.assert_close(ours, merge_rows(logits, parts), atol=2e-4, rtol=1e-4)


def test_draws_equal_the_cpus() -> None:
    picks, rows = [], 0
    for g in range(50):
        mixed, params = MIXTURES[g % 5], SAMPLING[(g // 5) % 5]
        seen = Occurrences([1, 2], params) if params.has_penalties else None
        own = range(rows, rows + mixed.rows)
        picks.append(Pick(own, mixed, params, Bias(params), seen, choice=0, position=g))
        rows += mixed.rows
    logits = random_rows(1, rows)
    banned = torch.arange(V - 6, V)
    on_cpu = pick_tokens(logits.clone(), picks, banned)
    on_gpu = pick_tokens(logits.cuda(), picks, banned.cuda())
    assert [p.token_id for p in on_gpu] == [p.token_id for p in on_cpu]
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
        if theirs.logprob is not None:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
