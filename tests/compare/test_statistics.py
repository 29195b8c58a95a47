"""Intervals and verdicts. Oracle: simulations in which the truth is known."""

import itertools
import math
import os

import numpy as np
import pytest
from compare_fakes import make_folder, result

from mrss_provider.compare.scorers import CHECKS, checks
from mrss_provider.compare.summary import summarise

MODELS = ("a", "b", "c")


def binomial_bound(num, rate, confidence=0.999):
    """Return the number of successes in `num` trials that is exceeded with 1 - confidence."""
    total = 0.0
    for k in range(num + 1):
        total += math.comb(num, k) * rate**k * (1 - rate) ** (num - k)
        if total >= confidence:
            return k
    return num


def simulated(folder, rng, advantage=0.0):
    """Return results in which model a is `advantage` better and faster, the others are alike."""
    results = []
    for prompt in folder.prompts.prompts:
        hardness, length = rng.random(), rng.lognormal(0.0, 0.5)
        for model, seed in itertools.product(folder.settings.models, folder.settings.seeds):
            more = advantage if model == "a" else 0.0
            text = "yes" if rng.random() < hardness * (1 - more) + more else "no"
            ttft_s = 0.2 * length * rng.lognormal(0.0, 0.3) * (1 - more / 2)
            results.append(
                result(prompt.id, model, seed, text, ttft_s, step_s=0.01 * rng.lognormal(0.0, 0.2))
            )
    return results


def false_findings(folder, num_runs, seed):
    """Return in how many runs each measure found a winner; there is none to be found."""
    rng = np.random.default_rng(seed)
    found = {}
    for _ in range(num_runs):
        summary = summarise(folder, simulated(folder, rng), {CHECKS: checks})
        for name in {c.measure for c in summary.comparisons}:
            winners = [c.winner for c in summary.comparisons if c.measure == name]
            found[name] = found.get(name, 0) + any(winners)
    return found


@pytest.fixture
def folder(tmp_path):
    check = {"type": "exact", "value": "yes"}
    return make_folder(tmp_path, MODELS, num_prompts=15, seeds=(0, 1), checks=[check])


def test_the_winner_of_a_simulation_is_found_and_named(folder):
    summary = summarise(folder, simulated(folder, np.random.default_rng(1), 0.9), {CHECKS: checks})
    won = {(c.measure, c.a, c.b): c.winner for c in summary.comparisons}
    for measure in (CHECKS, "ttft_s"):
        assert (won[measure, "a", "b"], won[measure, "a", "c"]) == ("a", "a")
        assert won[measure, "b", "c"] is None
    assert any(v.startswith("checks: a is better than b: +") for v in summary.verdicts)
    assert any("no difference found between b and c" in v for v in summary.verdicts)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_in_200_runs_without_a_winner_no_more_are_found_than_is_said(folder):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = false_findings(folder, 200, seed=7)
    assert set(found) == {CHECKS, "ttft_s", "tokens_per_s", "total_s"}
    bound = binomial_bound(200, 0.05)
    assert {name: n for name, n in found.items() if n > bound} == {}


def test_in_a_few_runs_without_a_winner_hardly_any_is_found(folder):
    found = false_findings(folder, 3, seed=2)
    assert all(n <= binomial_bound(3, 0.05) for n in found.values())


def test_errors_drop_out_in_pairs_and_are_counted(folder):
    results = simulated(folder, np.random.default_rng(3))
    first = results[0]
    failed = type(first)(first.prompt, first.model, first.seed, 1.0, error={"type": "Timeout"})
    summary = summarise(folder, [failed, *results[1:]], {CHECKS: checks})
    (row,) = [row for row in summary.models if row["model"] == first.model]
    assert row["errors"] == {"Timeout": 1}
    assert row["num_answers"] == 29
    pairs = {(c.a, c.b): c.num_pairs for c in summary.comparisons if c.measure == CHECKS}
    assert pairs == {("a", "b"): 29, ("a", "c"): 29, ("b", "c"): 30}
