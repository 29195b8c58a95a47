"""The forward passes against the `rwkv` package, an fp64 reference, and each other."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from package_model import PackageModel
from reading import decode, prefill, relative_rms, slot_tensors
from reference_f64 import Reference
from tiny_model import TINY, Shape, checkpoint, tuned_state, write_checkpoint

from mrss_provider.errors import ConfigError, ModelFileError
from mrss_provider.model import TunedState, load_model

# Not a power of two wide, and heads of 32.
WIDE = Shape(2, 192, 500, 32, 512, (24, 16, 8, 40))


def load(path, **options):
    return load_model(path, **({"device": "cpu", "dtype": "fp32", "threads": 1} | options))


def test_prefill_gives_the_packages_logits_and_state(model, package_model, token_ids):
    wanted, wkv, shift_att, shift_ffn = package_model.read(token_ids.tolist())
    pool = model.new_pool(3)
    logits = prefill(model, pool, [token_ids], [1])
    assert logits.dtype == torch.float32
    assert relative_rms(logits, wanted) < 1e-5
    for got, expected in zip(slot_tensors(pool, 1), (wkv, shift_att, shift_ffn), strict=True):
        assert relative_rms(got, expected) < 1e-5


def test_decode_gives_the_packages_logits_and_state(model, package_model, token_ids):
    wanted, wkv, shift_att, shift_ffn = package_model.read(token_ids.tolist())
    pool = model.new_pool(3)
    assert relative_rms(decode(model, pool, token_ids, 2), wanted) < 1e-5
    for got, expected in zip(slot_tensors(pool, 2), (wkv, shift_att, shift_ffn), strict=True):
        assert relative_rms(got, expected) < 1e-5


@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize("shape", [TINY, WIDE], ids=["tiny", "wide"])
def test_every_shape_follows_the_fp64_reference(version, shape, tmp_path):
    tensors = checkpoint(version, shape, seed=3)
    model = load(write_checkpoint(tmp_path / "m.safetensors", version, shape, seed=3))
    ids = torch.randint(0, shape.vocab_size, (20,)).tolist()
    reference = Reference(tensors)
    wanted = reference.read(ids)
    pool = model.new_pool(1)
    assert relative_rms(prefill(model, pool, [ids], [0]), wanted) < 1e-5
    assert relative_rms(pool.wkv[:, 0], reference.wkv) < 1e-5


@given(cuts=st.lists(st.integers(1, 69), max_size=5, unique=True), data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_split_of_a_prompt_gives_the_same_state(model, token_ids, cuts, data):
    whole, parts = model.new_pool(1), model.new_pool(2)
    wanted = prefill(model, whole, [token_ids], [0])
    logits = []
    for begin, end in itertools.pairwise([0, *sorted(cuts), 70]):
        part = token_ids[begin:end]
        if end - begin < 5 and data.draw(st.booleans()):
            logits.append(decode(model, parts, part, 1))
        else:
            logits.append(prefill(model, parts, [part], [1]))
    assert relative_rms(torch.cat(logits), wanted) < 1e-5
    for got, expected in zip(slot_tensors(parts, 1), slot_tensors(whole, 0), strict=True):
        assert relative_rms(got, expected) < 1e-5


def test_a_split_at_a_chunk_changes_no_bit(model, token_ids):
    whole, parts = model.new_pool(1), model.new_pool(1)
    wanted = prefill(model, whole, [token_ids], [0])
    got = [prefill(model, parts, [part], [0]) for part in token_ids.split(32)]
    assert torch.equal(torch.cat(got), wanted)
    assert torch.equal(parts.wkv, whole.wkv)


def test_prefill_returns_last_hidden_states_unless_asked_for_all(model, token_ids):
    slots, offsets = torch.tensor([1, 0]), [0, 20, 70]
    last = model.prefill(token_ids, offsets, slots, model.new_pool(2))
    every = model.prefill(token_ids, offsets, slots, model.new_pool(2), all_positions=True)
    assert last.shape == (2, TINY.hidden_size)
    assert torch.equal(last, every[[19, 69]])


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize(
    "shape",
    [pytest.param(TINY, id="tiny"), pytest.param(WIDE, id="wide", marks=pytest.mark.slow)],
)
def test_a_rows_bits_do_not_depend_on_its_batch_or_slot(version, shape, dtype, tmp_path):
    model = load(write_checkpoint(tmp_path / "m.pth", version, shape), dtype=dtype)
    rng = random.Random(version)
    prompts = [rng.choices(range(shape.vocab_size), k=rng.randrange(1, 40)) for _ in range(16)]

    def run(rows, slots):
        pool = model.new_pool(20)
        offsets = [0, *itertools.accumulate(len(prompts[row]) for row in rows)]
        packed = torch.tensor([token for row in rows for token in prompts[row]])
        slots = torch.tensor(slots)
        results = [model.head(model.prefill(packed, offsets, slots, pool))]
        for step in range(2):
            ids = torch.tensor([prompts[row][step % len(prompts[row])] for row in rows])
            results.append(model.head(model.decode(ids, slots, pool)))
        return [[*(r[i] for r in results), pool.wkv[:, slot]] for i, slot in enumerate(slots)]

    alone = [run([row], [3])[0] for row in range(16)]
    for size in (2, 3, 5, 8, 16):
        rows = rng.sample(range(16), size)
        for slots in (list(range(2, 2 + size)), rng.sample(range(20), size)):
            for row, tensors in zip(rows, run(rows, slots), strict=True):
                assert all(map(torch.equal, tensors, alone[row]))


def test_decode_leaves_other_slots_as_they_are(model, token_ids):
    pool = model.new_pool(6)
    prefill(model, pool, [token_ids[:9]] * 6, range(6))
    before = [tensor.clone() for tensor in (pool.wkv, pool.shift_att, pool.shift_ffn)]
    model.decode(token_ids[:4], torch.tensor([4, -1, 0, -1]), pool)
    others = [1, 2, 3, 5]
    for tensor, old in zip((pool.wkv, pool.shift_att, pool.shift_ffn), before, strict=True):
        assert torch.equal(tensor[:, others], old[:, others])
        assert not torch.equal(tensor[:, [0, 4]], old[:, [0, 4]])


def test_padding_rows_change_no_bit_of_the_others(model, token_ids):
    padded, plain = model.new_pool(6), model.new_pool(6)
    with_padding = model.decode(token_ids[:4], torch.tensor([4, -1, 0, -1]), padded)
    without = model.decode(token_ids[[0, 2]], torch.tensor([4, 0]), plain)
    assert torch.equal(with_padding[[0, 2]], without)
    assert torch.equal(padded.wkv, plain.wkv)


@pytest.mark.parametrize("version", [7, 6])
def test_a_time_offset_scales_wkvs_output_of_its_row_alone(version, tmp_path, token_ids):
    model = load(write_checkpoint(tmp_path / "m.pth", version))
    offset = 0.3 * torch.randn(TINY.num_layers, TINY.hidden_size)
    with_offset = TunedState("offset", torch.zeros(model.config.state_shape), offset)
    ids = token_ids[:20]
    wanted = Reference(checkpoint(version), time_offset=offset).read(ids)
    pool, plain = model.new_pool(3), model.new_pool(3)
    pool.write(1, with_offset)
    logits = prefill(model, pool, [ids, ids], [1, 0])
    assert relative_rms(logits[:20], wanted) < 1e-5
    assert torch.equal(logits[20:], prefill(model, plain, [ids], [0]))
    pool.write(1, with_offset)
    pool.write(0, None)
    slots = torch.tensor([0, 1])
    steps = [model.head(model.decode(token.expand(2), slots, pool)) for token in ids]
    assert relative_rms(torch.stack([step[1] for step in steps]), wanted) < 1e-5
    plain.write(0, None)
    assert torch.equal(steps[0][0], decode(model, plain, ids[:1], 0)[0])


@pytest.mark.parametrize("version", [7, 6])
def test_a_state_inside_the_checkpoint_is_what_rows_start_from(version, tmp_path, token_ids):
    states = tuned_state(scale=0.5)
    path = tmp_path / "m.pth"
    torch.save(checkpoint(version) | states, path)
    model = load(path)
    # In files states are [V, K]; RWKV-6 computes with [K, V].
    wkv = torch.stack([states[f"blocks.{i}.att.time_state"] for i in range(TINY.num_layers)])
    wkv = wkv if version == 7 else wkv.mT
    assert torch.equal(model.base_state.wkv, wkv)
    ids = token_ids[:20]
    wanted = Reference(checkpoint(version), state=wkv).read(ids)
    pool = model.new_pool(2)
    assert relative_rms(prefill(model, pool, [ids], [1]), wanted) < 1e-5
    pool.write(1, None)
    assert torch.equal(pool.wkv[:, 1], wkv)


@pytest.mark.slow
def test_the_package_reads_a_state_inside_an_rwkv6_as_we_do(tmp_path, token_ids):
    path = tmp_path / "m.pth"
    torch.save(checkpoint(6) | tuned_state(scale=0.5), path)
    wanted, *_ = PackageModel(path, 6).read(token_ids[:20].tolist())
    model = load(path)
    assert relative_rms(prefill(model, model.new_pool(1), [token_ids[:20]], [0]), wanted) < 1e-5


@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 1e-5), ("fp32", 1e-5), ("bf16", 0.05)])
def test_weights_stored_in_bf16_lose_nothing_in_fp16(version, dtype, bound, tmp_path, token_ids):
    tensors = checkpoint(version, dtype=torch.bfloat16)
    path = tmp_path / "m.pth"
    torch.save(tensors, path)
    wanted = Reference(tensors).read(token_ids)
    model = load(path, dtype=dtype)
    assert relative_rms(prefill(model, model.new_pool(1), [token_ids], [0]), wanted) < bound
    assert relative_rms(decode(model, model.new_pool(1), token_ids, 0), wanted) < bound


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_plain_and_packed_weights_agree(checkpoint_path, dtype, token_ids):
    plain, packed = (load(checkpoint_path, dtype=dtype, packed=p) for p in (False, True))
    wanted = prefill(plain, plain.new_pool(1), [token_ids], [0])
    got = prefill(packed, packed.new_pool(1), [token_ids], [0])
    bound = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.01}[dtype]
    assert relative_rms(got, wanted) < bound


def test_rwkv6_in_fp16_survives_outputs_beyond_its_range(tmp_path, token_ids):
    tensors = checkpoint(6)
    for i in range(TINY.num_layers):
        for name in ("att.output.weight", "ffn.value.weight"):
            tensors[f"blocks.{i}.{name}"] *= 30_000
    path = tmp_path / "m.pth"
    torch.save(tensors, path)
    wanted = Reference(tensors).read(token_ids[:20])
    model = load(path, dtype="fp16", packed=False)
    logits = prefill(model, model.new_pool(1), [token_ids[:20]], [0])
    assert relative_rms(logits, wanted) < 0.02


def test_a_state_pool_in_fp16_stays_close(checkpoint_path, model, token_ids):
    half = load(checkpoint_path, state_dtype="fp16")
    pool = half.new_pool(2)
    assert pool.wkv.dtype == torch.float16
    wanted = prefill(model, model.new_pool(1), [token_ids], [0])
    assert relative_rms(prefill(half, pool, [token_ids[:40]], [1]), wanted[:40]) < 0.01
    assert relative_rms(decode(half, pool, token_ids[40:], 1), wanted[40:]) < 0.01


def test_results_may_be_modified_by_the_caller(model, token_ids):
    pool = model.new_pool(1)
    hidden = model.decode(token_ids[:1], torch.tensor([0]), pool)
    hidden += 1
    logits = model.head(hidden)
    logits[0, 0] = -torch.inf
    assert not logits.requires_grad


def test_dtype_auto_is_fp16_where_fbgemm_is(checkpoint_path):
    engines = torch.backends.quantized.supported_engines
    wanted = {"fp16"} if "fbgemm" in engines else {"bf16", "fp32"}
    assert load(checkpoint_path, dtype="auto").config.dtype in wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, fp32, bf16, fp16, got 'int8'"),
        ({"state_dtype": "bf16"}, "state_dtype must be one of fp32, fp16, got 'bf16'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_unknown_options_are_refused(checkpoint_path, options, message):
    with pytest.raises(ConfigError, match=message):
        load(checkpoint_path, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e5])
def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path, value):
    tensors = checkpoint(7)
    tensors["blocks.1.ffn.key.weight"][3, 4] = value
    path = tmp_path / "m.pth"
    torch.save(tensors, path)
    with pytest.raises(ModelFileError, match=r"m: blocks.1.ffn.key.weight holds NaN, or values"):
        load(path, dtype="fp16")
    if value == 1e5:
        load(path, dtype="fp32")
