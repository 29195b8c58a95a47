"""RWKV-7's ragged step against the model's layer by layer one, on seeded checkpoints."""

from __future__ import annotations

import pytest
import torch
from check_decoder import DTYPES, SHAPE, TOLERANCE, build, error, fill
from mrss_kernels import rows_linear as linear_ops
from mrss_kernels import wkv7_chunk as wkv_ops
from oracle import DEVICE, INTERPRETED

from mrss_provider.model.rwkv7_ragged import RaggedStep

NUM_SLOTS = 8


@pytest.fixture(autouse=True)
def _no_bfloat16_dots(monkeypatch):
    """Let the recurrence multiply in fp32 where the interpreter's dot is wrong for bfloat16."""
    if INTERPRETED:
        choose = wkv_ops.choose_form
        monkeypatch.setattr(
            wkv_ops, "choose_form", lambda states, size, _: choose(states, size, torch.float32)
        )


def ragged(fused, twin, **options):
    return RaggedStep(fused.layers, twin._embedding, twin._ln0, twin._ln_out, **options)


def pools_of(*models, offset=False):
    pools = [model.new_pool(NUM_SLOTS) for model in models]
    for pool in pools:
        fill(pool, seed=1, offset=offset)
    return pools


def tokens_of(count, step=0):
    return (torch.arange(count, device=DEVICE) * 7 + 11 * step) % SHAPE.vocab_size


def bounds_of(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def compare_pools(got, want, dtype, slots=None):
    slots = range(NUM_SLOTS) if slots is None else slots
    for name in ("wkv", "shift_att", "shift_ffn"):
        states = (getattr(pool, name)[:, list(slots)] for pool in (got, want))
        assert error(*states) < TOLERANCE[dtype], name


def compare(tmp_path, lengths, slots, dtype, offset=False, padding=(), **options):
    """Run two steps both ways; `padding` are lengths of sequences of slot -1 behind the others."""
    plain, fused, twin = build(tmp_path, dtype)
    step = ragged(fused, twin, **options)
    pools = pools_of(plain, twin, offset=offset)
    live = torch.tensor(slots, device=DEVICE)
    padded = torch.tensor([*slots, *[-1] * len(padding)], device=DEVICE)
    count, bounds = sum(lengths), bounds_of([*lengths, *padding])
    for i in range(2):
        tokens = tokens_of(int(bounds[-1]), i)
        expected = plain.prefill_by_layer(
            tokens[:count], bounds[: len(lengths) + 1].tolist(), live, pools[0], all_positions=True
        )
        everywhere = i == 0
        hidden = step.forward(tokens, bounds, padded, pools[1], all_positions=everywhere)
        assert hidden.dtype == torch.float32
        lasts = bounds[1 : len(lengths) + 1] - 1
        got = hidden[:count] if everywhere else hidden[: len(lengths)]
        assert error(got, expected if everywhere else expected[lasts]) < TOLERANCE[dtype]
    compare_pools(pools[1], pools[0], dtype)


@pytest.mark.parametrize("dtype", ["fp16"] if INTERPRETED else DTYPES)
def test_few_tokens_equal_the_layer_by_layer_form(tmp_path, dtype) -> None:
    compare(tmp_path, [1, 4, 2], [4, 0, 1], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32"] if INTERPRETED else DTYPES)
def test_many_tokens_equal_the_layer_by_layer_form(tmp_path, dtype) -> None:
    compare(tmp_path, [9, 1], [4, 0], dtype, grouped_tokens=8)


@pytest.mark.slow
def test_library_products_equal_the_layer_by_layer_form(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(linear_ops, "MAX_ROWS", 4)
    compare(tmp_path, [7, 3], [4, 0], "fp16", ffn_chunk_len=3, grouped_tokens=8)


@pytest.mark.slow
def test_decoding_rows_alone_equal_the_layer_by_layer_form(tmp_path) -> None:
    compare(tmp_path, [1, 1, 1], [4, 0, 1], "fp16")


@pytest.mark.parametrize("grouped_tokens", [pytest.param(2, marks=pytest.mark.slow), 64])
def test_padding_touches_no_state(tmp_path, grouped_tokens) -> None:
    options = {"padding": (0, 0, 3), "grouped_tokens": grouped_tokens}
    compare(tmp_path, [3, 1], [4, 0], "fp32", **options)


@pytest.mark.parametrize("grouped_tokens", [2, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_time_offsets_are_applied(tmp_path, grouped_tokens) -> None:
    compare(tmp_path, [5, 1], [4, 0], "fp32", offset=True, grouped_tokens=grouped_tokens)


@pytest.mark.slow
def test_a_prompt_in_two_calls_equals_one(tmp_path) -> None:
    cut = 9
    _, fused, twin = build(tmp_path, "fp32")
    step = ragged(fused, twin, grouped_tokens=8)
    pools = pools_of(twin, twin)
    tokens, slots = tokens_of(11), torch.tensor([3], device=DEVICE)
    whole = step.forward(tokens, bounds_of([11]), slots, pools[0])
    step.forward(tokens[:cut], bounds_of([cut]), slots, pools[1])
    rest = step.forward(tokens[cut:], bounds_of([11 - cut]), slots, pools[1])
    assert error(rest, whole) < TOLERANCE["fp32"]
    compare_pools(pools[1], pools[0], "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16"] if INTERPRETED else DTYPES)
def test_a_prompt_token_by_token_equals_one_call(tmp_path, dtype) -> None:
    _, fused, twin = build(tmp_path, dtype)
    pools = pools_of(twin, twin)
    tokens, slots = tokens_of(5), torch.tensor([3], device=DEVICE)
    whole = ragged(fused, twin).forward(tokens, bounds_of([5]), slots, pools[0])
    for i in range(5):
        hidden = fused.decode(tokens[i : i + 1], slots, pools[1])
    assert error(hidden, whole) < TOLERANCE[dtype]
    compare_pools(pools[1], pools[0], dtype, slots=[3])


@pytest.mark.slow
def test_a_row_is_the_same_whatever_is_packed_with_it(tmp_path) -> None:
    _, fused, twin = build(tmp_path, "fp32")
    step = ragged(fused, twin)
    pools = pools_of(twin, twin)
    tokens = tokens_of(9)
    first = step.forward(tokens, bounds_of([3, 6]), torch.tensor([2, 6], device=DEVICE), pools[0])
    swapped = torch.cat((tokens[3:], tokens[:3]))
    second = step.forward(swapped, bounds_of([6, 3]), torch.tensor([6, 2], device=DEVICE), pools[1])
    assert torch.equal(first, second.flip(0))
    for name in ("wkv", "shift_att", "shift_ffn"):
        assert torch.equal(*(getattr(pool, name)[:, :NUM_SLOTS] for pool in pools))


if not INTERPRETED:

    def test_graphs_equal_the_layer_by_layer_form(tmp_path) -> None:
        plain, _, twin = build(tmp_path, "fp16")
        pools = pools_of(plain, twin)
        for lengths in ([1, 5, 2, 1], [1] * 8, [40, 1, 27], [300], [2000, 3], [40, 1, 20]):
            ends = [0, *bounds_of(lengths).tolist()[1:]]
            slots = torch.randperm(NUM_SLOTS)[: len(lengths)].to(DEVICE)
            tokens = tokens_of(ends[-1], len(lengths))
            expected = plain.prefill_by_layer(tokens, ends, slots, pools[0])
            assert error(twin.prefill(tokens, ends, slots, pools[1]), expected) < TOLERANCE["fp16"]
        compare_pools(pools[1], pools[0], "fp16")
