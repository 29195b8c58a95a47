"""Linear layers in every form, and what the CPU is set up to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reading import relative_rms

from mrss_provider.model import cpu, linear
from mrss_provider.model.config import DTYPES

CPU = torch.device("cpu")
# Where a kernel's way of rounding changes with the number of rows: few rows, long sums, odd widths.
SHAPES = [(768, 3072), (64, 768), (768, 64), (24, 128), (500, 192)]
BOUNDS = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2}


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(weight, dtype, *, packed=True, activation="none"):
    backend = linear.pick_backend(CPU, dtype, packed=packed)
    return linear.make_linear(weight.to(DTYPES[dtype]), backend, activation)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("activation", ["none", "relu", "tanh", "sigmoid"])
def test_every_form_is_a_product_and_its_activation(dtype, packed, activation):
    weight, x = torch.randn(40, 96) / 96**0.5, torch.randn(7, 96)
    layer = make(weight, dtype, packed=packed, activation=activation)
    functions = {"none": lambda y: y, "relu": torch.relu}
    functions |= {"tanh": torch.tanh, "sigmoid": torch.sigmoid}
    wanted = functions[activation](x.double() @ weight.double().T)
    got = layer(x)
    assert got.dtype == layer.input_dtype
    assert relative_rms(got, wanted) < BOUNDS[dtype]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rows_bits_are_the_same_in_any_batch(dtype, shape, threads):
    torch.set_num_threads(threads)
    layer = make(torch.randn(shape) / shape[1] ** 0.5, dtype)
    x = torch.randn(130, shape[1])
    wanted = layer(x)
    for num_rows in (*range(1, 20), 32, 33, 37, 64, 121):
        assert torch.equal(layer(x[:num_rows]), wanted[:num_rows])
        assert torch.equal(layer(x[-num_rows:]), wanted[-num_rows:])


def test_a_sigmoids_bits_do_not_depend_on_the_elements_around_it():
    x = 4 * torch.randn(4001)
    whole = linear.sigmoid(x)
    assert torch.equal(torch.cat([linear.sigmoid(part) for part in x.split(3)]), whole)
    assert relative_rms(whole, torch.sigmoid(x.double())) < 1e-6
    edges = linear.sigmoid(torch.tensor([-1000.0, -0.0, 1000.0]))
    assert edges.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_heads_logits_are_not_rounded_to_bf16(dtype):
    backend = linear.pick_backend(CPU, dtype, packed=True)
    weight = (torch.randn(300, 96) / 96**0.5).bfloat16().to(DTYPES[dtype])
    x = torch.randn(5, 96)
    logits = linear.make_head(weight, backend)(x)
    exact_head = backend != "plain"
    assert relative_rms(logits, x.double() @ weight.double().T) < (1e-5 if exact_head else 1e-2)


def test_dtype_auto_takes_the_best_that_is_there(monkeypatch):
    for has_fbgemm, has_bf16, wanted in (
        (True, True, "fp16"),
        (False, True, "bf16"),
        (False, False, "fp32"),
    ):
        monkeypatch.setattr(linear, "_has_fbgemm", lambda value=has_fbgemm: value)
        monkeypatch.setattr(linear, "_has_onednn_bf16", lambda value=has_bf16: value)
        assert linear.pick_dtype(CPU, torch.bfloat16) == wanted
        assert linear.pick_backend(CPU, "bf16", packed=True) == ("onednn" if has_bf16 else "plain")
        assert linear.pick_backend(CPU, "fp16", packed=True) == (
            "fbgemm" if has_fbgemm else "plain"
        )
    cuda = torch.device("cuda")
    assert linear.pick_dtype(cuda, torch.bfloat16) == "bf16"
    assert linear.pick_dtype(cuda, torch.float16) == "fp16"
    assert linear.pick_backend(cuda, "fp16", packed=True) == "plain"


def test_threads_are_what_was_asked_or_all_cores_but_one(monkeypatch):
    assert cpu.configure_cpu(3) == torch.get_num_threads() == 3
    for cores, wanted in ((8, 7), (2, 1), (1, 1)):
        monkeypatch.setattr(cpu, "physical_cores", lambda value=cores: value)
        assert cpu.configure_cpu(0) == torch.get_num_threads() == wanted


def test_siblings_of_one_core_count_once(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 7})
    monkeypatch.setattr(cpu, "_siblings", lambda number: f"{number % 2},{number % 2 + 2}")
    assert cpu.physical_cores() == 2


def test_physical_cores_are_among_those_that_this_process_may_use():
    assert 1 <= cpu.physical_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.slow
def test_bits_hold_with_avx2_kernels_too():
    tests = Path(__file__).parent
    avx2 = {
        "ATEN_CPU_CAPABILITY": "avx2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-k", "bits and not kernels", str(tests)]
    result = subprocess.run(
        command, env=os.environ | avx2, cwd=tests.parent.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:]
