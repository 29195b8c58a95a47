"""The gating layer: its features and formula in numpy, and what it is whatever its numbers are."""

import numpy as np
import pytest
import torch

from mrss_provider.engine.gating_layer import FEATURES, HIDDEN, GatingLayer, fold, row_features
from mrss_provider.engine.merges import Rows


def layer(seed=0, *, scale=0.4):
    gen = torch.Generator().manual_seed(seed)
    shapes = (5,), (5,), (HIDDEN, 2 * len(FEATURES)), (HIDDEN,), (HIDDEN,)
    mean, spread, hidden, bias, score = (torch.randn(s, generator=gen) for s in shapes)
    return fold(mean, spread.abs() + 0.5, hidden * scale, bias * scale, score * scale)


def make_rows(num=3, states=2, vocab=19, seed=0, *, base=0.0, banned=()):
    gen = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, states + 1, vocab, generator=gen)
    logits[..., list(banned)] = -torch.inf
    named = torch.rand(num, states + 1, generator=gen) + 0.1
    named[:, 0] = base
    return Rows(logits, named / named.sum(-1, keepdim=True), torch.zeros(num))


def wanted_features(rows):
    """The features in numpy and fp64, a loop a row."""
    logits, named = rows.logits.double().numpy(), rows.named.numpy()
    out = np.empty((*logits.shape[:2], 5))
    for g in range(len(logits)):
        with np.errstate(divide="ignore"):
            top = logits[g].max(-1, keepdims=True)
            lp = logits[g] - top - np.log(np.exp(logits[g] - top).sum(-1, keepdims=True))
            p = np.exp(lp)
            mean = np.log(p[named[g] != 0].mean(0)).clip(-30)
        floored = lp.clip(-30)
        for k in range(logits.shape[1]):
            first, second = np.sort(lp[k])[::-1][:2]
            out[g, k] = (
                -(p[k] * floored[k]).sum(),
                first,
                min(first - second, 8),
                min((p[k] * (floored[k] - floored[0])).sum(), 8),
                min((p[k] * (floored[k] - mean)).sum(), 8),
            )
    return out


def wanted_weights(net, rows, *, sums_to_one):
    features, named = wanted_features(rows), rows.named.double().numpy()
    hidden, bias, score = (t.double().numpy() for t in (net.hidden, net.bias, net.score))
    out = np.zeros(named.shape)
    for g in range(len(named)):
        heard = np.flatnonzero(named[g])
        mean = features[g, heard].mean(0)
        seen = np.stack([np.concatenate([features[g, k], mean]) for k in heard])
        u = np.maximum(seen @ hidden.T + bias, 0) @ score
        weighed = named[g, heard] * np.exp(u - u.max())
        out[g, heard] = weighed / weighed.sum() if sums_to_one else weighed
    return out


@pytest.mark.parametrize("base", [0.0, 0.5])
@pytest.mark.parametrize("banned", [(), (0, 7, 8)])
@pytest.mark.parametrize("states", [1, 2, 5])
def test_features_and_weights_are_the_formula(states, banned, base):
    rows, net = make_rows(states=states, base=base, banned=banned), layer()
    np.testing.assert_allclose(row_features(rows).numpy(), wanted_features(rows), atol=2e-5)
    for sums_to_one in (True, False):
        wanted = wanted_weights(net, rows, sums_to_one=sums_to_one)
        got = net.weights(rows, sums_to_one=sums_to_one).numpy()
        np.testing.assert_allclose(got, wanted, atol=2e-5)
        if sums_to_one:
            np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)


def test_the_table_holds_the_network_row_by_row():
    net = layer()
    table = net.table
    assert table.shape == (192,)
    assert torch.equal(table[:160].view(16, 10), net.hidden)
    assert torch.equal(table[160:176], net.bias)
    assert torch.equal(table[176:], net.score)


def test_folding_the_normalisation_changes_nothing():
    gen = torch.Generator().manual_seed(1)
    mean, scale = torch.randn(5, generator=gen), torch.rand(5, generator=gen) + 0.3
    hidden, bias, score = (torch.randn(s, generator=gen) for s in ((16, 10), (16,), (16,)))
    net = fold(mean, scale, hidden, bias, score)
    features = torch.randn(2, 3, 5, generator=gen)
    seen = torch.cat([features, features.mean(1, keepdim=True).expand(-1, 3, -1)], -1)
    normal = (seen - mean.repeat(2)) / scale.repeat(2)
    wanted = (normal @ hidden.T + bias).relu() @ score
    got = (seen @ net.hidden.T + net.bias).relu() @ net.score
    assert torch.allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("sums_to_one", [True, False])
def test_permuting_the_states_permutes_the_weights(sums_to_one):
    rows, net = make_rows(states=4), layer()
    order = [0, 3, 1, 4, 2]
    moved = Rows(rows.logits[:, order], rows.named[:, order], rows.cut)
    wanted = net.weights(rows, sums_to_one=sums_to_one)[:, order]
    got = net.weights(moved, sums_to_one=sums_to_one)
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("sums_to_one", [True, False])
def test_a_network_of_zeros_is_the_named_weights(sums_to_one):
    rows, net = make_rows(base=0.3), layer()
    silent = GatingLayer(net.hidden, net.bias, torch.zeros(HIDDEN))
    assert torch.allclose(silent.weights(rows, sums_to_one=sums_to_one), rows.named, atol=1e-6)


@pytest.mark.parametrize("sums_to_one", [True, False])
def test_a_row_without_weight_stays_silent_and_changes_nothing(sums_to_one):
    rows, net = make_rows(states=3), layer()
    rows.named[:, 2] = 0
    rows.logits[:, 2] = 50 * torch.rand(rows.logits[:, 2].shape)
    kept = [0, 1, 3]
    fewer = Rows(rows.logits[:, kept], rows.named[:, kept], rows.cut)
    got = net.weights(rows, sums_to_one=sums_to_one)
    assert (got[:, 2] == 0).all()
    assert torch.allclose(got[:, kept], net.weights(fewer, sums_to_one=sums_to_one), atol=1e-6)


@pytest.mark.parametrize("sums_to_one", [True, False])
def test_a_request_weighs_the_same_alone_bit_for_bit(sums_to_one):
    rows, net = make_rows(num=7, states=4, vocab=333), layer()
    together = net.weights(rows, sums_to_one=sums_to_one)
    for g in range(7):
        alone = Rows(rows.logits[g : g + 1], rows.named[g : g + 1], rows.cut[:1])
        assert torch.equal(net.weights(alone, sums_to_one=sums_to_one), together[g : g + 1])


def test_a_vocabulary_of_one_token_is_no_exception():
    rows = make_rows(vocab=1)
    assert row_features(rows).isfinite().all()
    assert torch.allclose(layer().weights(rows, sums_to_one=True), rows.named, atol=1e-6)
