"""The whole engine on a CUDA device: the bundled model and states, graphs, the tail's kernels."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from mrss_provider.config import BUNDLED_STATES, DEMO_MODEL, EngineConfig
from mrss_provider.engine import device_runner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.gate_metadata import GateMetadata
from mrss_provider.engine.gates import Learned
from mrss_provider.engine.gating_layer import GatingLayer
from mrss_provider.engine.request import EngineRequest, TokenOutput, resolve_sampling
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.engine.step_runner import HostRunner
from mrss_provider.mixture import Method
from mrss_provider.model import Model, load_model
from mrss_provider.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu

CONFIG = EngineConfig(max_rows=48, prefill_chunk_len=64, prefill_alone_len=256)
MIXTURES = ["base", "knowledge", "knowledge+tone", "knowledge+tone~linear~fixed"]
Outputs = dict[str, list[TokenOutput]]


@pytest.fixture(scope="module", params=["fp16", "bf16", "sparse", "int8", "fp8", "int4"])
def model(request: pytest.FixtureRequest) -> Model:
    if request.param in ("int8", "fp8", "int4"):
        return load_model(DEMO_MODEL, device="cuda", dtype="fp16", quantize=request.param)
    sparse = request.param == "sparse"
    dtype = "fp16" if sparse else request.param
    return load_model(DEMO_MODEL, device="cuda", dtype=dtype, sparse_ffn=sparse)


@pytest.fixture(scope="module")
def library(model: Model) -> StateLibrary:
    return StateLibrary(BUNDLED_STATES, model.config, model_name="demo")


def make_engine(model: Model, library: StateLibrary, *, on_host: bool = False) -> Engine:
    allowed = range(model.config.vocab_size)
    none = torch.zeros(0, dtype=torch.int64, device="cuda")
    runner = HostRunner(model, CONFIG.max_rows, none) if on_host else None
    engine = Engine(model, library, CONFIG, allowed_ids=allowed, runner=runner)
    assert type(engine._runner).__name__ == ("HostRunner" if on_host else "DeviceRunner")
    return engine


def ask(
    library: StateLibrary, name: str, mixture: str, *, prompt_len: int = 20, **sampling: object
) -> EngineRequest:
    generator = random.Random(name)
    prompt = [generator.randrange(1, 1000) for _ in range(prompt_len)]
    resolved = library.resolve(mixture)
    values = {"max_tokens": 24, "ignore_eos": True, "top_p": 1.0, "temperature": 0.0, "seed": 1}
    params = SamplingParams(**(values | sampling))  # type: ignore[arg-type]
    return EngineRequest(name, tuple(prompt), resolved, resolve_sampling(params, resolved))


def run(engine: Engine, requests: Iterable[EngineRequest], every: int = 1) -> Outputs:
    """Run to the end; a request comes every so many steps."""
    outputs: Outputs = {}
    waiting = list(requests)
    for step in range(2000):
        if waiting and step % every == 0:
            engine.add(waiting.pop(0))
        if not waiting and not engine.has_work:
            assert engine.num_free_rows == CONFIG.max_rows
            return outputs
        for output in engine.step():
            assert output.error is None, output.error
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine does not come to an end")


def ids(outputs: Outputs) -> dict[str, list[int | None]]:
    return {name: [o.token_id for o in own] for name, own in outputs.items()}


def tolerance(model: Model) -> float:
    """Return how far log-probabilities of the two runners may differ: they round elsewhere."""
    return 6e-2 if model.config.dtype == "bf16" else 3e-2


def test_greedy_answers_equal_those_of_the_plain_runner(
    model: Model, library: StateLibrary
) -> None:
    requests = [
        ask(library, f"{mixture} {i}", mixture, logprobs=True, top_logprobs=3)
        for mixture in MIXTURES
        for i in range(3)
    ]
    got = run(make_engine(model, library), requests, every=2)
    expected = run(make_engine(model, library, on_host=True), requests, every=2)
    pairs = [
        (one, other) for name in got for one, other in zip(got[name], expected[name], strict=True)
    ]
    for name in got:
        one, other = got[name][0], expected[name][0]
        assert one.logprob == pytest.approx(other.logprob, abs=tolerance(model))
    # Two tokens that are equally likely but for rounding decide otherwise now and then, and from
    # there on texts differ.
    same = sum(one.token_id == other.token_id for one, other in pairs)
    assert same >= 0.85 * len(pairs), f"{same} of {len(pairs)}"


def test_every_rule_and_gate_answers_as_the_plain_runner(
    model: Model, library: StateLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = ("linear", "geometric", "product", "power:-1", "power:0.001", "delta", "route")
    gates = ("fixed", "novelty:0.2,2", "confidence:0.5", "posterior-novelty", "learned")
    generator = torch.Generator().manual_seed(3)
    parts = (torch.randn(*size, generator=generator) * 0.3 for size in ((16, 10), (16,), (16,)))
    learned = Learned("check", GatingLayer(*parts), GateMetadata.__new__(GateMetadata))
    requests = []
    for rule, gate in itertools.product(rules, gates):
        # What a learned gate needs is there for novelty too.
        is_learned = gate == "learned"
        name = f"knowledge+tone~{rule}~{'novelty' if is_learned else gate}"
        one = ask(library, f"{rule} {gate}", name, max_tokens=6, logprobs=True)
        if is_learned:
            mixed = replace(
                one.mixture, gate=Method("learned", (("file", "check"),)), trained_gate=learned
            )
            one = replace(one, mixture=mixed)
        requests.append(one)
    requests.append(ask(library, "contrast", "knowledge+tone:-0.5~contrast", max_tokens=6))
    expected = run(make_engine(model, library, on_host=True), requests)

    def not_here(*args: object) -> None:
        raise AssertionError("torch's tail was asked")

    monkeypatch.setattr(device_runner, "run_step", not_here)
    got = run(make_engine(model, library), requests)
    for name, outputs in got.items():
        if expected[name][0].logprob is not None:
            logprob = expected[name][0].logprob
            # Their sums of log-probabilities are no averages: what three rows round adds up.
            times = 3 if name.startswith(("delta", "product")) else 1
            allowed = times * tolerance(model)
            assert outputs[0].logprob == pytest.approx(logprob, abs=allowed), name
    same = sum(ids(got)[name] == ids(expected)[name] for name in got)
    assert same >= 0.85 * len(requests), f"{same} of {len(requests)}"


def test_sampled_answers_equal_those_of_the_plain_runner(
    model: Model, library: StateLibrary
) -> None:
    kinds: list[dict[str, object]] = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2},
        {"temperature": 1.0, "min_p": 0.05, "frequency_penalty": 0.4, "logit_bias": {7: 2.0}},
        {"temperature": 1.1, "top_p": 0.8, "sampling_order": "rwkv", "presence_penalty": 0.3},
    ]
    requests = [
        ask(library, f"{mixture} {i}", mixture, seed=i, max_tokens=8, **kind)
        for mixture in MIXTURES
        for i, kind in enumerate(kinds)
    ]
    got = ids(run(make_engine(model, library), requests, every=3))
    expected = ids(run(make_engine(model, library, on_host=True), requests, every=3))
    same = sum(got[name] == expected[name] for name in got)
    assert same >= 0.85 * len(requests), f"{same} of {len(requests)}"


def test_same_bucket_same_ids_whatever_shares_the_batch(
    model: Model, library: StateLibrary
) -> None:
    wanted = ask(library, "wanted", "knowledge+tone", temperature=1.0, top_p=0.9, seed=5)

    def with_neighbours(seed: int) -> list[int | None]:
        others = [
            ask(library, f"{seed} {i}", "knowledge+tone", temperature=1.0, seed=seed)
            for i in range(3)
        ]
        engine = make_engine(model, library)
        for request in [wanted, *others]:
            engine.add(request)
        return ids(run(engine, []))["wanted"]

    assert with_neighbours(1) == with_neighbours(2)


def test_a_long_prompt_is_read_beside_decoding_rows(model: Model, library: StateLibrary) -> None:
    short = [ask(library, f"s{i}", "knowledge+tone", max_tokens=60) for i in range(4)]
    long = ask(library, "long", "knowledge", prompt_len=1500, max_tokens=8)
    alone = ids(run(make_engine(model, library), [long]))
    outputs = ids(run(make_engine(model, library), [*short, long]))
    assert len(outputs["long"]) == 8
    assert all(len(outputs[request.id]) == 60 for request in short)
    assert outputs["long"][0] == alone["long"][0]


def test_answers_that_begin_beside_others_are_those_that_begin_alone(
    model: Model, library: StateLibrary
) -> None:
    """More answers than rows are picked from: five share the rows that read their prompt."""
    five = replace(ask(library, "five", "knowledge", max_tokens=3), n=5)
    alone = ids(run(make_engine(model, library), [five]))["five"]
    short = ask(library, "runs", "base", max_tokens=40)
    beside = ids(run(make_engine(model, library), [short, five], every=3))["five"]
    assert len(alone) == len(beside) == 15
    assert beside[:5] == alone[:5] == [alone[0]] * 5
