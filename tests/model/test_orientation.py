"""The orientation check against the fp64 reference, and its bounds."""

import pytest
import torch
from reference_f64 import Reference
from safetensors.torch import save_file
from tiny_model import TINY, checkpoint, tuned_state, write_checkpoint, write_state

from mrss_provider.errors import InvalidRequestError
from mrss_provider.model import StateMetadata, check_orientation, load_model
from mrss_provider.model.tuned_state import SAMPLE_TOKENS


def in_file(tensors):
    """The states of a file's tensors, [L, H, V, K]."""
    layers = range(TINY.num_layers)
    return torch.stack([tensors[f"blocks.{i}.att.time_state"] for i in layers])


def in_model(wkv_vk, model):
    return wkv_vk if model.config.version == 7 else wkv_vk.mT


@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize("suffix", [".pth", ".st"])
def test_the_orientation_check_reports_what_each_reading_scores(
    version, suffix, tmp_path, token_ids
):
    tensors = checkpoint(version)
    model = load_model(
        write_checkpoint(tmp_path / "m.pth", version), device="cpu", dtype="fp32", threads=1
    )
    path = tmp_path / f"a{suffix}"
    states = tuned_state(scale=0.5)
    torch.save(states, path) if suffix == ".pth" else save_file(states, path)
    ids = token_ids[:15]
    check = check_orientation(model, path, ids.tolist())

    def nll(wkv):
        logits = Reference(tensors, wkv).read(ids)
        return float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]))

    vk = in_model(in_file(states), model)
    assert check.nll_vk == pytest.approx(nll(vk), rel=1e-4)
    assert check.nll_kv == pytest.approx(nll(vk.mT), rel=1e-4)
    assert check.nll_base == pytest.approx(nll(None), rel=1e-4)
    assert check.assumed == ("kv" if suffix == ".st" else "vk")
    assert check.better == ("vk" if check.nll_vk < check.nll_kv else "kv")


@pytest.mark.parametrize("begins", [False, True], ids=["text", "text after a 0"])
@pytest.mark.slow
def test_the_orientation_check_of_a_bos_state_reads_a_leading_0(model, tmp_path, token_ids, begins):
    tensors = checkpoint(model.config.version)
    states = tuned_state(scale=0.5)
    save_file(states, tmp_path / "a.safetensors", StateMetadata(bos=True).to_strings(model.config))
    # Longer than a slice, and with a last one that is shorter.
    ids = token_ids[torch.arange(300) % 70].clone()
    assert ids[0] != 0
    if begins:
        ids[0] = 0

    def nll(wkv, first):
        read = torch.cat([torch.zeros(1, dtype=torch.int64), ids]) if first else ids
        logits = Reference(tensors, wkv).read(read)[first:-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[1:]))

    check = check_orientation(model, tmp_path / "a.safetensors", ids.tolist())
    vk = in_model(in_file(states), model)
    first = 0 if begins else 1
    assert check.nll_vk == pytest.approx(nll(vk, first), rel=1e-4)
    assert check.nll_kv == pytest.approx(nll(vk.mT, first), rel=1e-4)
    assert check.nll_base == pytest.approx(nll(None, 0), rel=1e-4)


@pytest.mark.slow
def test_the_orientation_check_of_a_long_text_is_bounded(model, tmp_path, monkeypatch):
    sizes = []
    head = model.head
    monkeypatch.setattr(model, "head", lambda hidden: sizes.append(len(hidden)) or head(hidden))
    path = write_state(tmp_path / "a.pth")
    ids = [i % 300 + 1 for i in range(SAMPLE_TOKENS)]
    capped = check_orientation(model, path, [*ids, *[7] * 2000])
    assert max(sizes) <= 3 * 128
    assert sum(sizes) == 3 * (SAMPLE_TOKENS - 1)
    assert capped == check_orientation(model, path, ids)


def test_an_orientation_check_needs_two_tokens(model, tmp_path):
    with pytest.raises(InvalidRequestError, match="a sample has at least 2 tokens, got 1"):
        check_orientation(model, write_state(tmp_path / "a.pth"), [5])
