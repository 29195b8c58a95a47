"""SamplingParams: what is allowed, and that the error names the field and the range."""

import math

import pytest

from mrss_provider.errors import InvalidRequestError
from mrss_provider.sampling_params import MAX_STOP_CHARS, MAX_STOPS, SamplingParams


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0},
        {"temperature": 100.0},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": 0},
        {"min_p": 1.0},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 10},
        {"penalty_decay": 1e-3},
        {"logit_bias": {0: -100, 65535: 100}},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"max_tokens": 1},
        {"stop": ("a",) * MAX_STOPS},
        {"stop": ("é" * MAX_STOP_CHARS,)},
        {"sampling_order": "rwkv"},
        {"logprobs": True, "top_logprobs": 20},
    ],
)
def test_allowed(values: dict[str, object]) -> None:
    params = SamplingParams(**values)  # type: ignore[arg-type]
    for name, value in values.items():
        assert getattr(params, name) == value


def test_top_k_of_minus_one_is_off() -> None:
    assert SamplingParams(top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.1, r"temperature must be in \[0, 100\], got -0.1"),
        ("temperature", math.nan, r"temperature must be in \[0, 100\], got nan"),
        ("temperature", math.inf, r"got inf"),
        ("temperature", "1", r"got '1'"),
        ("temperature", True, r"got True"),
        ("temperature", 10**400, r"must be in \[0, 100\], got 1000"),
        ("top_p", 0, r"top_p must be in \(0, 1\], got 0"),
        ("top_p", 1.7, r"top_p must be in \(0, 1\], got 1.7"),
        ("top_k", -2, r"top_k must be an integer in \[-1, 2147483647\], got -2"),
        ("top_k", 1.5, r"got 1.5"),
        ("top_k", None, r"got None"),
        ("min_p", 1.01, r"min_p must be in \[0, 1\]"),
        ("presence_penalty", 2.1, r"presence_penalty must be in \[-2, 2\]"),
        ("frequency_penalty", -2.1, r"frequency_penalty must be in \[-2, 2\]"),
        ("repetition_penalty", 0, r"repetition_penalty must be in \(0, 10\]"),
        ("penalty_decay", 0, r"penalty_decay must be in \(0, 1\]"),
        ("logit_bias", {-1: 1.0}, r"logit_bias keys are token ids, got -1"),
        ("logit_bias", {"5": 1.0}, r"logit_bias keys are token ids, got '5'"),
        ("logit_bias", {1.0: 1.0}, r"logit_bias keys are token ids, got 1.0"),
        ("logit_bias", {True: 1.0}, r"logit_bias keys are token ids, got True"),
        ("logit_bias", {10**5000: 1.0}, r"got an integer of thousands of digits"),
        ("logit_bias", [5], r"logit_bias must be a mapping: token id -> bias, got \[5\]"),
        ("logit_bias", {5: 101}, r"logit_bias\[5\] must be in \[-100, 100\], got 101"),
        ("seed", 2**64, r"seed must be an integer in"),
        ("seed", 1.0, r"seed must be an integer in"),
        pytest.param("seed", 10**5000, r"got an integer of thousands of digits", id="seed-long"),
        ("max_tokens", -1, r"max_tokens must be an integer in \[0, 2147483647\], got -1"),
        ("stop", ("",), r"a stop string has 1 to 256 characters, got ''"),
        ("stop", "ab", r"stop must be a tuple of strings, got 'ab'"),
        ("stop", ("x" * 257,), r"a stop string has 1 to 256 characters"),
        ("stop", ("a",) * 17, r"stop takes at most 16 strings, got 17"),
        ("ignore_eos", 1, r"ignore_eos must be true or false, got 1"),
        ("sampling_order", "hf", r"sampling_order must be 'openai' or 'rwkv', got 'hf'"),
        ("logprobs", None, r"logprobs must be true or false, got None"),
        ("top_logprobs", 21, r"top_logprobs must be an integer in \[0, 20\], got 21"),
    ],
)
def test_refused_with_field_range_and_value(name: str, value: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_top_logprobs_needs_logprobs() -> None:
    with pytest.raises(InvalidRequestError, match="top_logprobs needs logprobs"):
        SamplingParams(top_logprobs=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, False),
        ({"penalty_decay": 0.9}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
    ],
)
def test_has_penalties(values: dict[str, float], expected: bool) -> None:
    assert SamplingParams(**values).has_penalties is expected  # type: ignore[arg-type]
