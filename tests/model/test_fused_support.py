"""What the fused decode kernels take: the reasons are told, and the decoder asks the same."""

import dataclasses

import pytest
import torch

from mrss_provider.errors import ConfigError
from mrss_provider.model import ModelConfig, load_model
from mrss_provider.model.fused_support import GROUP_LEN, fused_obstacle

CUDA = torch.device("cuda", 0)
CONFIG = ModelConfig(
    version=7,
    num_layers=2,
    hidden_size=128,
    num_heads=2,
    head_size=64,
    vocab_size=77,
    ffn_size=256,
    dtype="fp16",
    fingerprint="",
)
CASES = [
    ({}, (9, 0), None),
    ({"dtype": "bf16", "version": 6}, (8, 0), None),
    ({}, (7, 5), "compute capability 7.5"),
    ({"dtype": "fp32"}, (9, 0), "the weights are fp32"),
    ({"hidden_size": 96}, (9, 0), "the width 96 is no multiple of 64"),
    ({"ffn_size": 200}, (9, 0), "the ffn width 200 is no multiple of 64"),
    ({"head_size": 48}, (9, 0), "heads have 48 channels"),
    ({"head_size": 256}, (9, 0), "heads have 256 channels"),
]


@pytest.mark.parametrize(("changes", "capability", "words"), CASES)
def test_the_reason_is_told_and_the_decoder_agrees(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    capability: tuple[int, int],
    words: str | None,
) -> None:
    rwkv7_cuda = pytest.importorskip("mrss_provider.model.rwkv7_cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
    config = dataclasses.replace(CONFIG, **changes)
    reason = fused_obstacle(config, CUDA)
    assert (reason is None) == (words is None)
    assert words is None or words in str(reason)
    assert rwkv7_cuda.is_supported(config, CUDA) == (words is None)


def test_a_cpu_and_rocm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_obstacle(CONFIG, torch.device("cpu")) == "the device is no CUDA device"
    monkeypatch.setattr("torch.version.hip", "6.4")
    assert "ROCm" in str(fused_obstacle(CONFIG, CUDA))


def test_widths_are_counted_in_what_the_products_need() -> None:
    rows_linear = pytest.importorskip("mrss_kernels.rows_linear")
    assert rows_linear.GROUP_LEN == GROUP_LEN


def test_one_card_of_several_is_chosen_by_the_environment() -> None:
    with pytest.raises(ConfigError, match="got 'cuda:1'; CUDA_VISIBLE_DEVICES says which card"):
        load_model("/nowhere", device="cuda:1")
