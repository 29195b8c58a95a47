"""What a ragged step must do, of whatever version. Oracle: the model's layer by layer form."""

from __future__ import annotations

import pytest
import torch
from mrss_kernels import rows_linear as linear_ops
from oracle import DEVICE, INTERPRETED

NUM_SLOTS = 8
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-2, "bf16": 1.5e-1}
VOCAB = 77


def tokens_of(count, step=0):
    return (torch.arange(count, device=DEVICE) * 7 + 11 * step) % VOCAB


def bounds_of(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def error(got, exact):
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def compare_pools(got, want, dtype, slots=None):
    slots = range(NUM_SLOTS) if slots is None else slots
    for name in ("wkv", "shift_att", "shift_ffn"):
        states = (getattr(pool, name)[:, list(slots)] for pool in (got, want))
        assert error(*states) < TOLERANCE[dtype], name


class RaggedStepChecks:
    """Claims about `step`, a subclass of `RaggedPass`; a version's file makes its models."""

    step: type

    def build(self, tmp_path, dtype, shape=None):
        """Return a model, its fused decoder and its twin, which that decoder packed."""
        raise NotImplementedError

    def fill(self, pool, shape=None, offset=False) -> None:
        """Write random states to every slot."""
        raise NotImplementedError

    def ragged(self, fused, twin, **options):
        return self.step(fused.layers, twin._embedding, twin._ln0, twin._ln_out, **options)

    def pools_of(self, *models, offset=False, shape=None):
        pools = [model.new_pool(NUM_SLOTS) for model in models]
        for pool in pools:
            self.fill(pool, shape, offset)
        return pools

    def compare(
        self,
        tmp_path,
        lengths,
        slots,
        dtype,
        *,
        offset=False,
        padding=(),
        shape=None,
        steps=2,
        **options,
    ):
        """Run steps both ways; `padding` are lengths of sequences of slot -1 behind the others."""
        plain, fused, twin = self.build(tmp_path, dtype, shape)
        step = self.ragged(fused, twin, **options)
        pools = self.pools_of(plain, twin, offset=offset, shape=shape)
        live = torch.tensor(slots, device=DEVICE)
        padded = torch.tensor([*slots, *[-1] * len(padding)], device=DEVICE)
        count, bounds = sum(lengths), bounds_of([*lengths, *padding])
        ends = bounds[: len(lengths) + 1]
        for i in range(steps):
            tokens = tokens_of(int(bounds[-1]), i)
            expected = plain.prefill_by_layer(
                tokens[:count], ends.tolist(), live, pools[0], all_positions=True
            )
            everywhere = i == 0
            hidden = step.forward(tokens, bounds, padded, pools[1], all_positions=everywhere)
            assert hidden.dtype == torch.float32
            got = hidden[:count] if everywhere else hidden[: len(lengths)]
            wanted = expected if everywhere else expected[ends[1:] - 1]
            assert error(got, wanted) < TOLERANCE[dtype]
        compare_pools(pools[1], pools[0], dtype)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["fp32", "fp16"] if INTERPRETED else ["fp32", "fp16", "bf16"])
    def test_many_tokens_equal_the_layer_by_layer_form(self, tmp_path, dtype) -> None:
        self.compare(tmp_path, [19, 1], [4, 0], dtype, grouped_tokens=8)

    @pytest.mark.slow
    def test_library_products_equal_the_layer_by_layer_form(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(linear_ops, "MAX_ROWS", 4)
        self.compare(tmp_path, [7, 3], [4, 0], "fp16", ffn_chunk_len=3, grouped_tokens=8)

    @pytest.mark.slow
    def test_decoding_rows_alone_equal_the_layer_by_layer_form(self, tmp_path) -> None:
        self.compare(tmp_path, [1, 1, 1], [4, 0, 1], "fp16")

    @pytest.mark.slow
    @pytest.mark.parametrize("grouped_tokens", [2, 64])
    def test_padding_touches_no_state(self, tmp_path, grouped_tokens) -> None:
        options = {"padding": (0, 0, 3), "grouped_tokens": grouped_tokens}
        self.compare(tmp_path, [3, 1], [4, 0], "fp32", **options)

    @pytest.mark.slow
    @pytest.mark.parametrize("grouped_tokens", [2, 64])
    def test_time_offsets_are_applied(self, tmp_path, grouped_tokens) -> None:
        options = {"offset": True, "grouped_tokens": grouped_tokens}
        self.compare(tmp_path, [5, 1], [4, 0], "fp32", **options)

    @pytest.mark.slow
    def test_a_prompt_in_two_calls_equals_one(self, tmp_path) -> None:
        cut = 9
        _, fused, twin = self.build(tmp_path, "fp32")
        step = self.ragged(fused, twin, grouped_tokens=8)
        pools = self.pools_of(twin, twin)
        tokens, slots = tokens_of(11), torch.tensor([3], device=DEVICE)
        whole = step.forward(tokens, bounds_of([11]), slots, pools[0])
        step.forward(tokens[:cut], bounds_of([cut]), slots, pools[1])
        rest = step.forward(tokens[cut:], bounds_of([11 - cut]), slots, pools[1])
        assert error(rest, whole) < TOLERANCE["fp32"]
        compare_pools(pools[1], pools[0], "fp32")

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["fp16"] if INTERPRETED else ["fp32", "fp16", "bf16"])
    def test_a_prompt_token_by_token_equals_one_call(self, tmp_path, dtype) -> None:
        _, fused, twin = self.build(tmp_path, dtype)
        pools = self.pools_of(twin, twin)
        tokens, slots = tokens_of(5), torch.tensor([3], device=DEVICE)
        whole = self.ragged(fused, twin).forward(tokens, bounds_of([5]), slots, pools[0])
        for i in range(5):
            hidden = fused.decode(tokens[i : i + 1], slots, pools[1])
        assert error(hidden, whole) < TOLERANCE[dtype]
        compare_pools(pools[1], pools[0], dtype, slots=[3])

    @pytest.mark.slow
    def test_a_row_is_the_same_whatever_is_packed_with_it(self, tmp_path) -> None:
        _, fused, twin = self.build(tmp_path, "fp32")
        step = self.ragged(fused, twin)
        pools = self.pools_of(twin, twin)
        tokens, slots = tokens_of(9), torch.tensor([2, 6], device=DEVICE)
        first = step.forward(tokens, bounds_of([3, 6]), slots, pools[0])
        swapped = torch.cat((tokens[3:], tokens[:3]))
        second = step.forward(swapped, bounds_of([6, 3]), slots.flip(0), pools[1])
        assert torch.equal(first, second.flip(0))
        for name in ("wkv", "shift_att", "shift_ffn"):
            assert torch.equal(*(getattr(pool, name)[:, :NUM_SLOTS] for pool in pools))

    if not INTERPRETED:

        def test_graphs_equal_the_layer_by_layer_form(self, tmp_path) -> None:
            plain, _, twin = self.build(tmp_path, "fp16")
            pools = self.pools_of(plain, twin)
            for lengths in ([1, 5, 2, 1], [1] * 8, [40, 1, 27], [300], [2000, 3], [40, 1, 20]):
                ends = bounds_of(lengths).tolist()
                slots = torch.randperm(NUM_SLOTS)[: len(lengths)].to(DEVICE)
                tokens = tokens_of(ends[-1], len(lengths))
                expected = plain.prefill_by_layer(tokens, ends, slots, pools[0])
                got = twin.prefill(tokens, ends, slots, pools[1])
                assert error(got, expected) < TOLERANCE["fp16"]
            compare_pools(pools[1], pools[0], "fp16")
