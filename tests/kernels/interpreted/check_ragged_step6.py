"""RWKV-6's ragged step against the model's layer by layer one, on seeded checkpoints."""

from __future__ import annotations

import pytest
import torch
from check_decoder6 import DTYPES, SHAPE, build, fill
from check_wkv_chunk import _dot_of_bfloat16
from oracle import DEVICE, INTERPRETED
from ragged_steps import RaggedStepChecks, bounds_of, tokens_of
from tiny_model import Shape

from mrss_provider.model.rwkv6_ragged import RaggedStep6

__all__ = ["_dot_of_bfloat16"]

SMALL = Shape(num_layers=2, hidden_size=64, vocab_size=77, head_size=32, ffn_size=64)


def answer(model, prefill, decode, pool, prompts, slots):
    """Return greedy tokens [12, n] and their log-probabilities, all from one prefill on."""
    ends = [0, *bounds_of([len(prompt) for prompt in prompts]).tolist()[1:]]
    hidden, found = prefill(torch.cat(prompts), ends, slots, pool), []
    for _ in range(12):
        best = model.head(hidden).log_softmax(-1).max(-1)
        found.append(best)
        hidden = decode(best.indices, slots, pool)
    return torch.stack([x.indices for x in found]), torch.stack([x.values for x in found])


class TestRaggedStep6(RaggedStepChecks):
    step = RaggedStep6

    def build(self, tmp_path, dtype, shape=None):
        return build(tmp_path, dtype, shape or SHAPE)

    def fill(self, pool, shape=None, offset=False) -> None:
        fill(pool, shape or SHAPE, offset)

    @pytest.mark.parametrize("dtype", ["fp16"] if INTERPRETED else DTYPES)
    @pytest.mark.parametrize(
        ("shape", "steps"), [pytest.param(SHAPE, 2, marks=pytest.mark.slow), (SMALL, 1)]
    )
    def test_few_tokens_equal_the_layer_by_layer_form(self, tmp_path, shape, steps, dtype) -> None:
        self.compare(tmp_path, [1, 4, 2], [4, 0, 1], dtype, shape=shape, steps=steps)

    if not INTERPRETED:

        @pytest.mark.parametrize(
            ("dtype", "allowed", "share"), [("fp16", 3e-2, 0.85), ("bf16", 2e-1, 0.5)]
        )
        def test_answers_equal_those_of_the_layer_by_layer_form(
            self, tmp_path, dtype, allowed, share
        ) -> None:
            plain, _, twin = self.build(tmp_path, dtype)
            assert twin.packs_rows
            pools = self.pools_of(plain, twin)
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
