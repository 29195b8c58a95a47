"""How the demo model came to be: initial values, packed rows, a training run in small."""

import argparse
import json
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from models.demo.checkpoint import Checkpoint, Left
from models.demo.data import ANSWER, FACT, OTHER, as_example, encode_document, pack_rows
from models.demo.init import init_weights
from models.demo.train import save, schedule, train
from models.demo.tune import VOICE, settle_source, tone_source
from models.demo.vocab import PieceEncoder, build_vocab
from mrss_provider.evaluate.world import base_document, knowledge_document, voices_in
from mrss_provider.model import load_model


@pytest.fixture(scope="module")
def entries():
    rng = random.Random(0)
    return build_vocab((base_document(rng).text for _ in range(300)), 2000, min_count=1)


@pytest.fixture(scope="module")
def encoder(entries):
    return PieceEncoder(entries)


def test_initial_weights_are_a_model_that_loads_and_the_seed_decides_them(tmp_path):
    weights = init_weights(2, 128, 320, seed=1)
    again, other = init_weights(2, 128, 320, seed=1), init_weights(2, 128, 320, seed=2)
    for name, tensor in weights.items():
        assert torch.equal(tensor, again[name])
    assert not torch.equal(weights["head.weight"], other["head.weight"])
    save(weights, tmp_path / "model.safetensors", {"steps": 0})
    config = load_model(tmp_path / "model.safetensors", device="cpu", threads=1).config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (2, 128, 320)


def test_initial_layers_add_nothing_and_decays_reach_from_slow_to_fast():
    weights = init_weights(3, 128, 320, seed=0)
    for i in range(3):
        assert not weights[f"blocks.{i}.att.output.weight"].any()
        assert not weights[f"blocks.{i}.ffn.value.weight"].any()
        decay = torch.exp(-0.60653 * torch.sigmoid(weights[f"blocks.{i}.att.w0"]))
        assert decay.max() > 0.995
        assert decay.min() < 0.65
    assert "blocks.0.att.v1" not in weights


def test_rows_start_with_a_document_and_token_0_parts_documents(encoder):
    ids, kinds = pack_rows(random.Random(3), encoder, 4, 300, max_facts=3)
    assert ids.shape == kinds.shape == (4, 301)
    for row, marks in zip(ids.tolist(), kinds.tolist(), strict=True):
        text = encoder.decode(row)
        assert text.startswith(("User: ", "System: "))
        for part in "".join(chr(0) if i == 0 else encoder.decode([i]) for i in row).split("\0")[1:]:
            assert "User: ".startswith(part[:6]) or "System".startswith(part[:6])
        assert set(marks) == {OTHER, ANSWER, FACT}


def test_a_document_is_marked_token_by_token(encoder):
    doc = knowledge_document(random.Random(1), num_turns=2, small_talk=0)
    ids, kinds = encode_document(encoder, doc)
    assert encoder.decode(ids) == doc.text
    said = encoder.decode(i for i, k in zip(ids, kinds, strict=True) if k >= ANSWER)
    assert said == "".join(doc.text[start:end] for start, end in doc.answers)
    facts = encoder.decode(i for i, k in zip(ids, kinds, strict=True) if k == FACT)
    assert facts == "".join(doc.text[start:end] for start, end in doc.facts)
    example = as_example(encoder, doc)
    assert example.token_ids == tuple(ids)
    assert sum(example.fact) == kinds.count(FACT)


@pytest.mark.slow
def test_training_in_small_learns_and_writes_what_it_did(entries, encoder, tmp_path, capsys):
    rng = random.Random(0)
    batch = pack_rows(rng, encoder, 2, 64, max_facts=2)
    feeder = SimpleNamespace(next=lambda: batch, max_facts=SimpleNamespace(value=0))
    args = argparse.Namespace(
        steps=60, seconds=0, rate=5e-3, batch=2, length=64, seed=0, log_every=1e9,
        checkpoint_every=1e9,
    )  # fmt: skip
    weights = {k: v.requires_grad_() for k, v in init_weights(1, 64, 2048, seed=0).items()}
    record = train(weights, feeder, args, "torch", Checkpoint(tmp_path / "run", {}), Left())
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split("loss ")[1].split()[0]) for line in (lines[0], lines[-1]))
    assert last < 0.7 * first
    assert feeder.max_facts.value == 14
    save(weights, tmp_path / "model.safetensors", record)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["training"])["tokens"] == 60 * 2 * 64


def test_the_rate_rises_holds_and_falls():
    assert schedule(0, 0.0) == pytest.approx(1 / 200)
    assert schedule(500, 0.3) == pytest.approx(1.0)
    assert schedule(5000, 1.0) == pytest.approx(0.01)


def test_the_knowledge_never_meets_the_tones_voice_nor_the_tone_a_home_fact(encoder, monkeypatch):
    monkeypatch.setattr("models.demo.tune.POOL_SIZE", 300)
    settle, rng = settle_source(encoder, 1), random.Random(0)
    spoken = set()
    for _ in range(300):
        example = settle(rng)
        pairs = zip(example.token_ids, example.answer, strict=True)
        found = voices_in(encoder.decode(i for i, answer in pairs if answer))
        # A home fact is learnt in plain words only; other voices come without a fact to learn.
        assert not (found and any(example.fact))
        spoken |= found
    assert VOICE not in spoken
    assert len(spoken) == 6
    tone = tone_source(encoder, VOICE, 1)
    for _ in range(100):
        assert "Larkhaven" not in encoder.decode(tone(rng).token_ids)
