"""Tuned states: every file form, what is refused, averages, orientation."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from reading import prefill, relative_rms
from reference_f64 import Reference
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_model import TINY, Shape, checkpoint, tuned_state, write_state

from mrss_provider.errors import InvalidRequestError, StateFileError
from mrss_provider.model import (
    StateMetadata,
    TunedState,
    average_states,
    load_tuned_state,
    save_tuned_state,
)

L, H, N, C = TINY.num_layers, TINY.num_heads, TINY.head_size, TINY.hidden_size
METADATA = StateMetadata(
    group="tone",
    loss_on="answer",
    local=True,
    bos=True,
    licence="CC-BY-4.0",
    training={"steps": 100, "lr": 1.0},
    display_name="Pirate speak",
)


def in_file(tensors):
    """The states of a file's tensors, [L, H, V, K]."""
    return torch.stack([tensors[f"blocks.{i}.att.time_state"] for i in range(L)])


def in_model(wkv_vk, model):
    return wkv_vk if model.config.version == 7 else wkv_vk.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_peft_pth_is_read_as_vk(model, tmp_path, dtype):
    tensors = tuned_state(dtype=dtype, offset=True)
    torch.save(tensors, tmp_path / "a.pth")
    state = load_tuned_state(tmp_path / "a.pth", model.config, name="a")
    assert torch.equal(state.wkv, in_model(in_file(tensors).float(), model))
    assert torch.equal(state.time_offset[1], tensors["blocks.1.att.time_offset"].float())
    assert (state.shift_att, state.shift_ffn) == (None, None)
    assert state.metadata == StateMetadata(orientation="vk")
    assert state.name == "a"


def test_a_tuned_row_follows_the_fp64_reference(model, tmp_path, token_ids):
    path = write_state(tmp_path / "a.pth", offset=True)
    state = load_tuned_state(path, model.config, name="a")
    weights = checkpoint(model.config.version)
    reference = Reference(weights, in_model(in_file(torch.load(path)), model), state.time_offset)
    pool = model.new_pool(2)
    pool.write(1, state)
    ids = token_ids[:12]
    assert relative_rms(prefill(model, pool, [ids], [1]), reference.read(ids)) < 1e-5


def test_an_st_file_is_read_as_its_transpose(model, tmp_path):
    tensors = {n: t.half().mT.contiguous() for n, t in tuned_state().items()}
    save_file(tensors, tmp_path / "a.st")
    state = load_tuned_state(tmp_path / "a.st", model.config, name="a")
    assert torch.equal(state.wkv, in_model(in_file(tuned_state(dtype=torch.float16)), model))
    assert state.metadata.orientation == "kv"


@pytest.mark.parametrize("suffix", [".pth", ".st", ".safetensors"])
@pytest.mark.parametrize("orientation", ["vk", "kv"])
def test_an_orientation_overrides_the_files(model, tmp_path, suffix, orientation):
    tensors = tuned_state()
    path = tmp_path / f"a{suffix}"
    torch.save(tensors, path) if suffix == ".pth" else save_file(tensors, path)
    state = load_tuned_state(path, model.config, name="a", orientation=orientation)
    wkv = in_file(tensors) if orientation == "vk" else in_file(tensors).mT
    assert torch.equal(state.wkv, in_model(wkv, model))


def test_our_form_comes_back_as_it_was(model, tmp_path):
    state = TunedState(
        "a",
        torch.randn(L, H, N, N),
        torch.randn(L, C),
        torch.randn(L, C),
        torch.randn(L, C),
        METADATA,
    )
    path = tmp_path / "a.safetensors"
    save_tuned_state(path, state, model.config)
    back = load_tuned_state(path, model.config, name="b")
    assert back.sha256 == state.sha256
    for part in ("wkv", "time_offset", "shift_att", "shift_ffn"):
        assert torch.equal(getattr(back, part), getattr(state, part))
    shape = model.config.shape_text()
    assert back.metadata == replace(METADATA, orientation="vk", base_shape=shape)
    with safe_open(path, "pt") as file:
        wkv = torch.stack([file.get_tensor(f"blocks.{i}.att.time_state") for i in range(L)])
        assert file.metadata()["format"] == "mrss-state"
    assert torch.equal(in_model(wkv, model), state.wkv)


def test_a_saved_pth_is_what_peft_writes(model, tmp_path):
    path = write_state(tmp_path / "a.pth", offset=True)
    state = load_tuned_state(path, model.config, name="a")
    save_tuned_state(tmp_path / "b.pth", state, model.config)
    saved, wanted = torch.load(tmp_path / "b.pth"), torch.load(path)
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_saved_file_is_as_readable_as_any_other(model, tmp_path, suffix):
    path, other = tmp_path / f"a{suffix}", tmp_path / "other"
    save_tuned_state(path, TunedState("a", torch.zeros(L, H, N, N)), model.config)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_a_file_in_the_way_survives_a_save_that_fails(model, tmp_path):
    state = TunedState("a", torch.randn(L, H, N, N))
    with pytest.raises(StateFileError, match=r"cannot be written: No such file or directory$"):
        save_tuned_state(tmp_path / "none" / "a.safetensors", state, model.config)
    (tmp_path / "a.pth").write_bytes(b"old")
    with_shift = replace(state, shift_att=torch.zeros(L, C))
    with pytest.raises(StateFileError, match=r"a has shift states, which a .pth cannot hold"):
        save_tuned_state(tmp_path / "a.pth", with_shift, model.config)
    with pytest.raises(StateFileError, match=r"is saved as .safetensors or .pth, got 'a.bin'"):
        save_tuned_state(tmp_path / "a.bin", state, model.config)
    wrong = TunedState("w", torch.randn(L, H, N, 32))
    with pytest.raises(StateFileError, match=re.escape(f"needs {[L, H, N, N]}")):
        save_tuned_state(tmp_path / "a.pth", wrong, model.config)
    assert (tmp_path / "a.pth").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_equal_content_has_one_hash_whatever_the_file(model, tmp_path):
    write_state(tmp_path / "a.pth")
    state = load_tuned_state(tmp_path / "a.pth", model.config, name="a")
    tensors = {n: t.mT.contiguous() for n, t in tuned_state().items()}
    save_file(tensors, tmp_path / "b.st")
    assert load_tuned_state(tmp_path / "b.st", model.config, name="b").sha256 == state.sha256
    others = [
        load_tuned_state(tmp_path / "a.pth", model.config, name="a", orientation="kv"),
        replace(state, wkv=state.wkv + 1e-6),
        replace(state, time_offset=torch.zeros(L, C)),
        replace(state, shift_att=torch.zeros(L, C)),
        replace(state, shift_ffn=torch.zeros(L, C)),
    ]
    assert len({state.sha256, *(other.sha256 for other in others)}) == 6


def test_norms_are_of_each_layers_state(model):
    wkv = torch.zeros(L, H, N, N)
    wkv[1, 0, 0, :2] = torch.tensor([3.0, 4.0])
    assert TunedState("a", wkv).layer_norms == (0.0, 5.0)


def test_other_base_weights_warn_and_strict_refuses(model, tmp_path, caplog):
    metadata = StateMetadata(base_name="elsewhere", base_sha256="ab" * 32)
    path = tmp_path / "a.safetensors"
    save_tuned_state(
        path, TunedState("a", torch.zeros(L, H, N, N), metadata=metadata), model.config
    )
    with caplog.at_level(logging.WARNING):
        load_tuned_state(path, model.config, name="a")
    assert "a.safetensors was tuned on other weights (elsewhere)" in caplog.text
    with pytest.raises(StateFileError, match=r"tuned on other weights .* which strict refuses"):
        load_tuned_state(path, model.config, name="a", strict=True)


def test_the_right_base_weights_pass_strict_without_a_word(model, tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    metadata = METADATA.with_base(model.config)
    state = TunedState("a", torch.zeros(L, H, N, N), metadata=metadata)
    save_tuned_state(path, state, model.config)
    back = load_tuned_state(path, model.config, name="a", strict=True)
    assert back.metadata == replace(metadata, orientation="vk")
    assert not caplog.records


def test_a_file_that_names_no_base_is_saved_without_one(model, tmp_path):
    path = tmp_path / "a.safetensors"
    states = [random_state(1), random_state(2)]
    save_tuned_state(path, average_states(states, [1, 1], name="a"), model.config)
    metadata = load_tuned_state(path, model.config, name="a").metadata
    assert (metadata.base_name, metadata.base_sha256) == (None, None)


def test_a_state_for_the_other_version_is_refused(model, tmp_path):
    other = replace(model.config, version=13 - model.config.version)
    path = tmp_path / "a.safetensors"
    save_tuned_state(path, TunedState("a", torch.zeros(L, H, N, N)), other)
    message = rf"is for RWKV-{other.version}, .*; the loaded model is RWKV-{model.config.version},"
    with pytest.raises(StateFileError, match=message):
        load_tuned_state(path, model.config, name="a")


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


BAD_STATES = [
    (
        tuned_state(Shape(4, 128, 320, 64)),
        r"for 4 layers of shape \[2, 64, 64\]; the loaded model \(RWKV-\d, 2 layers x 2 heads of "
        r"64\) needs 2 of \[2, 64, 64\]",
    ),
    (
        tuned_state(Shape(2, 256, 320, 64)),
        r"for 2 layers of shape \[4, 64, 64\]; .* needs 2 of \[2, 64, 64\]",
    ),
    (without(tuned_state(), "blocks.1.att.time_state"), "time_state for 1 layers of shape"),
    (
        without(tuned_state(offset=True), "blocks.0.att.time_offset"),
        r"time_offset for 1 layers of shape \[128\]; .* needs 2 of \[128\]",
    ),
    (
        tuned_state() | {"blocks.1.att.time_state": torch.full((2, 64, 64), torch.nan)},
        "wkv holds NaN or infinite values",
    ),
    (
        tuned_state(offset=True) | {"blocks.1.att.time_offset": torch.full((128,), torch.inf)},
        "time_offset holds NaN or infinite values",
    ),
    (tuned_state() | {"shift_att": torch.zeros(3, 128)}, r"shift_att has shape \[3, 128\]"),
    (tuned_state() | {"blocks.0.att.key.lora_A": torch.zeros(3)}, "it holds blocks.0.att.key.lora"),
    ({"shift_att": torch.zeros(2, 128)}, "holds no blocks.0.att.time_state, so it is no state"),
    (
        {n: torch.nn.Parameter(t).to_sparse() for n, t in tuned_state().items()},
        "holds no plain values under 'blocks.0.att.time_state'",
    ),
    *[
        (tuned_state(dtype=dtype), rf"blocks.0.att.time_state has dtype {dtype}; needed are fp32")
        for dtype in (torch.bool, torch.int64, torch.complex64)
    ],
    (
        tuned_state() | {"shift_ffn": torch.full((2, 128), 1e300, dtype=torch.float64)},
        "shift_ffn holds NaN or infinite values",
    ),
    ({}, "holds no blocks.0.att.time_state, so it is no state"),
    (checkpoint(7) | tuned_state(), "is a model, not a tuned state"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD_STATES)
def test_what_is_no_state_for_this_model_is_refused(model, tmp_path, tensors, message):
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(StateFileError, match=message) as caught:
        load_tuned_state(tmp_path / "a.pth", model.config, name="a")
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith("a.pth")


def test_parameters_of_a_training_are_read_as_their_values(model, tmp_path):
    tensors = tuned_state()
    torch.save({n: torch.nn.Parameter(t) for n, t in tensors.items()}, tmp_path / "a.pth")
    state = load_tuned_state(tmp_path / "a.pth", model.config, name="a")
    assert torch.equal(state.wkv, in_model(in_file(tensors), model))
    assert not state.wkv.requires_grad


def test_damaged_missing_and_misread_files_are_refused(model, tmp_path):
    def load(name, **options):
        return load_tuned_state(tmp_path / name, model.config, name="a", **options)

    write_state(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-100])
    with pytest.raises(StateFileError, match="is truncated"):
        load("b.pth")
    with pytest.raises(StateFileError, match="does not exist or is no file"):
        load("none.pth")
    with pytest.raises(StateFileError, match="orientation must be vk or kv, got 'xy'"):
        load("a.pth", orientation="xy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, r"has version '2' of the state format; this program reads '1'"),
        ({"orientation": "up"}, r"orientation in its metadata must be one of vk, kv, got 'up'"),
        ({"loss_on": "some"}, r"loss_on in its metadata must be one of all, answer"),
        ({"bos": "yes"}, r"bos in its metadata must be one of true, false, got 'yes'"),
        ({"training": "{"}, r"training in its metadata is not JSON"),
        ({"base_model": "[1]"}, r"base_model in its metadata must be a JSON object"),
    ],
)
def test_bad_metadata_is_refused(model, tmp_path, change, message):
    metadata = METADATA.to_strings(model.config) | change
    save_file(tuned_state(), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(StateFileError, match=message):
        load_tuned_state(tmp_path / "a.safetensors", model.config, name="a")


def test_metadata_of_another_program_is_left_alone(model, tmp_path):
    save_file(tuned_state(), tmp_path / "a.safetensors", metadata={"format": "pt", "bos": "?"})
    state = load_tuned_state(tmp_path / "a.safetensors", model.config, name="a")
    assert state.metadata == StateMetadata(orientation="vk")


def random_state(seed, **parts):
    generator = torch.Generator().manual_seed(seed)
    return TunedState(f"s{seed}", torch.randn(L, H, N, N, generator=generator), **parts)


def test_an_average_is_the_weighted_mean_whatever_the_scale():
    a, b = random_state(1), random_state(2)
    for weights in ([1, 3], [0.25, 0.75], [10, 30], [5e307, 1.5e308]):
        mean = average_states([a, b], weights, name="mean")
        assert torch.allclose(mean.wkv, 0.25 * a.wkv + 0.75 * b.wkv, atol=1e-6)
    assert mean.name == "mean"
    assert mean.metadata.training["average_of"] == [
        {"name": "s1", "sha256": a.sha256, "share": 0.25},
        {"name": "s2", "sha256": b.sha256, "share": 0.75},
    ]
    assert torch.equal(average_states([a], [0.3], name="a").wkv, a.wkv)


def test_an_average_counts_a_lacking_offset_as_zeros():
    a, b = random_state(1, time_offset=torch.ones(L, C)), random_state(2)
    mean = average_states([a, b], [1, 1], name="mean")
    assert torch.equal(mean.time_offset, torch.full((L, C), 0.5))
    assert mean.shift_att is None


@pytest.mark.parametrize(
    ("states", "weights", "message"),
    [
        ([], [], "needs one weight a state, got 0 states"),
        ([random_state(1)], [1, 2], "needs one weight a state, got 1 states, 2 weights"),
        ([random_state(1)], [-1], "a weight must be finite and >= 0, got -1"),
        ([random_state(1)], [0], "at least one weight above 0"),
        (
            [random_state(1), TunedState("b", torch.zeros(1, H, N, N))],
            [1, 1],
            "states of different shapes cannot be averaged",
        ),
        (
            [
                random_state(1, metadata=StateMetadata(base_sha256="a")),
                random_state(2, metadata=StateMetadata(base_sha256="b")),
            ],
            [1, 1],
            "states tuned on different base weights cannot be averaged",
        ),
    ],
)
def test_averages_that_make_no_sense_are_refused(states, weights, message):
    with pytest.raises(InvalidRequestError, match=message):
        average_states(states, weights, name="mean")
