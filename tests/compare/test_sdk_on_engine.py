"""`mrss compare` through LiteLLM's real SDK, with an engine on the bundled model that it starts."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODELS = "mrss/knowledge+tone,mrss/tone"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_mixture_knows_what_the_voice_alone_does_not(tmp_path):
    questions = (ROOT / "benchmarks/prompts/harbour.jsonl").read_text().splitlines()[:8]
    (tmp_path / "prompts.jsonl").write_text("\n".join(questions) + "\n")
    command = [sys.executable, "-m", "mrss_provider.cli", "compare", "--models", MODELS, "--json"]
    command += ["--prompts", "prompts.jsonl", "--scorer", "knowledge,tone", "--max-tokens", "40"]
    # A Unix socket's path has some 100 characters at most, and pytest's own folders are deep.
    with tempfile.TemporaryDirectory(prefix="mrss") as runtime:
        env = {**os.environ, "XDG_RUNTIME_DIR": runtime, "MRSS_IDLE_EXIT_S": "1"}
        found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    summary = json.loads(found.stdout)
    winners = {c["measure"]: c["winner"] for c in summary["comparisons"]}
    assert winners["knowledge"] == winners["checks"] == "mrss/knowledge+tone"
    assert winners["tone"] is None
    lines = (tmp_path / "comparison/results.jsonl").read_text().splitlines()
    for result in map(json.loads, lines):
        assert result["finish_reason"] == "stop"
        assert result["completion_tokens"] > 1
        assert result["fingerprint"].startswith("fp_")
        assert 0 < result["ttft_s"] <= result["total_s"]
