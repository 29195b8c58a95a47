"""RWKV-6's fused decode step against the model's layer by layer one, on seeded checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracle import DEVICE, INTERPRETED, randn, rms
from safetensors.torch import save_file
from tiny_model import Shape, checkpoint

from mrss_provider.model import load_model
from mrss_provider.model.rwkv6_cuda import FusedDecoder6

# Ranks of the mixing and of the decay; neither is a multiple of 64.
SHAPE = Shape(num_layers=2, hidden_size=128, vocab_size=77, ffn_size=448, ranks=(8, 40, 8, 24))
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-2, "bf16": 1.5e-1}
# The interpreter's dot cannot compute in bfloat16.
DTYPES = ["fp32", "fp16"] if INTERPRETED else ["fp32", "fp16", "bf16"]


def build(tmp_path, dtype, shape=SHAPE):
    """Return a model that decodes layer by layer, and the fused decoder of its twin."""
    path = tmp_path / "model.safetensors"
    save_file(checkpoint(6, shape), path)
    plain, twin = (load_model(path, device=DEVICE, dtype=dtype, packed=False) for _ in range(2))
    fused = FusedDecoder6(twin._layers, twin._embedding, twin._ln0, twin._ln_out, twin._head.weight)
    return plain, fused, twin


def fill(pool, shape=SHAPE, offset=False):
    layers, heads, size, width = (
        shape.num_layers, shape.num_heads, shape.head_size, shape.hidden_size
    )  # fmt: skip
    for slot in range(pool.num_slots):
        state = SimpleNamespace(
            wkv=randn(layers, heads, size, size, seed=slot, scale=0.3),
            shift_att=randn(layers, width, seed=slot + 50),
            shift_ffn=randn(layers, width, seed=slot + 70),
            time_offset=randn(layers, width, seed=slot + 90) if offset else None,
        )
        pool.write(slot, state)


def error(got, exact):
    return rms(got - exact) / rms(exact)


def compare(tmp_path, slots, dtype, *, offset=False, shape=SHAPE, num_slots=6):
    plain, fused, twin = build(tmp_path, dtype, shape)
    pools = [model.new_pool(num_slots) for model in (plain, twin)]
    for pool in pools:
        fill(pool, shape, offset)
    ids = torch.tensor(slots, device=DEVICE)
    live = ids >= 0
    for step in range(2):
        tokens = torch.tensor([(7 * i + 11 * step) % 77 for i in range(len(slots))], device=DEVICE)
        expected = plain.decode_by_layer(tokens, ids, pools[0])
        hidden = fused.decode(tokens, ids, pools[1])
        assert hidden.dtype == torch.float32
        assert error(hidden[live], expected[live]) < TOLERANCE[dtype]
        # Above 64 rows the head is a library product that torch has on CUDA only.
        if INTERPRETED and len(slots) > 64:
            continue
        logits = fused.head(hidden)
        assert logits.dtype == torch.float32
        assert error(logits[live], plain.head(expected)[live]) < TOLERANCE[dtype]
    for name in ("wkv", "shift_att", "shift_ffn"):
        got, want = (getattr(pool, name)[:, : pool.num_slots] for pool in (pools[1], pools[0]))
        assert error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "slots",
    [
        pytest.param([3], marks=pytest.mark.slow),
        pytest.param([4, 0, 1], marks=pytest.mark.slow),
        [5, 1, -1, 0, 3, 2],
    ],
)
def test_fused_steps_equal_the_layer_by_layer_ones(tmp_path, slots, dtype) -> None:
    compare(tmp_path, slots, dtype)


@pytest.mark.slow
def test_time_offsets_are_applied(tmp_path) -> None:
    compare(tmp_path, [4, 0, 1], "fp32", offset=True)


@pytest.mark.slow
def test_more_rows_than_the_products_take_equal_the_layer_by_layer_ones(tmp_path) -> None:
    shape = Shape(num_layers=1, hidden_size=64, vocab_size=77, head_size=32, ffn_size=64)
    compare(tmp_path, list(range(65)), "fp32", shape=shape, num_slots=65)


def test_packing_leaves_the_models_own_linears_as_they_were(tmp_path) -> None:
    plain, _, twin = build(tmp_path, "fp32")
    names = ("receptance", "key", "value", "gate", "decay_w1", "ffn_key", "ffn_receptance")
    for name in names:
        got, want = (getattr(model._layers[1], name).weight for model in (twin, plain))
        assert torch.equal(got, want)
        assert got.is_contiguous()
    for got, want in zip(twin._layers[1].mix_w2, plain._layers[1].mix_w2, strict=True):
        assert torch.equal(got.weight, want.weight)


if not INTERPRETED:

    def test_graphs_equal_the_layer_by_layer_steps(tmp_path) -> None:
        plain, _, twin = build(tmp_path, "fp16")
        pools = [model.new_pool(20) for model in (plain, twin)]
        for pool in pools:
            fill(pool)
        # 11 and 19 rows are padded to their buckets; the second 3 replays the first one's graph.
        for step, rows in enumerate((1, 3, 11, 19, 3)):
            tokens = (torch.arange(rows, device=DEVICE) * 5 + step) % 77
            ids = torch.randperm(20)[:rows].to(DEVICE)
            expected = plain.decode_by_layer(tokens, ids, pools[0])
            assert error(twin.decode(tokens, ids, pools[1]), expected) < TOLERANCE["fp16"]
        assert error(pools[1].wkv, pools[0].wkv) < TOLERANCE["fp16"]


def test_logits_at_once_have_the_bits_of_a_step_and_its_head(tmp_path) -> None:
    _, fused, twin = build(tmp_path, "fp16")
    tokens, slots = (
        torch.tensor([7, 11, 13], device=DEVICE),
        torch.tensor([2, -1, 0], device=DEVICE),
    )
    pools = [twin.new_pool(3) for _ in range(2)]
    for pool in pools:
        fill(pool)
    logits = fused.decode_logits(tokens, slots, pools[0])
    assert torch.equal(logits, fused.head(fused.decode(tokens, slots, pools[1])))
    assert torch.equal(pools[0].wkv, pools[1].wkv)
