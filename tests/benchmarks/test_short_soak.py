"""The soak in short, on a tiny model: everything that clients do, and nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import write_model_folder, write_state

SOAK = Path(__file__).parents[2] / "benchmarks/soak.py"
KINDS = {"answered", "cancelled", "checked", "killed", "left", "read slowly", "refused", "talked"}


@pytest.mark.slow
def test_a_short_soak_ends_as_it_should(tmp_path):
    states = tmp_path / "states"
    states.mkdir()
    for seed, name in enumerate(("knowledge", "tone")):
        write_state(states / f"{name}.pth", seed=seed)
    model = write_model_folder(tmp_path / "model")
    out = tmp_path / "soak.jsonl"
    command = [sys.executable, SOAK, "--model", model, "--states", states, "--out", out]
    command += ["--minutes", "0.05", "--clients", "6", "--kill-every-s", "1", "--pause-s", "0.05"]
    soak = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert soak.returncode == 0, soak.stdout + soak.stderr
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["faults"] == []
    assert set(line["ends"]) >= KINDS
    assert line["requests"] > 50
