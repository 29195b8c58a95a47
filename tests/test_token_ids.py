"""What is no token id is refused by name, by every way into the engine."""

import asyncio
import math

import pytest
from tiny_model import write_model_folder

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import EmbedRequest, GenerateRequest
from mrss_provider.config import EngineConfig
from mrss_provider.errors import InvalidRequestError
from mrss_provider.sampling_params import SamplingParams

NO_IDS = {
    "a float": 1.0,
    "NaN": math.nan,
    "True": True,
    "False": False,
    "nothing": None,
    "text": "1",
    "negative": -1,
    "outside the vocabulary": 2**20,
    "more than int32 holds": 2**31,
    "more digits than Python writes": 10**5000,
}
ONE_TOKEN = SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model = write_model_folder(folder / "model")
    engine = AsyncEngine(
        EngineConfig(model=model, states=folder, device="cpu", dtype="fp32", threads=1, max_rows=2)
    )
    yield engine
    asyncio.run(engine.aclose())


WAYS = {
    "open": (lambda e, ids: e.open(GenerateRequest("base", ONE_TOKEN, prompt=ids)), "prompt"),
    "tokenize": (
        lambda e, ids: e.tokenize(GenerateRequest("base", ONE_TOKEN, prompt=ids)),
        "prompt",
    ),
    "detokenize": (lambda e, ids: e.detokenize(ids), "tokens"),
    "embed": (lambda e, ids: e.embed(EmbedRequest("base", (ids,))), "input"),
}


@pytest.mark.parametrize("bad", NO_IDS.values(), ids=NO_IDS)
@pytest.mark.parametrize(("way", "param"), WAYS.values(), ids=WAYS)
def test_what_is_no_token_id_is_refused_by_name(engine, way, param, bad):
    with pytest.raises(InvalidRequestError, match=r"token ids in \[0, \d+\), got ") as caught:
        asyncio.run(way(engine, (2, 3, bad)))
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", [5, 1.5, b"ab", {1, 2}])
def test_what_is_neither_text_nor_ids_is_no_prompt_and_no_input(prompt):
    with pytest.raises(InvalidRequestError, match="text or a tuple of token ids, got ") as caught:
        GenerateRequest("base", ONE_TOKEN, prompt=prompt)
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequestError, match="text or a tuple of token ids, got ") as caught:
        EmbedRequest("base", ("x", prompt))
    assert caught.value.param == "input[1]"


@pytest.mark.parametrize("key", ["n", "best_of"])
@pytest.mark.parametrize("count", [0, -1, 2.0, True, "2"])
def test_a_number_of_answers_is_an_integer_above_zero(key, count):
    with pytest.raises(InvalidRequestError, match=f"{key} must be an integer above 0") as caught:
        GenerateRequest("base", ONE_TOKEN, prompt="x", **{key: count})
    assert caught.value.param == key
