"""All layers in one launch against the same steps launch by launch and layer by layer, on a GPU."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from mrss_kernels.persistent7_choice import ROWS
from safetensors.torch import save_file
from tiny_model import Shape, checkpoint

from mrss_provider.model import load_model
from mrss_provider.model.rwkv7_cuda import FusedDecoder

pytestmark = pytest.mark.gpu

RANKS = {1024: (64, 64, 32, 128), 2048: (96, 96, 64, 256), 4096: (128, 128, 96, 480)}
TOLERANCE = {"fp16": 2e-2, "bf16": 1.5e-1}
NUM_SLOTS = 36
SLOTS = {
    "few": ([3], [4, 0], [7, -1, 2], [9, 8, 7, 6]),
    "some": ([0, 2, 4, 6, 8], [5, 1, -1, 0, 3, 2], [*range(1, 8)], [9, 0, 8, -1, 7, 2, 6, 3]),
    "more": ([*range(8), 17], [-1, *range(8, 16), 2], [*range(11)]),
    "many": ([*range(5, 17)], [*range(3, 17)], [16, -1, *range(14)]),
    "most": ([*range(20)], [*range(23), -1], [*range(6, 34)], [*range(2, 34)]),
}


@functools.cache
def checkpoint_file(folder, width, num_layers):
    shape = Shape(
        num_layers=num_layers,
        hidden_size=width,
        vocab_size=77,
        ffn_size=4 * width,
        ranks=RANKS[width],
    )
    path = folder / f"{width}-{num_layers}.safetensors"
    save_file(checkpoint(7, shape, seed=3, dtype=torch.float16), path)
    return path


@pytest.fixture(autouse=True)
def _on_any_card(monkeypatch):
    faster = {torch.cuda.get_device_name(): dict.fromkeys(RANKS, ROWS)}
    monkeypatch.setattr("mrss_kernels.persistent7_choice.FASTER", faster)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Make a seeded model that decodes layer by layer, its fused twin, and the twin's decoder.

    The first one has fp32 weights if `exact`.
    """
    folder = tmp_path_factory.mktemp("models")

    def make(width, dtype="fp16", state_dtype="fp32", num_layers=2, exact=False):
        path = checkpoint_file(folder, width, num_layers)
        options = {"device": "cuda", "dtype": dtype, "state_dtype": state_dtype}
        twin = load_model(path, **options)
        plain = load_model(path, **options | ({"dtype": "fp32"} if exact else {}))
        fused = twin.fused
        assert isinstance(fused, FusedDecoder)
        return plain, twin, fused

    return make


def filled_pool(model, seed=1):
    layers, heads, size, _ = model.config.state_shape
    generator = torch.Generator("cuda").manual_seed(seed)
    pool = model.new_pool(NUM_SLOTS)
    for slot in range(NUM_SLOTS):
        shapes = [(layers, heads, size, size), *[(layers, model.config.hidden_size)] * 2]
        wkv, att, ffn = (torch.randn(s, device="cuda", generator=generator) for s in shapes)
        state = SimpleNamespace(wkv=wkv * 0.3, shift_att=att, shift_ffn=ffn, time_offset=None)
        pool.write(slot, state)
    return pool


def error(got, exact):
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("slot_lists", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("width", RANKS)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [("fp16", "fp32"), ("bf16", "fp32"), ("fp16", "fp16")]
)
def test_a_step_equals_the_layer_by_layer_one(build, width, dtype, state_dtype, slot_lists) -> None:
    plain, twin, fused = build(width, dtype, state_dtype)
    assert fused.persistent_obstacle is None
    for slots in slot_lists:
        pools = [filled_pool(model) for model in (plain, twin)]
        ids = torch.tensor(slots, device="cuda")
        live = ids >= 0
        for step in range(3):
            tokens = torch.tensor([(7 * i + step) % 77 for i in range(len(slots))], device="cuda")
            expected = plain.decode_by_layer(tokens, ids, pools[0])
            hidden = fused.decode(tokens, ids, pools[1])
            assert error(hidden[live], expected[live]) < TOLERANCE[dtype]
        for name in ("wkv", "shift_att", "shift_ffn"):
            got, want = (getattr(pool, name)[:, :NUM_SLOTS] for pool in (pools[1], pools[0]))
            assert error(got, want) < TOLERANCE[dtype]
            untouched = [slot for slot in range(NUM_SLOTS) if slot not in slots]
            assert torch.equal(got[:, untouched], want[:, untouched])


def test_it_is_as_exact_as_launch_by_launch(build) -> None:
    exact, twin, fused = build(2048, exact=True)
    errors = []
    for rows in (ROWS, range(0)):
        pools = [filled_pool(model) for model in (exact, twin)]
        fused.persistent_rows = rows
        tokens, ids = torch.arange(6, device="cuda"), torch.arange(6, device="cuda")
        for _ in range(4):
            expected = exact.decode_by_layer(tokens, ids, pools[0])
            hidden = fused.decode(tokens, ids, pools[1])
        errors.append(error(hidden, expected))
    assert errors[0] < 1.3 * errors[1]


def test_a_thousand_replays_give_equal_bits_twice(build) -> None:
    _, twin, fused = build(2048)
    states = []
    for _ in range(2):
        pool = filled_pool(twin)
        tokens, ids = torch.arange(5, device="cuda"), torch.arange(5, device="cuda")
        for _ in range(1000):
            hidden = twin.decode(tokens, ids, pool)
        states.append((hidden, pool.wkv, pool.shift_ffn))
    assert fused.persistent_obstacle is None
    assert torch.isfinite(states[0][0]).all()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.timeout(400)
def test_steps_of_all_row_counts_in_turn_do_not_disturb_each_other(build) -> None:
    _, twin, _ = build(1024)
    alone = {}
    for rows in ROWS:
        pool = filled_pool(twin)
        ids = torch.arange(rows, device="cuda")
        alone[rows] = twin.decode(ids, ids, pool)
    for rows in (8, 11, 1, 32, 5, 14, 12, 16, 2, 9, 20, 7, 3, 6, 10, 4):
        pool = filled_pool(twin)
        ids = torch.arange(rows, device="cuda")
        assert torch.equal(twin.decode(ids, ids, pool), alone[rows])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("width", RANKS)
def test_after_a_step_what_the_next_one_waits_for_reads_as_not_written(build, width) -> None:
    _, twin, fused = build(width)
    for rows in ROWS:
        ids = torch.arange(rows, device="cuda")
        fused.decode(ids, ids, filled_pool(twin))
        floats, halves = fused._persistent._buffers[rows]
        assert (floats[0].view(torch.int32) == -1).all()
        assert (halves[0].view(torch.int16) == -1).all()
        # Of odd layers, what the one before writes; the next step sees to the rest.
        assert (halves[1, : 6 * rows * width].view(torch.int16) == -1).all()


def test_a_row_without_a_number_ends_its_step_and_leaves_the_others_as_they_were(build) -> None:
    _, twin, _ = build(2048)
    ids = torch.arange(4, device="cuda")
    results = []
    for spoilt in (False, True):
        pool = filled_pool(twin)
        if spoilt:
            pool.wkv[:, 2] = float("nan")
            pool.shift_att[:, 2] = float("inf")
        for _ in range(2):
            hidden = twin.decode(ids, ids, pool)
        results.append(hidden[[0, 1, 3]])
        assert torch.isfinite(hidden[2]).all() != spoilt
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["x", "mixed"])
def test_inputs_that_do_not_start_at_16_bytes_are_refused_and_copies_of_them_not(
    build, name
) -> None:
    _, twin, fused = build(1024)
    pool, ids = filled_pool(twin), torch.arange(2, device="cuda")
    shapes = {"x": (2, 1024), "mixed": (6, 2, 1024)}
    dtypes = {"x": torch.float32, "mixed": torch.float16}
    inputs = {each: torch.zeros(shapes[each], dtype=dtypes[each], device="cuda") for each in shapes}
    memory = torch.zeros(inputs[name].numel() + 2, dtype=dtypes[name], device="cuda")
    inputs[name] = memory[2:].view(shapes[name])
    states = (pool.shift_att, pool.shift_ffn, pool.wkv, ids)
    past = 2 * inputs[name].element_size()
    words = f"{name} must start at a multiple of 16 bytes, got {past} bytes past one"
    with pytest.raises(ValueError, match=words):
        fused._persistent.advance(*inputs.values(), *states)
    copies = [each.clone() for each in inputs.values()]
    residual, _ = fused._persistent.advance(*copies, *states)
    assert torch.isfinite(residual).all()


def test_weights_are_held_once(build) -> None:
    plain, twin, fused = build(2048)
    for i, (layer, own) in enumerate(zip(plain._layers, twin._layers, strict=True)):
        packed = fused.layers[i]
        downs = ("w1", "a1", "g1", *(("v1",) if i else ()))
        for name in ("receptance", "key", "value", *downs, "output", "ffn_key", "ffn_value"):
            weight = getattr(own, name).weight
            assert torch.equal(weight, getattr(layer, name).weight)
            storages = {t.untyped_storage().data_ptr() for t in (packed.project, packed.output,
                        packed.ffn_key, packed.ffn_value)}  # fmt: skip
            assert weight.untyped_storage().data_ptr() in storages


def test_an_odd_number_of_layers_runs_launch_by_launch(build) -> None:
    _, _, fused = build(1024, num_layers=3)
    assert not fused.persistent_rows
    assert fused.persistent_obstacle == "3 layers are not an even number of them"
