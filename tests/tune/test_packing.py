"""Rows of unlike lengths as one row of tokens: where they stand, and on CUDA what they compute."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from command import mrss
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_model import Shape, checkpoint

from mrss_provider.tune.network import Shape as NetworkShape
from mrss_provider.tune.network import forward, packs_rows, read_rows, start_state
from mrss_provider.tune.packed7 import keeps_chunks
from mrss_provider.tune.packing import Packing
from mrss_provider.tune.wkv import wkv7, wkv7_packed


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_what_is_packed_and_unpacked_is_the_rows_with_zeros_behind(lengths):
    width = max(lengths) + 2
    rows = torch.arange(1, len(lengths) * width + 1).view(len(lengths), width)
    packing = Packing.of(lengths, width, torch.device("cpu"))
    packed = packing.pack(rows)
    assert packed.tolist() == [x for row, n in zip(rows, lengths, strict=True) for x in row[:n]]
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    assert torch.equal(packing.unpack(packed, width), rows * real)
    starts = {t: i for i, t in enumerate(packing.bounds[:-1]) if lengths[i]}
    assert packing.first.tolist() == [starts.get(t, -1) for t in range(len(packed))]


def test_a_cpu_reads_padded_rows_as_the_network_does():
    weights = checkpoint()
    assert not packs_rows(weights)
    shape = NetworkShape.of(weights)
    ids = torch.randint(0, shape.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    wkv = torch.randn(2, *shape.state_size, generator=torch.Generator().manual_seed(2))
    hidden, _ = forward(weights, ids, start_state(shape, wkv, torch.float32))
    assert torch.equal(read_rows(weights, ids, (20, 7), wkv), hidden)


def relative(got, wanted):
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.gpu
def test_fla_on_packed_tokens_has_the_values_and_gradients_of_each_sequence_in_fp32():
    lengths, heads, n = (100, 1, 37), 4, 64
    gen = torch.Generator("cuda").manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=gen, device="cuda")

    size = (sum(lengths), heads, n)
    packing = Packing.of(lengths, max(lengths), torch.device("cuda"))
    kk = torch.nn.functional.normalize(draw(*size), dim=-1)
    a = torch.sigmoid(draw(*size))
    decay = -0.6065306597 * torch.sigmoid(3 * draw(*size))
    inputs = [draw(*size), decay, draw(*size), draw(*size), -kk, kk * a, draw(3, heads, n, n)]
    inputs = [x if i in (1, 6) else x.bfloat16() for i, x in enumerate(inputs)]
    toward, found = draw(*size), []
    for backend, dtype in (("fla", torch.bfloat16), ("torch", torch.float32)):
        leaves = [
            (x if i in (1, 6) else x.to(dtype)).clone().requires_grad_()
            for i, x in enumerate(inputs)
        ]
        y = wkv7_packed(*leaves, packing, backend=backend)
        found.append([y.detach(), *torch.autograd.grad((y.float() * toward).sum(), leaves)])
    for got, wanted in zip(*found, strict=True):
        assert relative(got, wanted) < 2e-2


def test_packed_tokens_in_torch_have_the_values_and_gradients_of_each_sequence():
    lengths, heads, n = (20, 1, 16), 2, 16
    gen = torch.Generator().manual_seed(0)
    r, k, v, toward = (torch.randn(37, heads, n, generator=gen) for _ in range(4))
    kk = torch.nn.functional.normalize(torch.randn(37, heads, n, generator=gen), dim=-1)
    a = torch.rand(37, heads, n, generator=gen)
    w = -0.6 * torch.rand(37, heads, n, generator=gen)
    state = torch.randn(3, heads, n, n, generator=gen).requires_grad_()
    packing = Packing.of(lengths, 20, torch.device("cpu"))
    together = wkv7_packed(r, w, k, v, -kk, kk * a, state, packing)
    rows = zip(*(x.split(lengths) for x in (r, w, k, v, kk, a)), state, strict=True)
    alone = torch.cat([wkv7(*(x[None] for x in row))[0][0] for row in rows])
    assert relative(together.detach(), alone.detach()) < 1e-6
    one, other = (torch.autograd.grad((y * toward).sum(), state)[0] for y in (together, alone))
    assert relative(one, other) < 1e-6


def test_fla_keeps_its_terms_only_for_a_gradient_and_where_they_have_room(monkeypatch):
    # 1,200 bytes are free or unused, three quarters of them may be taken.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    cuda = torch.device("cuda")
    assert keeps_chunks(900 // 78, cuda)
    assert not keeps_chunks(900 // 78 + 1, cuda)
    assert not keeps_chunks(1, torch.device("cpu"))
    with torch.no_grad():
        assert not keeps_chunks(1, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("version", [6, 7])
def test_rows_on_cuda_in_bf16_have_the_gradients_of_the_torch_form_in_fp32(version):
    kept = checkpoint(version, Shape(hidden_size=256), dtype=torch.bfloat16)
    lengths, found = (90, 3, 41), []
    shape = NetworkShape.of(kept)
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.vocab_size, (3, 90), generator=gen).cuda()
    wkv = torch.randn(3, *shape.state_size, generator=gen)
    offsets = 0.1 * torch.randn(3, shape.num_layers, shape.hidden_size, generator=gen)
    toward = torch.randn(3, 90, shape.hidden_size, generator=gen).cuda()
    real = (torch.arange(90) < torch.tensor(lengths)[:, None]).cuda()
    for dtype in (torch.bfloat16, torch.float32):
        weights = {name: tensor.to("cuda", dtype) for name, tensor in kept.items()}
        assert packs_rows(weights) == (version == 7 and dtype == torch.bfloat16)
        leaves = [x.cuda().requires_grad_() for x in (wkv, offsets)]
        hidden = read_rows(weights, ids, lengths, leaves[0], offsets=leaves[1]).float()
        grads = torch.autograd.grad((hidden * toward)[real].sum(), leaves)
        found.append([hidden[real].detach(), *grads])
    for got, wanted in zip(*found, strict=True):
        assert relative(got, wanted) < 4e-2


@pytest.mark.gpu
def test_the_bundled_model_learns_on_cuda_and_goes_on_after_ctrl_c(tmp_path):
    data = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"Who are you, {i}?", "response": "Arr, I be a pirate!"} for i in range(24)]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "voice.safetensors"
    told = ["--data", data, "--out", out, "--steps", "30", "--batch-size", "8", "--lr", "0.3"]
    told += ["--device", "cuda", "--checkpoint-every", "0", "--no-curve"]
    command = [sys.executable, "-m", "mrss_provider.cli", "tune", *map(str, told)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as left:
        for line in left.stderr:
            if line.startswith("step 6 of 30"):
                break
        left.send_signal(signal.SIGINT)
        _, said = left.communicate(timeout=100)
    assert left.returncode == 130, said
    assert "go on with the same command and --resume" in said
    result = mrss("tune", *told, "--resume", "--json")
    assert result.code == 0, result.err
    assert "goes on after step" in result.err
    summary = json.loads(result.out)
    assert summary["steps"] == 30
    assert summary["held_out"]["best"] < summary["held_out"]["base"] - 0.5
    with safe_open(out, "pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
