"""RWKV-7's ragged step against the model's layer by layer one, on seeded checkpoints."""

from __future__ import annotations

import pytest
import torch
from check_decoder import DTYPES, build, fill
from mrss_kernels import wkv7_chunk as wkv_ops
from oracle import INTERPRETED
from ragged_steps import RaggedStepChecks

from mrss_provider.model.rwkv7_ragged import RaggedStep


@pytest.fixture(autouse=True)
def _no_bfloat16_dots(monkeypatch):
    """Let the recurrence multiply in fp32 where the interpreter's dot is wrong for bfloat16."""
    if INTERPRETED:
        choose = wkv_ops.choose_form
        monkeypatch.setattr(
            wkv_ops, "choose_form", lambda states, size, _: choose(states, size, torch.float32)
        )


class TestRaggedStep(RaggedStepChecks):
    step = RaggedStep

    def build(self, tmp_path, dtype, shape=None):
        return build(tmp_path, dtype)

    def fill(self, pool, shape=None, offset=False) -> None:
        fill(pool, seed=1, offset=offset)

    @pytest.mark.parametrize("dtype", ["fp16"] if INTERPRETED else DTYPES)
    def test_few_tokens_equal_the_layer_by_layer_form(self, tmp_path, dtype) -> None:
        self.compare(tmp_path, [1, 4, 2], [4, 0, 1], dtype)
