"""The engine on real decoding: tiny seeded RWKV-7 and RWKV-6, and the identities of mixtures."""

import math
import shutil
from dataclasses import dataclass

import pytest
import tiny_model
import torch

from mrss_provider.backend import MixtureOptions
from mrss_provider.config import EngineConfig
from mrss_provider.engine import model_runner
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.philox import uniform
from mrss_provider.engine.request import EngineRequest, TokenOutput
from mrss_provider.engine.sampler import sample
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.mixture import MERGES
from mrss_provider.model import Model, TunedState, load_model
from mrss_provider.sampling_params import SamplingParams

PROMPT = tuple(range(5, 60, 2))
ALLOWED = range(300)

GATES_TO_TRY = (
    "fixed",
    "confidence:0.5",
    "schedule:a=0.25@0,1@12",
    "posterior",
    "posterior-novelty",
)
# Every rule under the default gate, and every other gate under rules of both kinds by turns.
METHODS = [
    *(f"{merge}~novelty" for merge in MERGES),
    *(f"{('linear', 'delta')[i % 2]}~{gate}" for i, gate in enumerate(GATES_TO_TRY)),
]


@dataclass(frozen=True)
class Loaded:
    model: Model
    library: StateLibrary

    def engine(self, **config: int) -> Engine:
        values = {"max_rows": 24, "prefill_chunk_len": 16} | config
        config_ = EngineConfig(**values)  # type: ignore[arg-type]
        return Engine(self.model, self.library, config_, allowed_ids=ALLOWED)

    def request(
        self,
        name: str,
        options: MixtureOptions | None = None,
        *,
        request_id: str = "x",
        prompt: tuple[int, ...] = PROMPT,
        n: int = 1,
        **sampling: object,
    ) -> EngineRequest:
        values = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 10, "seed": 7}
        values |= {"ignore_eos": True, "sampling_order": "openai", "logprobs": True} | sampling
        params = SamplingParams(**values)  # type: ignore[arg-type]
        return EngineRequest(request_id, prompt, self.library.resolve(name, options), params, n)

    def run(self, *requests: EngineRequest, **config: int) -> dict[str, list[TokenOutput]]:
        """Run requests to their end; the answers by id (and "/index" for n > 1)."""
        engine = self.engine(**config)
        for wanted in requests:
            engine.add(wanted)
        outputs: dict[str, list[TokenOutput]] = {}
        while engine.has_work:
            for output in engine.step():
                key = f"{output.request_id}/{output.index}"
                outputs.setdefault(key, []).append(output)
        assert engine.num_free_rows == engine.stats().num_free_rows
        return outputs

    def answer(
        self, name: str, options: MixtureOptions | None = None, **sampling: object
    ) -> list[TokenOutput]:
        return self.run(self.request(name, options, **sampling))["x/0"]  # type: ignore[arg-type]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(7, id="rwkv7"),
        pytest.param(6, id="rwkv6", marks=pytest.mark.slow),
    ],
)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("tiny")
    model = load_model(
        tiny_model.write_checkpoint(folder / "tiny.pth", request.param),
        device="cpu",
        dtype="fp32",
        threads=1,
    )
    states = folder / "states"
    states.mkdir()
    for seed, name in enumerate("abc"):
        tiny_model.write_state(states / f"{name}.pth", seed=seed)
    tiny_model.write_state(states / "offset.pth", seed=9, offset=True)
    for copy in ("a2", "a3"):
        shutil.copy(states / "a.pth", states / f"{copy}.pth")
    return Loaded(model, StateLibrary(states, model.config))


def ids(outputs: list[TokenOutput]) -> list[int]:
    assert all(output.error is None for output in outputs)
    return [output.token_id or 0 for output in outputs]


def log_probs(outputs: list[TokenOutput]) -> torch.Tensor:
    return torch.tensor([output.logprob for output in outputs])


def decode_plainly(
    model: Model, state: TunedState | None, sampling: SamplingParams, prompt: tuple[int, ...]
) -> tuple[list[int], list[float]]:
    """Decode one row with the model alone: ids, and their log-probabilities."""
    pool = model.new_pool(1)
    pool.write(0, state)
    slots = torch.tensor([0])
    hidden = model.prefill(torch.tensor(prompt), [0, len(prompt)], slots, pool)
    answer: list[int] = []
    values: list[float] = []
    for position in range(sampling.max_tokens or 0):
        logits = model.head(hidden)
        logits[:, ALLOWED.stop :] = -torch.inf
        (token,) = sample(logits, [sampling], [uniform(sampling.seed or 0, 0, position)])
        answer.append(token)
        values.append(float(logits.log_softmax(-1)[0, token]))
        hidden = model.decode(torch.tensor([token]), slots, pool)
    return answer, values


def teacher_forced(
    model: Model, state: TunedState | None, prompt: tuple[int, ...], answer: list[int]
) -> torch.Tensor:
    """Return log-probabilities [T, V] that one row gives before each token of `answer`."""
    pool = model.new_pool(1)
    pool.write(0, state)
    tokens = torch.tensor([*prompt, *answer[:-1]])
    hidden = model.prefill(tokens, [0, len(tokens)], torch.tensor([0]), pool, all_positions=True)
    logits = model.head(hidden[len(prompt) - 1 :])
    logits[:, ALLOWED.stop :] = -torch.inf
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", ["base", "a", "offset"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_state_is_plain_decoding_bit_for_bit(
    loaded: Loaded, name: str, temperature: float
) -> None:
    state = None if name == "base" else loaded.library.get(name)
    wanted = loaded.request(name, temperature=temperature)
    # One chunk, so that the very same calls are made.
    outputs = loaded.run(wanted, prefill_chunk_len=64)["x/0"]
    expected, values = decode_plainly(loaded.model, state, wanted.sampling, PROMPT)
    assert ids(outputs) == expected
    assert [output.logprob for output in outputs] == values


def test_one_hot_weights_are_that_state_bit_for_bit(loaded: Loaded) -> None:
    alone = loaded.answer("b")
    for name in ("b:3", "b+b", "a:0+b", "a:0+b:0.2+base:0~linear", "a:0+b~geometric~fixed"):
        assert loaded.answer(name) == alone
    assert loaded.answer("a+b", MixtureOptions(gating_weights=(0.0, 2.0))) == alone


@pytest.mark.parametrize("rules", METHODS)
def test_order_and_scale_of_weights_do_not_matter(loaded: Loaded, rules: str) -> None:
    first = loaded.answer(f"a:1+b:2+c:0.5~{rules}")
    assert loaded.answer(f"c:1+b:4+a:2~{rules}") == first
    weights = MixtureOptions(weights={"a": 10, "b": 20, "c": 5})
    assert loaded.answer(f"b+c+a~{rules}", weights) == first
    assert loaded.answer(f"b+c+b+a~{rules}", MixtureOptions(gating_weights=(3, 1, 1, 2))) == first


@pytest.mark.parametrize("rules", ["linear~fixed", "geometric~fixed", "linear~novelty"])
def test_copies_of_one_state_are_that_state(loaded: Loaded, rules: str) -> None:
    alone = loaded.answer("a")
    copies = loaded.answer(f"a+a2:0.7+a3:0.2~{rules}")
    assert ids(copies) == ids(alone)
    torch.testing.assert_close(log_probs(copies), log_probs(alone), atol=1e-4, rtol=1e-4)


def test_delta_of_one_full_state_and_nothing_else_is_that_state(loaded: Loaded) -> None:
    alone = loaded.answer("a")
    nearly = loaded.answer("a+b:1e-9~delta~fixed", MixtureOptions(cut=0.0))
    assert ids(nearly) == ids(alone)
    torch.testing.assert_close(log_probs(nearly), log_probs(alone), atol=1e-4, rtol=1e-4)


def test_delta_of_no_strength_is_the_base(loaded: Loaded) -> None:
    base = loaded.answer("base")
    nearly = loaded.answer("base+a:1e-9~delta~fixed", MixtureOptions(cut=0.0))
    assert ids(nearly) == ids(base)
    torch.testing.assert_close(log_probs(nearly), log_probs(base), atol=1e-4, rtol=1e-4)


def test_linear_keeps_within_its_bound_on_its_own_text(loaded: Loaded) -> None:
    """NLL_mix <= min_k (NLL_k - log w_k) for every token, and p_mix is the weighted sum."""
    outputs = loaded.answer("a+b:0.5+base:0.25~linear~fixed", max_tokens=20)
    answer = ids(outputs)
    weights = {"a": 4 / 7, "b": 2 / 7, "base": 1 / 7}
    rows = torch.stack(
        [
            teacher_forced(
                loaded.model,
                None if name == "base" else loaded.library.get(name),
                PROMPT,
                answer,
            )[range(20), answer]
            for name in weights
        ]
    )
    mixed = log_probs(outputs).double()
    log_weights = torch.tensor([math.log(w) for w in weights.values()])[:, None]
    assert (mixed - (rows + log_weights).amax(0)).min() > -2e-4
    # The canonical weights have 4 digits.
    torch.testing.assert_close(mixed, (rows + log_weights).logsumexp(0), atol=3e-4, rtol=0)


@pytest.mark.parametrize("rules", METHODS)
def test_reported_log_probs_are_of_a_distribution(loaded: Loaded, rules: str) -> None:
    outputs = loaded.answer(f"a+b+offset~{rules}", top_logprobs=20, temperature=0.5)
    for output in outputs:
        total = sum(math.exp(value) for _, value in output.top)
        assert 0 < total <= 1 + 1e-5
        assert [value for _, value in output.top] == sorted(
            (value for _, value in output.top), reverse=True
        )


@pytest.mark.parametrize(
    "rules",
    [
        *(f"{rule}~novelty" for rule in ("linear", "geometric", "power", "route")),
        "linear~fixed",
        "linear~confidence",
    ],
)
def test_a_row_with_all_of_the_weight_is_that_state(loaded: Loaded, rules: str) -> None:
    """Not by leaving rows out: the other one's weight is as small as a weight can be."""
    alone = loaded.answer("b", temperature=0.7)
    # Beside it novelty and confidence may make up for a factor of e^27 or so.
    mixed = loaded.answer(f"a:1e-30+b~{rules}", temperature=0.7)
    assert ids(mixed) == ids(alone)
    torch.testing.assert_close(log_probs(mixed), log_probs(alone), atol=1e-4, rtol=1e-4)


def test_a_product_that_sums_to_one_is_geometric(loaded: Loaded) -> None:
    """A named base makes it so."""
    product = loaded.answer("base+a+b:0.5~product~fixed")
    assert product == loaded.answer("base+a+b:0.5~geometric~fixed")


def test_a_product_of_two_equal_states_is_one_of_them_at_half_the_temperature(
    loaded: Loaded,
) -> None:
    alone = loaded.answer("a", temperature=0.5)
    assert ids(loaded.answer("a+a2~product~fixed", temperature=1.0)) == ids(alone)


def test_power_meets_linear_and_geometric(loaded: Loaded) -> None:
    for exponent, limit in ((1, "linear"), (0, "geometric")):
        power = loaded.answer(f"a+b:0.5~power:{exponent}~fixed")
        expected = loaded.answer(f"a+b:0.5~{limit}~fixed")
        assert ids(power) == ids(expected)
        torch.testing.assert_close(log_probs(power), log_probs(expected), atol=1e-4, rtol=1e-4)


def test_contrast_with_nothing_against_is_delta(loaded: Loaded) -> None:
    assert loaded.answer("a+b:0.5~contrast") == loaded.answer("a+b:0.5~delta")
    # With a base, strengths stay as they are.
    away = loaded.answer("base+a:-0.5~contrast~fixed", MixtureOptions(cut=0.0), max_tokens=20)
    base, state = (
        teacher_forced(loaded.model, state, PROMPT, ids(away))[:, ALLOWED]
        for state in (None, loaded.library.get("a"))
    )
    expected = (1.5 * base - 0.5 * state).log_softmax(-1)[range(20), ids(away)]
    torch.testing.assert_close(log_probs(away).double(), expected, atol=3e-4, rtol=0)


def test_a_gate_that_cannot_tell_leaves_the_named_weights(loaded: Loaded) -> None:
    fixed = loaded.answer("a+b:0.5~linear~fixed")
    for gate in ("schedule:a=2@0,2@50+b=2@3", "confidence:1000", "novelty:1000"):
        like = loaded.answer(f"a+b:0.5~linear~{gate}")
        assert ids(like) == ids(fixed)
        torch.testing.assert_close(log_probs(like), log_probs(fixed), atol=0.02, rtol=0.02)


def test_neighbours_with_other_parameters_do_not_change_an_answer(loaded: Loaded) -> None:
    wanted = [
        loaded.request(f"a+b+c:0.5~{rules}", request_id=str(i), seed=i)
        for i, rules in enumerate((*METHODS, "power:2~novelty:0.1", "contrast~novelty:1,2"))
    ]
    together = loaded.run(*wanted, max_rows=128)
    for one in wanted:
        alone = loaded.run(one)[f"{one.id}/0"]
        assert ids(together[f"{one.id}/0"]) == ids(alone)


MIXED_BAG = [
    ("base", {}),
    ("a", {"temperature": 0.0}),
    ("offset", {"top_p": 0.8}),
    ("a+b", {}),
    ("a+b+c", {"top_p": 0.9, "frequency_penalty": 0.5}),
    ("a+c~linear~fixed", {"top_k": 20}),
    ("base+b+offset~geometric", {"repetition_penalty": 1.3}),
    ("b+offset~linear", {"n": 2}),
    ("a", {"prompt": (9,)}),
    ("a+b", {"prompt": tuple(range(1, 120))}),
]


def test_requests_in_a_batch_equal_requests_one_by_one(loaded: Loaded) -> None:
    requests = [
        loaded.request(name, request_id=str(i), seed=i, **values)  # type: ignore[arg-type]
        for i, (name, values) in enumerate(MIXED_BAG)
    ]
    together = loaded.run(*requests, max_rows=64)
    crowded = loaded.run(*requests, max_rows=10)
    alone: dict[str, list[TokenOutput]] = {}
    for wanted in requests:
        alone |= loaded.run(wanted)
    for key, outputs in alone.items():
        for other in (together[key], crowded[key]):
            assert ids(other) == ids(outputs)
            torch.testing.assert_close(log_probs(other), log_probs(outputs), atol=1e-4, rtol=1e-4)
    assert together.keys() == alone.keys()
    assert ids(together["7/0"]) != ids(together["7/1"])


@pytest.mark.parametrize("chunk_len", [1, 7, 32, 1000])
def test_the_length_of_chunks_does_not_change_the_answer(loaded: Loaded, chunk_len: int) -> None:
    wanted = loaded.request("a+offset", prompt=tuple(range(1, 100)))
    expected = loaded.run(wanted)["x/0"]
    outputs = loaded.run(wanted, prefill_chunk_len=chunk_len)["x/0"]
    assert ids(outputs) == ids(expected)
    torch.testing.assert_close(log_probs(outputs), log_probs(expected), atol=2e-4, rtol=1e-4)


def test_slots_that_were_used_serve_the_next_request_unchanged(loaded: Loaded) -> None:
    """A state with an offset leaves none of it behind."""
    engine = loaded.engine(max_rows=3)
    fresh = loaded.answer("a+b")
    answers = {}
    for i, name in enumerate(("offset", "offset+a", "a+b", "base")):
        engine.add(loaded.request(name, request_id=str(i)))
        while engine.has_work:
            for output in engine.step():
                answers.setdefault(name, []).append(output)
    assert ids(answers["a+b"]) == ids(fresh)
    assert ids(answers["base"]) == ids(loaded.answer("base"))


def test_cutting_a_prefill_to_bound_its_memory_changes_nothing(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sequences in one call of the model, or one a call: same tokens, same numbers."""
    requests = [
        loaded.request(name, request_id=name, prompt=PROMPT[: 9 + i])
        for i, name in enumerate(("a+b", "c", "base", "a+b+c"))
    ]
    whole = loaded.run(*requests)
    monkeypatch.setattr(model_runner, "_CPU_PREFILL_LEN", 1)
    assert loaded.run(*requests) == whole
