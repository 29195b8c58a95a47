"""Layers' weights one below the other are the same weights, held once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import Shape, checkpoint

from mrss_provider.errors import ConfigError
from mrss_provider.model import load_model
from mrss_provider.model.rwkv7_cuda import FusedDecoder, PackedLayer, pack_layer
from mrss_provider.model.stacked7 import ranks_of_up, stack_layers, stacking_obstacle

SHAPE = Shape(num_layers=4, hidden_size=128, ffn_size=512, ranks=(16, 80, 8, 24))
DOWNS = ("w1", "a1", "g1")


def packed_model(path: Path) -> tuple[list[PackedLayer], list[object], list[object]]:
    """Return a model's packed layers, its layers, and those of an equal model left alone."""
    save_file(checkpoint(7, SHAPE), path)
    own, other = (load_model(path, device="cpu", dtype="fp32", packed=False) for _ in range(2))
    layers = list(own._layers)
    return [pack_layer(layer) for layer in layers], layers, list(other._layers)  # type: ignore[arg-type]


def test_linears_and_packed_layers_are_views_of_the_stack(tmp_path: Path) -> None:
    packed, layers, others = packed_model(tmp_path / "model.safetensors")
    moved, stack = stack_layers(layers, list(packed))  # type: ignore[arg-type]
    matrices = (stack.project, stack.output, stack.ffn_key, stack.ffn_value)
    storages = {each.untyped_storage().data_ptr() for each in matrices}
    assert len(storages) == 4
    for i, (layer, other) in enumerate(zip(layers, others, strict=True)):
        names = ("receptance", "key", "value", "output", "ffn_key", "ffn_value", *DOWNS)
        for name in (*names, *(("v1",) if i else ())):
            weight = getattr(layer, name).weight
            assert torch.equal(weight, getattr(other, name).weight)
            assert weight.is_contiguous()
            assert weight.untyped_storage().data_ptr() in storages
        for name in ("project", "output", "ffn_key", "ffn_value"):
            weight = getattr(moved[i], name)
            assert torch.equal(weight, getattr(packed[i], name))
            assert weight.untyped_storage().data_ptr() in storages


@pytest.mark.parametrize(
    ("ranks", "true_ranks", "wanted"),
    [
        ((128, 128, 256, 64), (96, 96, 256, 64), (96, 96, 256, 64)),
        ((128, 128, 256, 64), (97, 90, 250, 64), (128, 128, 256, 64)),
        ((128, 128, 512, 128), (128, 128, 480, 96), (128, 128, 512, 128)),
        ((64, 64, 128, 64), (64, 64, 128, 32), (64, 64, 128, 64)),
    ],
)
def test_second_halves_lose_their_filling_where_that_saves_a_block_of_256(
    ranks: tuple[int, ...], true_ranks: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    assert ranks_of_up(ranks, true_ranks) == wanted


def test_layer_0_is_filled_up_with_zeros(tmp_path: Path) -> None:
    packed, layers, _ = packed_model(tmp_path / "model.safetensors")
    _, stack = stack_layers(layers, list(packed))  # type: ignore[arg-type]
    project = stack.project.view(4, -1, 128)
    # Of 16, 80, 24 and 8 ranks, filled up to 64, 128, 64 and 64: one block of columns and not two.
    assert stack.up_ranks == (16, 80, 24, 8)
    up = stack.up.view(4, 128, 128).split(stack.up_ranks, 2)
    for i, layer in enumerate(packed):
        rows = len(layer.project)
        assert rows == 3 * 128 + sum(layer.ranks)
        assert not project[i, rows:].any()
        for of_stack, of_layer in zip(up, layer.up.split(layer.ranks, 1), strict=True):
            rank = min(of_stack.shape[2], of_layer.shape[1])
            assert torch.equal(of_stack[i, :, :rank], of_layer[:, :rank])
            assert not of_layer[:, rank:].any()
            assert not of_stack[i, :, rank:].any()
        assert torch.equal(stack.norm1[i], torch.stack(layer.ln1))
        assert torch.equal(stack.norm2[i], torch.stack(layer.ln2))
        assert torch.equal(stack.vectors[i], layer.vectors)
        assert torch.equal(stack.mix[i], layer.mix)
        assert torch.equal(stack.ffn_mix[i], layer.ffn_mix[0])
    assert project[0, -64:].shape == (64, 128)
    assert len(packed[0].project) == project.shape[1] - 64
    assert torch.equal(stack.groups, packed[1].groups)


def test_layer_0_may_have_the_largest_rank(tmp_path: Path) -> None:
    _, layers, _ = packed_model(tmp_path / "model.safetensors")
    wider = tmp_path / "wider.safetensors"
    save_file(checkpoint(7, replace(SHAPE, ranks=(40, 80, 8, 24))), wider)
    layers[0] = load_model(wider, device="cpu", dtype="fp32", packed=False)._layers[0]  # type: ignore[attr-defined]
    packed = [pack_layer(layer) for layer in layers]  # type: ignore[arg-type]
    _, stack = stack_layers(layers, list(packed))  # type: ignore[arg-type]
    assert stack.up_ranks == (40, 80, 24, 8)
    up = stack.up.view(4, 128, -1)[:, :, :40]
    assert up[0].any(0).all()
    for i, layer in enumerate(packed):
        assert torch.equal(up[i], layer.up[:, :40])


def test_what_cannot_be_stacked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _, _ = packed_model(tmp_path / "model.safetensors")
    assert stacking_obstacle(packed, 64) == "the device is no CUDA device"
    monkeypatch.setattr("mrss_provider.model.stacked7.persistent_obstacle", lambda *_: None)
    assert stacking_obstacle(packed, 64) is None
    assert "different ranks" in (stacking_obstacle([*packed, packed[0]], 64) or "")
    monkeypatch.setattr("mrss_provider.model.stacked7.FFN_FACTOR", 3)
    assert "not 3 times as wide" in (stacking_obstacle(packed, 64) or "")


def test_one_launch_that_was_asked_for_and_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(checkpoint(7, SHAPE), path)
    model = load_model(path, device="cpu", dtype="fp32", packed=False)
    parts = (model._layers, model._embedding, model._ln0, model._ln_out, model._head.weight)  # type: ignore[attr-defined]
    monkeypatch.setenv("MRSS_DECODE", "persistent")
    with pytest.raises(ConfigError, match="is persistent, but the device is no CUDA device"):
        FusedDecoder(*parts)  # type: ignore[arg-type]
    monkeypatch.setenv("MRSS_DECODE", "auto")
    assert not FusedDecoder(*parts).persistent_rows  # type: ignore[arg-type]
