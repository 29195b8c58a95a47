"""Gates against their formulas in fp64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mrss_provider import mixture as names
from mrss_provider.engine.gates import GATES, NOVELTY_TEMPERATURE
from mrss_provider.engine.merge import Rows

V = 50


def random_logits(seed: int, num_groups: int = 3, num_rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_groups, num_rows, V, generator=generator) * 1.5
    return logits.index_fill(2, torch.tensor([4, 9]), -torch.inf)


def weights(gate: str, logits: Tensor, named: Tensor, *, anchored: bool) -> Tensor:
    rows = Rows(logits, named, torch.zeros(len(logits)))
    return GATES[gate].weights(rows, anchored=anchored)


def divergences(logits: Tensor) -> np.ndarray:
    lp = logits.double().log_softmax(-1)
    p = lp.exp()
    difference = torch.where(p > 0, lp - lp[:, :1], 0.0)
    return (p * difference).sum(-1).numpy()


def test_every_gate_that_a_name_may_have_is_registered() -> None:
    assert tuple(GATES) == names.GATES
    assert all(gate.name == name for name, gate in GATES.items())


def test_fixed_is_what_the_name_says() -> None:
    named = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3)
    for anchored in (True, False):
        assert weights("fixed", random_logits(0), named, anchored=anchored).equal(named)


@pytest.mark.parametrize("seed", range(5))
def test_novelty_of_strengths(seed: int) -> None:
    logits = random_logits(seed)
    named = torch.tensor([[0.0, 1.0, 0.5, 0.25]] * 3)
    d = divergences(logits)
    expected = named.numpy() * d / d.max(-1, keepdims=True)
    ours = weights("novelty", logits, named, anchored=True)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_novelty_of_shares(seed: int) -> None:
    logits = random_logits(seed)
    # A base that is only needed has no share; one that is named has.
    for first in (0.0, 0.25):
        named = torch.tensor([[first, 0.5, 0.25, 0.25]] * 3)
        d = divergences(logits)
        raw = named.numpy() * np.exp(np.minimum(d, 8.0) / NOVELTY_TEMPERATURE)
        ours = weights("novelty", logits, named, anchored=False)
        np.testing.assert_allclose(
            ours.numpy(), raw / raw.sum(-1, keepdims=True), atol=2e-5, rtol=1e-4
        )
        assert (ours[:, 0] > 0).all() == (first > 0)


def test_novelty_where_all_agree_with_the_base() -> None:
    logits = random_logits(0)[:, :1].expand(3, 4, V).contiguous()
    logits += torch.tensor([0.0, 5.0, -5.0, 1.0])[:, None]
    named = torch.tensor([[0.0, 1.0, 0.5, 0.5]] * 3)
    ours = weights("novelty", logits, named, anchored=True)
    torch.testing.assert_close(ours, torch.tensor([[0.0, 0.5, 0.25, 0.25]] * 3))
    shares = torch.tensor([[0.0, 0.5, 0.25, 0.25]] * 3)
    ours = weights("novelty", logits, shares, anchored=False)
    torch.testing.assert_close(ours, shares, atol=1e-4, rtol=1e-4)


def test_novelty_caps_how_far_a_state_may_be() -> None:
    """Beyond 8 nats two states weigh alike, however much further one of them is."""
    logits = torch.zeros(1, 3, V)
    logits[0, 0, [1, 2]] = torch.tensor([-6.0, -20.0])
    logits[0, 1, 1], logits[0, 2, 2] = 30.0, 30.0
    assert divergences(logits)[0, 1:].tolist() == pytest.approx([9.9, 23.9], abs=0.1)
    named = torch.tensor([[0.0, 0.5, 0.5]])
    ours = weights("novelty", logits, named, anchored=False)
    torch.testing.assert_close(ours, named)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("gate", names.GATES)
def test_gates_are_permutation_equivariant(gate: str, anchored: bool) -> None:
    logits = random_logits(3)
    named = torch.tensor([[0.0, 0.6, 0.3, 0.1]] * 3)
    order = [0, 2, 3, 1]
    straight = weights(gate, logits, named, anchored=anchored)
    permuted = weights(gate, logits[:, order].contiguous(), named[:, order], anchored=anchored)
    torch.testing.assert_close(permuted, straight[:, order])


def test_divergence_is_kullback_leibler_with_bans() -> None:
    logits = random_logits(4)
    rows = Rows(logits, torch.zeros(3, 4), torch.zeros(3))
    np.testing.assert_allclose(rows.divergence_from_base(), divergences(logits), atol=1e-5)
