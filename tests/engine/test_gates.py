"""Gates that look at the rows of a token, against their formulas in fp64."""

import math

import numpy as np
import pytest
import torch
from fake_model import fake_state, mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider import mixture as names
from mrss_provider.engine.gates import GATES, Heard, gate_of, make_gate, named_weights
from mrss_provider.engine.merges import Rows
from mrss_provider.mixture import parse_method

V = 50
Array = NDArray[np.float64]

ON_ROWS = ("fixed", "novelty", "novelty:1,2", "novelty:0.1,0", "confidence", "confidence:2",
           "posterior-novelty:0.02,0.1")  # fmt: skip


def random_logits(
    seed: int, num_groups: int = 3, num_rows: int = 4, *, vocab: int = V, scale: float = 1.5
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_groups, num_rows, vocab, generator=generator) * scale
    banned = [i for i in (4, 9) if i < vocab]
    return logits.index_fill(2, torch.tensor(banned, dtype=torch.int64), -torch.inf)


def weights(gate: str, logits: Tensor, named: Tensor, *, shares: bool) -> Tensor:
    rows = Rows(logits, named, torch.zeros(len(logits)))
    return make_gate(parse_method(gate, "gate", "gate")).weights(rows, sums_to_one=shares)


def divergences(logits: Tensor) -> Array:
    lp = logits.double().log_softmax(-1)
    p = lp.exp()
    difference = torch.where(p > 0, lp - lp[:, :1], 0.0)
    return (p * difference).sum(-1).numpy()  # type: ignore[no-any-return]


def entropies(logits: Tensor) -> Array:
    lp = logits.double().log_softmax(-1)
    return -torch.where(lp.isfinite(), lp.exp() * lp, 0.0).sum(-1).numpy()  # type: ignore[no-any-return]


def oracle(gate: str, logits: Tensor, named: Array, *, shares: bool) -> Array:
    """Return the weights [G, K], formulas written for reading; nothing agrees with the base."""
    method = parse_method(gate, "gate", "gate")
    if method.name == "fixed":
        return named
    tau = method.number("tau")
    if method.name == "confidence":
        entropy = entropies(logits)
        if not shares:
            heard = np.where(named != 0, entropy, np.inf)
            ahead = np.minimum(heard.min(-1, keepdims=True) - entropy, 0.0)
            return named * np.exp(ahead / tau)
        raw = named * np.exp(-entropy / tau)
    else:
        d = divergences(logits)
        if not shares:
            d = np.where(named != 0, d, 0)
            d = np.abs(named) * d if method.name == "posterior-novelty" else d
            exponent = method.number("exponent") if method.name == "novelty" else 1.0
            return named * (d / d.max(-1, keepdims=True)) ** exponent
        raw = named * np.exp(np.minimum(d, 8.0) / tau)
    return raw / raw.sum(-1, keepdims=True)


def test_every_gate_that_a_name_may_have_is_registered() -> None:
    """But for those that are read from a file."""
    untrained = [
        name for name, table in names.GATES.items() if not any(p.kind == "file" for p in table)
    ]
    assert list(GATES) == untrained
    assert set(names.GATES) - set(GATES) == {"learned"}
    for gate in ON_ROWS:
        method = parse_method(gate, "gate", "gate")
        assert make_gate(method).name == method.name


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("gate", ON_ROWS)
@pytest.mark.parametrize("num_rows", [2, 4, 6])
def test_gate_equals_its_formula(gate: str, num_rows: int, shares: bool) -> None:
    for seed in range(4):
        # The base is needed only, or named; a state may have no weight at all.
        named = torch.rand(3, num_rows, generator=torch.Generator().manual_seed(seed)) + 0.1
        named[:, 0] *= seed % 2
        named[0, -1] *= seed // 2
        named[0, 1] += 0.1
        if shares:
            named = named / named.sum(-1, keepdim=True)
        logits = random_logits(seed, num_rows=num_rows)
        ours = weights(gate, logits, named, shares=shares)
        expected = oracle(gate, logits, named.double().numpy(), shares=shares)
        np.testing.assert_allclose(ours.numpy(), expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", ON_ROWS)
@pytest.mark.parametrize("shares", [True, False])
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.sampled_from([1, 2, 50]),
    st.sampled_from([1e-5, 1.0, 60.0]),
)
@settings(max_examples=30, deadline=None)
def test_whatever_the_rows_weights_are_weights(
    gate: str, shares: bool, seed: int, num_rows: int, vocab: int, scale: float
) -> None:
    """Finite, not negative, 0 where nothing was named; shares sum to 1, strengths do not grow."""
    logits = random_logits(seed, 2, num_rows, vocab=vocab, scale=scale)
    named = torch.rand(2, num_rows, generator=torch.Generator().manual_seed(seed))
    named[:, -1] += 0.1
    if num_rows > 2:
        named[:, 1] = 0
    if shares:
        named = named / named.sum(-1, keepdim=True)
    ours = weights(gate, logits, named, shares=shares)
    assert ours.isfinite().all()
    assert (ours >= 0).all()
    assert (ours[named == 0] == 0).all()
    if shares:
        torch.testing.assert_close(ours.sum(-1), torch.ones(2))
    else:
        # Where all that are named agree with the base, `novelty` makes shares of the strengths.
        heard = np.where(named > 0, divergences(logits), 0.0)
        agrees = torch.from_numpy(heard.max(-1) < 1e-3)
        assert ((ours <= named).all(-1) | agrees).all()


@pytest.mark.parametrize("gate", ["novelty:1000", "confidence:1000", "posterior-novelty:0.02,1000"])
def test_a_large_tau_leaves_the_prior(gate: str) -> None:
    named = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3)
    ours = weights(gate, random_logits(5), named, shares=True)
    torch.testing.assert_close(ours, named, atol=3e-3, rtol=0)
    strengths = weights("confidence:1000", random_logits(5), named, shares=False)
    torch.testing.assert_close(strengths, named, atol=3e-3, rtol=0)
    all_alike = weights("novelty:0.3,0", random_logits(5), named, shares=False)
    torch.testing.assert_close(all_alike, named)


def test_novelty_where_all_agree_with_the_base() -> None:
    logits = random_logits(0)[:, :1].expand(3, 4, V).contiguous()
    logits += torch.tensor([0.0, 5.0, -5.0, 1.0])[:, None]
    named = torch.tensor([[0.0, 1.0, 0.5, 0.5]] * 3)
    ours = weights("novelty", logits, named, shares=False)
    torch.testing.assert_close(ours, torch.tensor([[0.0, 0.5, 0.25, 0.25]] * 3))
    shares = torch.tensor([[0.0, 0.5, 0.25, 0.25]] * 3)
    ours = weights("novelty", logits, shares, shares=True)
    torch.testing.assert_close(ours, shares, atol=1e-4, rtol=1e-4)
    # A state that is pushed away from does not turn the others around.
    against = torch.tensor([[1.0, 0.5, -1.0, -1.0]] * 3)
    ours = weights("novelty", logits, against, shares=False)
    torch.testing.assert_close(ours, against / 3.5)


def test_novelty_caps_how_far_a_state_may_be() -> None:
    """Beyond 8 nats two states weigh alike, however much further one of them is."""
    logits = torch.zeros(1, 3, V)
    logits[0, 0, [1, 2]] = torch.tensor([-6.0, -20.0])
    logits[0, 1, 1], logits[0, 2, 2] = 30.0, 30.0
    assert divergences(logits)[0, 1:].tolist() == pytest.approx([9.9, 23.9], abs=0.1)
    named = torch.tensor([[0.0, 0.5, 0.5]])
    ours = weights("novelty", logits, named, shares=True)
    torch.testing.assert_close(ours, named)


def test_confidence_is_of_the_surest_row_with_a_weight() -> None:
    """The base, which only the merge rule needs, may be surer than all: it silences nobody."""
    logits = torch.zeros(1, 3, V)
    logits[0, 0, 1] = 30.0
    logits[0, 1, 2] = 6.0
    named = torch.tensor([[0.0, 1.0, 0.5]])
    ours = weights("confidence", logits, named, shares=False)
    gap = entropies(logits)[0, 2] - entropies(logits)[0, 1]
    assert ours.tolist() == [[0.0, 1.0, pytest.approx(0.5 * math.exp(-gap / 0.3), rel=1e-3)]]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("gate", ON_ROWS)
def test_gates_are_permutation_equivariant(gate: str, shares: bool) -> None:
    logits = random_logits(3)
    named = torch.tensor([[0.0, 0.6, 0.3, 0.1]] * 3)
    order = [0, 2, 3, 1]
    straight = weights(gate, logits, named, shares=shares)
    permuted = weights(gate, logits[:, order].contiguous(), named[:, order], shares=shares)
    torch.testing.assert_close(permuted, straight[:, order])


@pytest.mark.parametrize("gate", [gate for gate in ON_ROWS if gate != "fixed"])
def test_a_nan_reaches_only_its_own_request(gate: str) -> None:
    logits, named = random_logits(6), torch.tensor([[0.0, 0.5, 0.25, 0.25]] * 3)
    clean = weights(gate, logits, named, shares=True)
    logits[1, 2, 17] = torch.nan
    ours = weights(gate, logits, named, shares=True)
    assert ours[1].isnan().any()
    assert ours[[0, 2]].equal(clean[[0, 2]])


def test_divergence_and_entropy_are_right_with_bans() -> None:
    logits = random_logits(4)
    rows = Rows(logits, torch.zeros(3, 4), torch.zeros(3))
    np.testing.assert_allclose(rows.divergence_from_base(), divergences(logits), atol=1e-5)
    np.testing.assert_allclose(rows.entropy(), entropies(logits), atol=1e-5)


@pytest.mark.parametrize("gate", ["fixed", "novelty", "confidence"])
@pytest.mark.parametrize("merge", ["linear", "delta", "product", "contrast"])
def test_a_gate_without_a_prior_leaves_the_named_weights(merge: str, gate: str) -> None:
    mixed = mixture(None, fake_state("a"), fake_state("b"), weights=[0, 1, 0.5], merge=merge,
                    gate=gate)  # fmt: skip
    assert not gate_of(mixed).moves_prior
    expected = (0.0, 2 / 3, 1 / 3) if merge == "linear" else (0.0, 1.0, 0.5)
    assert named_weights(mixed, Heard(position=9, turn=3)) == pytest.approx(expected)
