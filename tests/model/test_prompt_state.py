"""A state that was made of a text goes on where the text ends."""

import pytest
import tiny_model
import torch

from mrss_provider.errors import InvalidRequestError
from mrss_provider.model import StateMetadata, load_model, load_tuned_state, save_tuned_state
from mrss_provider.model.prompt_state import state_from_prompt

TEXT = [5 + (7 * i) % 280 for i in range(700)]
REST = [9, 8, 7, 6, 5]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(7, id="rwkv7"),
        pytest.param(6, id="rwkv6", marks=pytest.mark.slow),
    ],
)
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    return load_model(
        tiny_model.write_checkpoint(path, request.param), device="cpu", dtype="fp32", threads=1
    )


def hidden_after(model, state, tokens):
    pool = model.new_pool(1)
    pool.write(0, state)
    ids = torch.tensor(tokens)
    return model.prefill(ids, [0, len(ids)], torch.tensor([0]), pool)


@pytest.mark.parametrize("begun", [False, True], ids=["base", "state"])
def test_the_file_goes_on_as_the_text_would(model, begun, tmp_path):
    start = None
    if begun:
        path = tiny_model.write_state(tmp_path / "start.pth", seed=3, offset=True)
        start = load_tuned_state(path, model.config, name="start")
    made = state_from_prompt(
        model, TEXT, name="long", start=start, metadata=StateMetadata(group="knowledge")
    )
    save_tuned_state(tmp_path / "long.safetensors", made, model.config)
    read = load_tuned_state(tmp_path / "long.safetensors", model.config, name="long", strict=True)
    expected = hidden_after(model, start, TEXT + REST)
    got = hidden_after(model, read, REST)
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    assert read.sha256 == made.sha256
    assert read.metadata.group == "knowledge"
    told = read.metadata.training["from_prompt"]
    assert told["num_tokens"] == 700
    assert (told["start"] or {}).get("name") == (start and start.name)
    assert read.metadata.base_sha256 == model.config.fingerprint


def test_a_leading_token_of_the_start_is_read_once(model, tmp_path):
    path = tiny_model.write_state(tmp_path / "start.pth", seed=3)
    start = load_tuned_state(path, model.config, name="start")
    with_bos = type(start)(start.name, start.wkv, metadata=StateMetadata(bos=True))
    made = state_from_prompt(model, TEXT, name="long", start=with_bos)
    assert not made.metadata.bos
    expected = hidden_after(model, start, [0, *TEXT, *REST])
    got = hidden_after(model, made, REST)
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("tokens", [[], [-1], [320]])
def test_what_is_no_text_is_refused(model, tokens):
    with pytest.raises(InvalidRequestError, match="token id"):
        state_from_prompt(model, tokens, name="long")
