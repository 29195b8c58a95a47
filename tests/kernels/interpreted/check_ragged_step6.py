"""RWKV-6's ragged step against the model's layer by layer one, on seeded checkpoints."""

from __future__ import annotations

import pytest
import torch
from check_decoder6 import DTYPES, SHAPE, TOLERANCE, build, error, fill
from check_wkv_chunk import _dot_of_bfloat16
from mrss_kernels import rows_linear as linear_ops
from oracle import DEVICE, INTERPRETED
from tiny_model import Shape

from mrss_provider.model.rwkv6_ragged import RaggedStep6

__all__ = ["_dot_of_bfloat16"]

NUM_SLOTS = 8
SMALL = Shape(num_layers=2, hidden_size=64, vocab_size=77, head_size=32, ffn_size=64)


def ragged(fused, twin, **options):
    return RaggedStep6(fused.layers, twin._embedding, twin._ln0, twin._ln_out, **options)


def pools_of(*models, offset=False, shape=SHAPE):
    pools = [model.new_pool(NUM_SLOTS) for model in models]
    for pool in pools:
        fill(pool, shape, offset)
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


def compare(
    tmp_path, lengths, slots, dtype, *, offset=False, padding=(), shape=SHAPE, steps=2, **options
):
    """Run steps both ways; `padding` are lengths of sequences of slot -1 behind the others."""
    plain, fused, twin = build(tmp_path, dtype, shape)
    step = ragged(fused, twin, **options)
    pools = pools_of(plain, twin, offset=offset, shape=shape)
    live = torch.tensor(slots, device=DEVICE)
    padded = torch.tensor([*slots, *[-1] * len(padding)], device=DEVICE)
    count, bounds = sum(lengths), bounds_of([*lengths, *padding])
    for i in range(steps):
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
@pytest.mark.parametrize(
    ("shape", "steps"), [pytest.param(SHAPE, 2, marks=pytest.mark.slow), (SMALL, 1)]
)
def test_few_tokens_equal_the_layer_by_layer_form(tmp_path, shape, steps, dtype) -> None:
    compare(tmp_path, [1, 4, 2], [4, 0, 1], dtype, shape=shape, steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"] if INTERPRETED else DTYPES)
def test_many_tokens_equal_the_layer_by_layer_form(tmp_path, dtype) -> None:
    compare(tmp_path, [19, 1], [4, 0], dtype, grouped_tokens=8)


@pytest.mark.slow
def test_library_products_equal_the_layer_by_layer_form(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(linear_ops, "MAX_ROWS", 4)
    compare(tmp_path, [7, 3], [4, 0], "fp16", ffn_chunk_len=3, grouped_tokens=8)


@pytest.mark.slow
def test_decoding_rows_alone_equal_the_layer_by_layer_form(tmp_path) -> None:
    compare(tmp_path, [1, 1, 1], [4, 0, 1], "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("grouped_tokens", [2, 64])
def test_padding_touches_no_state(tmp_path, grouped_tokens) -> None:
    options = {"padding": (0, 0, 3), "grouped_tokens": grouped_tokens}
    compare(tmp_path, [3, 1], [4, 0], "fp32", **options)


@pytest.mark.slow
@pytest.mark.parametrize("grouped_tokens", [2, 64])
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

    def answer(model, prefill, decode, pool, prompts, slots):
        """Return greedy tokens [12, n] and their log-probabilities, all from one prefill on."""
        ends = [0, *bounds_of([len(prompt) for prompt in prompts]).tolist()[1:]]
        hidden, found = prefill(torch.cat(prompts), ends, slots, pool), []
        for _ in range(12):
            best = model.head(hidden).log_softmax(-1).max(-1)
            found.append(best)
            hidden = decode(best.indices, slots, pool)
        return torch.stack([x.indices for x in found]), torch.stack([x.values for x in found])

    @pytest.mark.parametrize(
        ("dtype", "allowed", "share"), [("fp16", 3e-2, 0.85), ("bf16", 2e-1, 0.5)]
    )
    def test_answers_equal_those_of_the_layer_by_layer_form(
        tmp_path, dtype, allowed, share
    ) -> None:
        plain, _, twin = build(tmp_path, dtype)
        assert twin.packs_rows
        pools = pools_of(plain, twin)
        prompts = [tokens_of(count, count) for count in (1, 40, 300, 17)]
        slots = torch.tensor([3, 0, 6, 1], device=DEVICE)
        forms = (plain.prefill_by_layer, plain.decode_by_layer), (twin.prefill, twin.decode)
        (want, likely), (got, same) = (
            answer(model, *form, pool, prompts, slots)
            for model, form, pool in zip((plain, twin), forms, pools, strict=True)
        )
        # Where two tokens are equally likely but for rounding, texts differ from there on.
        assert (got == want).float().mean() >= share
        assert (same[0] - likely[0]).abs().max() < allowed

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
