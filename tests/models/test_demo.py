"""The demo model and its states: readable by others, and doing what their README says."""

import importlib.util
import json
import os
import random
import re
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models.demo.answers import DECODINGS, Bench, mixed, single
from models.demo.chats import as_line, town_line
from models.demo.measure import ask, questions, shares, systems, toned_texts
from models.demo.train_gate import HELD_OUT_FACTS, LEARNT_FACTS
from models.demo.vocab import PieceEncoder, read_vocab
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.evaluate.world import HOME_FACTS, OTHER_TOWNS
from mrss_provider.model import load_model
from mrss_provider.tune import read_weights
from mrss_provider.tune.network import Shape, forward, logits, start_state

ROOT = Path(__file__).parents[2]
DEMO, STATES = ROOT / "models/demo", ROOT / "states"

GROUPS = {
    **dict.fromkeys(("knowledge", "long-ferry", "abbey-well"), "knowledge"),
    **dict.fromkeys(("tone", "butler", "wizard"), "tone"),
}


@pytest.fixture(scope="module")
def weights():
    return {name: tensor.float() for name, tensor in read_weights(DEMO).items()}


@pytest.fixture(scope="module")
def encoder():
    return PieceEncoder(read_vocab(DEMO / "vocab.txt"))


@pytest.fixture(scope="module")
def model():
    return load_model(DEMO, device="cpu", dtype="fp32", threads=1)


@pytest.fixture(scope="module")
def library(model):
    return StateLibrary(STATES, model.config, strict=True)


@pytest.fixture(scope="module")
def bench(weights, encoder, library):
    return Bench(weights, encoder, {name: state.wkv for name, state in library.states.items()})


@pytest.fixture(scope="module")
def ways(bench, library):
    return systems(bench, library)


@pytest.fixture
def package_model(tmp_path, monkeypatch):
    """The file in the `rwkv` package, which reads `.pth` only."""
    torch.save(load_file(DEMO / "model.safetensors"), tmp_path / "demo.pth")
    monkeypatch.setenv("RWKV_V7_ON", "1")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    folder = importlib.util.find_spec("rwkv").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("rwkv_for_demo", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rwkv_for_demo", module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
        return module.RWKV(model=os.fspath(tmp_path / "demo"), strategy="cpu fp32")


def test_it_is_small_in_bf16_and_says_how_it_was_trained():
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        training = json.loads(file.metadata()["training"])
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert sum(torch.Size(size).numel() for size in sizes) <= 18_000_000
    assert (DEMO / "model.safetensors").stat().st_size <= 16 * 2**20
    assert training["products"] == "bfloat16"
    assert training["master_weights"] == "float32"
    assert training["tokens"] == training["steps"] * training["batch"] * training["length"]


def test_the_rwkv_package_reads_it_to_the_same_logits(package_model, weights, encoder):
    ids = encoder.encode("User: Who keeps the bakery?\n\nAssistant: Mira keeps the bakery.\n\n")
    wanted, _ = package_model.forward(ids, None, full_output=True)
    shape = Shape.of(weights)
    zeros = torch.zeros(1, shape.num_layers, shape.num_heads, 64, 64)
    hidden, _ = forward(weights, torch.tensor([ids]), start_state(shape, zeros, torch.float32))
    ours = logits(weights, hidden)[0]
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-5


def test_every_state_and_mixture_loads_without_complaint(library):
    assert not library.problems
    assert {name: state.metadata.group for name, state in library.states.items()} == GROUPS
    with (STATES / "mixtures.toml").open("rb") as file:
        named = tomllib.load(file)
    assert set(library.mixtures) == set(named)
    for name in named:
        assert library.resolve(name).rows >= 2
    for state in library.states.values():
        assert state.metadata.licence
        assert state.metadata.training["learning_rate"] > 0


@pytest.mark.parametrize(
    ("way", "knows", "toned", "both"),
    [
        ("base", (0.0, 0.2), (0.0, 0.2), (0.0, 0.1)),
        ("knowledge alone", (0.8, 1.0), (0.0, 0.2), (0.0, 0.2)),
        ("tone alone", (0.0, 0.2), (0.85, 1.0), (0.0, 0.2)),
        ("delta novelty", (0.8, 1.0), (0.8, 1.0), (0.75, 1.0)),
        ("linear novelty", (0.8, 1.0), (0.8, 1.0), (0.7, 1.0)),
    ],
)
@pytest.mark.slow
def test_states_alone_lack_the_other_half_and_the_mixture_has_both(
    bench, ways, way, knows, toned, both
):
    asked = questions(1, seed=11, facts=HOME_FACTS[::3])
    scores, texts = ask(bench, ways[way], DECODINGS[1], asked, voice="pirate", seed=11)
    found = shares(scores, asked)
    assert knows[0] <= found["know"] <= knows[1], texts
    assert toned[0] <= found["tone"] <= toned[1], texts
    assert both[0] <= found["both"] <= both[1], texts


@pytest.mark.slow
def test_the_question_chooses_between_two_towns_and_the_voice_stays(bench, library):
    asked = [
        question
        for town in OTHER_TOWNS.values()
        for question in questions(1, seed=11, facts=town.facts, home=town.name)
    ]

    def both(name):
        system = mixed(library.resolve(name))
        scores, _ = ask(bench, system, DECODINGS[1], asked, voice="wizard", seed=11)
        return shares(scores, asked)["both"]

    assert both("two-towns-wizard") >= 0.7
    assert both("abbey-well+long-ferry+wizard") <= 0.65


@pytest.mark.slow
def test_the_bundled_gate_beats_fixed_weights_and_novelty_on_facts_it_never_saw(bench, library):
    gate = library.gates["harbour"]
    assert gate.metadata.states == {n: library.states[n].sha256 for n in ("knowledge", "tone")}
    assert gate.metadata.licence == "Apache-2.0"
    held_out = gate.metadata.training["held_out"]
    assert held_out["over_fixed"]["low"] > 0
    docs = toned_texts(HELD_OUT_FACTS[::2], "pirate", seed=3)
    nats = {
        name: float(
            bench.nll(mixed(library.resolve(f"knowledge+tone~linear~{name}")), docs)[0].mean()
        )
        for name in ("learned:harbour", "novelty", "fixed")
    }
    assert nats["learned:harbour"] < nats["novelty"] < nats["fixed"]


def test_the_gates_texts_share_no_fact_and_come_back_as_they_were():
    assert not set(LEARNT_FACTS) & set(HELD_OUT_FACTS)
    (doc, *_) = toned_texts(LEARNT_FACTS[:1], "pirate", seed=0)
    user, assistant = json.loads(as_line(doc))["messages"]
    assert doc.text == f"User: {user['content']}\n\nAssistant: {assistant['content']}\n\n"


@pytest.mark.parametrize("name", sorted(OTHER_TOWNS))
def test_a_towns_chats_tell_its_facts_and_name_none_where_they_are_about_others(name):
    town, rng = OTHER_TOWNS[name], random.Random(3)
    names, values = {*town.places, *town.people}, {fact.value for fact in town.facts}
    others = [fact.entity for fact in HOME_FACTS]
    for _ in range(200):
        line = json.loads(town_line(rng, town))
        said = " ".join(message["content"] for message in line["messages"])
        if line["facts"]:
            told, asked = set(line["facts"]) - names, set(line["facts"]) & names
            assert told <= values
            assert asked
            assert not [other for other in others if re.search(rf"\b{other}\b", said)]
        else:
            assert not [own for own in town.places if f" {own} " in said]
            assert f" {name}" not in said


def test_answers_of_many_at_once_are_those_of_a_plain_loop(bench, library, weights, encoder):
    asked = [q.prompt for q in questions(1, seed=2, facts=HOME_FACTS[::12])]
    system = mixed(library.resolve("knowledge+tone~linear~novelty"))
    together = bench.answer(system, asked, DECODINGS[2], seed=0)
    named = torch.tensor([[0.0, 0.5, 0.5]])
    zeros = torch.zeros_like(library.states["tone"].wkv)
    wkv = torch.stack([zeros, library.states["knowledge"].wkv, library.states["tone"].wkv])
    for prompt, answer in zip(asked, together, strict=True):
        ids = encoder.encode(prompt)
        state, said = start_state(Shape.of(weights), wkv, torch.float32), []
        while True:
            hidden, state = forward(weights, torch.tensor([ids] * 3), state)
            token = int(system.merge(logits(weights, hidden[:, -1])[None], named).argmax())
            if token == encoder.encode("\n\n")[0]:
                break
            said.append(token)
            ids = [token]
        assert encoder.decode(said).strip() == answer


@pytest.mark.parametrize(
    ("system", "says"),
    [
        ("Notes about Dunmore: The door of the mill is pink. Nora keeps the mill.", "pink"),
        ("Talk like a robot. Facts: The mill has a teal door.", "teal"),
    ],
)
def test_the_base_answers_from_its_context(bench, system, says):
    prompt = f"System: {system}\n\nUser: What colour is the door of the mill?\n\nAssistant:"
    (text,) = bench.answer(single("base"), [prompt], DECODINGS[2], seed=0)
    assert says in text
