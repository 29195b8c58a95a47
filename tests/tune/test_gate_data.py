"""What a gate learns from: what the rows say, as a plain forward pass of each row says it."""

from types import SimpleNamespace

import pytest
import torch
from tiny_model import TINY, tuned_state, write_checkpoint

from mrss_provider.engine.gating_layer import row_features
from mrss_provider.engine.merges import Rows
from mrss_provider.errors import InvalidRequestError
from mrss_provider.model import StateMetadata, TunedState, load_model
from mrss_provider.tune import Example, read_weights
from mrss_provider.tune.gate_data import collect
from mrss_provider.tune.network import Shape, forward, logits, start_state

BANNED = (0, 317, 318, 319)


def example(*ids, first_answer):
    answer = tuple(at >= first_answer for at in range(len(ids)))
    return Example(ids, answer, (False,) * len(ids))


EXAMPLES = [
    example(5, 9, 30, 31, 7, 8, first_answer=3),
    example(11, 12, 13, first_answer=0),
    example(4, first_answer=0),
    *(example(*range(20 + i, 40 + 2 * i), first_answer=10) for i in range(9)),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("gates") / "tiny.pth")


@pytest.fixture(scope="module")
def model(path):
    return load_model(path, device="cpu", dtype="fp32", threads=1)


def make_state(seed, *, bos=False):
    wkv = torch.stack(list(tuned_state(seed=seed).values()))
    return TunedState(f"s{seed}", wkv, metadata=StateMetadata(bos=bos))


def mixture(*states, weights, base=0.0):
    return SimpleNamespace(
        canonical="some mixture", states=(None, *states), weights=(base, *weights), base_row=0
    )


def wanted_logits(path, wkv, ids, *, bos=False):
    """Logits [T, V] after each of `ids`, from the differentiable network."""
    weights = read_weights(path)
    read = torch.tensor([[0, *ids] if bos else ids])
    hidden, _ = forward(weights, read, start_state(Shape.of(weights), wkv[None], torch.float32))
    z = logits(weights, hidden)[0, int(bos) :]
    z[:, list(BANNED)] = -torch.inf
    return z


@pytest.mark.parametrize("base", [0.0, 0.2])
@pytest.mark.parametrize("bos", [False, True])
def test_it_is_what_each_row_alone_says_of_the_answers(model, path, bos, base):
    states = make_state(1), make_state(2, bos=bos)
    named = (base, 0.3, 0.5)
    mixed = mixture(*states, weights=named[1:], base=base)
    data = collect(model, mixed, EXAMPLES, banned_ids=BANNED)
    counted = [[at for at, a in enumerate(e.answer) if a and at > 0] for e in EXAMPLES]
    assert data.document.tolist() == [i for i, found in enumerate(counted) for _ in found]
    at = 0
    for text, positions in zip(EXAMPLES, counted, strict=True):
        if not positions:
            continue
        z = torch.stack(
            [
                wanted_logits(path, wkv, text.token_ids, bos=with_bos)
                for wkv, with_bos in (
                    (torch.zeros(TINY.num_layers, TINY.num_heads, 64, 64), False),
                    (states[0].wkv, False),
                    (states[1].wkv, bos),
                )
            ],
            dim=1,
        )[[p - 1 for p in positions]]
        rows = Rows(z, torch.tensor(named).expand(len(z), -1), torch.zeros(len(z)))
        heard = torch.tensor(named) > 0
        end = at + len(positions)
        features = row_features(rows)[:, heard]
        assert torch.allclose(data.features[at:end], features, atol=2e-3)
        following = torch.tensor([text.token_ids[p] for p in positions])
        lp = rows.log_probs[torch.arange(len(z)), :, following][:, heard]
        assert torch.allclose(data.log_probs[at:end], lp.clamp_min(-30), atol=2e-3)
        at = end
    assert at == len(data.document)


def test_long_texts_are_cut_and_progress_is_told(model):
    told = []
    data = collect(
        model,
        mixture(make_state(1), make_state(2), weights=(0.5, 0.5)),
        EXAMPLES,
        max_len=12,
        on_documents=lambda done, total: told.append((done, total)),
    )
    assert told == [(8, 12), (12, 12)]
    assert torch.bincount(data.document).max() == 3


def test_a_part_holds_the_tokens_of_its_documents(model):
    data = collect(model, mixture(make_state(1), make_state(2), weights=(0.5, 0.5)), EXAMPLES)
    part = data.part([1, 4])
    assert part.document.unique().tolist() == [1, 4]
    assert torch.equal(part.features, data.features[(data.document == 1) | (data.document == 4)])


def test_what_cannot_train_a_gate_is_refused(model):
    one = mixture(make_state(1), weights=(1.0,))
    with pytest.raises(InvalidRequestError, match=r"two states or more.*'some mixture'"):
        collect(model, one, EXAMPLES)
    two = mixture(make_state(1), make_state(2), weights=(0.5, 0.5))
    with pytest.raises(InvalidRequestError, match="no text has a token to learn from"):
        collect(model, two, [example(5, 6, 7, first_answer=3)])
