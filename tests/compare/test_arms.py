"""The proxy's log and the report of a weighted group's arms. Oracle: simulated traffic."""

import asyncio
import json
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from arm_calls import FAILED, PAYLOAD, call, traffic, write
from test_statistics import binomial_bound

import mrss_provider.compare
from mrss_provider.compare import log_callback, sequential
from mrss_provider.compare.arms import read_arms
from mrss_provider.compare.arms_report import report_arms
from mrss_provider.compare.log_callback import LineWriter, RotatingLines, line_of, make_arm_log
from mrss_provider.errors import ConfigError, FileFormatError


def test_a_line_tells_how_it_went_and_never_what_was_said():
    line = line_of(PAYLOAD)
    assert "secret" not in json.dumps(line)
    assert line["ttft_s"] == 0.25
    assert line["total_s"] == 1.5
    assert (line["group"], line["arm"], line["error"]) == ("pirate", "arm-a", None)
    assert line_of({**PAYLOAD, "stream": False})["ttft_s"] is None
    assert line_of(FAILED)["error"] == {"type": "RateLimitError", "status": "429"}
    assert "a secret" in json.dumps(line_of(PAYLOAD, with_text=True))


def test_a_full_log_is_put_aside_and_so_many_are_kept(tmp_path):
    path = tmp_path / "calls.jsonl"
    lines = RotatingLines(path, max_bytes=30)
    for i in range(20):
        lines.append(b"%09d\n" % i)
    kept = [log_callback.aside(path, n) for n in range(log_callback.NUM_KEPT, 0, -1)] + [path]
    numbers = [int(line) for file in kept for line in file.read_bytes().split()]
    assert numbers == list(range(20 - len(numbers), 20))
    assert len(numbers) == 17
    assert all(file.stat().st_size <= 30 for file in kept)


def append(path, name):
    lines = RotatingLines(path, max_bytes=1000)
    for i in range(60):
        lines.append(json.dumps({"name": name, "i": i}).encode() + b"\n")


def test_lines_of_two_writers_stay_whole_when_the_log_is_put_aside(tmp_path):
    path = tmp_path / "calls.jsonl"
    # Each opens the lock anew, so that threads keep each other out as processes do.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(append, [path, path], "ab"))
    files = [f for f in tmp_path.iterdir() if not f.name.endswith(".lock")]
    found = [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
    assert len({(line["name"], line["i"]) for line in found}) == len(found) == 120


def test_who_logs_never_waits_for_the_disk(tmp_path):
    go = threading.Event()

    class SlowLines(RotatingLines):
        def append(self, line):
            go.wait(10)
            super().append(line)

    writer = LineWriter(SlowLines(tmp_path / "log"))
    for i in range(10):
        writer.put({"i": i})
    assert not (tmp_path / "log").exists()
    go.set()
    writer.flush()
    assert len((tmp_path / "log").read_bytes().splitlines()) == 10
    assert writer.num_dropped == 0


def test_a_line_that_cannot_be_written_keeps_no_other_from_the_log(tmp_path, caplog):
    writer = LineWriter(RotatingLines(tmp_path / "log"))
    writer.put({"response": {("no", "key", "of", "JSON"): 1}})
    writer.put({"i": 1})
    writer.flush()
    assert json.loads((tmp_path / "log").read_text()) == {"i": 1}
    assert writer.num_dropped == 1
    assert "calls are not logged: keys must be" in caplog.text


@pytest.fixture
def litellm(monkeypatch):
    """Put the one class of LiteLLM in place that the callback needs; the real one loads long."""
    module = types.ModuleType("litellm.integrations.custom_logger")
    module.CustomLogger = type("CustomLogger", (), {})
    for name in ("litellm", "litellm.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_the_callback_logs_answers_and_errors(litellm, tmp_path):
    path = tmp_path / "folder" / "calls.jsonl"
    log = make_arm_log({"MRSS_COMPARE_LOG": str(path)})
    assert isinstance(log, litellm.CustomLogger)

    async def main():
        await log.async_log_success_event({"standard_logging_object": PAYLOAD}, None, 0, 0)
        await log.async_log_failure_event({"standard_logging_object": FAILED}, None, 0, 0)
        await log.async_log_success_event({}, None, 0, 0)

    asyncio.run(main())
    log.writer.flush()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [line_of(PAYLOAD), line_of(FAILED)]


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "set MRSS_COMPARE_LOG"),
        ({"MRSS_COMPARE_LOG": "x", "MRSS_COMPARE_LOG_BYTES": "12"}, "whole number from 4096"),
        ({"MRSS_COMPARE_LOG": "x", "MRSS_COMPARE_LOG_TEXT": "yes"}, "must be 0 or 1"),
    ],
)
def test_a_callback_that_is_not_set_up_refuses_to_start(litellm, env, said):
    with pytest.raises(ConfigError, match=said):
        make_arm_log(env)


def test_the_callback_is_an_attribute_as_litellm_wants_it(litellm, monkeypatch, tmp_path):
    monkeypatch.setenv("MRSS_COMPARE_LOG", str(tmp_path / "log"))
    monkeypatch.delattr(mrss_provider.compare, "arm_log", raising=False)
    found = mrss_provider.compare.arm_log
    assert mrss_provider.compare.arm_log is found
    monkeypatch.delattr(mrss_provider.compare, "arm_log")
    with pytest.raises(AttributeError, match="no attribute 'arm_logs'"):
        _ = mrss_provider.compare.arm_logs


def test_the_faster_and_sounder_arm_is_found(tmp_path):
    rng = np.random.default_rng(4)
    lines = list(traffic(rng, 3000, slower=1.5, error_rates=(0.01, 0.15)))
    (group,) = report_arms(read_arms(write(tmp_path / "log", lines)))["groups"]
    assert {arm["arm"]: arm["num_calls"] for arm in group["arms"]} == {
        name: sum(line["arm"] == name for line in lines) for name in ("arm-a", "arm-b")
    }
    found = {c["measure"]: c for c in group["comparisons"]}
    assert found["ttft_s"]["winner"] == found["error rate"]["winner"] == "arm-a"
    assert found["ttft_s"]["low"] < 1 / 1.5 < found["ttft_s"]["high"]
    assert any("arm-a fails less often than arm-b" in verdict for verdict in group["verdicts"])


def test_equal_arms_have_no_winner_and_few_calls_say_so(tmp_path):
    rng = np.random.default_rng(5)
    log = write(tmp_path / "log", traffic(rng, 2000))
    (group,) = report_arms(read_arms(log))["groups"]
    assert {c["winner"] for c in group["comparisons"]} == {None}
    early = write(tmp_path / "early", traffic(rng, 50))
    (group,) = report_arms(read_arms(early))["groups"]
    assert any("too early to tell" in verdict for verdict in group["verdicts"])


def test_health_checks_and_cached_answers_are_not_measured(tmp_path):
    lines = [call(i, "arm-a") for i in range(3)]
    lines += [call(3, "arm-a", cache_hit=True, ttft_s=0.001), call(4, None), call(5, "x")]
    lines[-1]["group"] = None
    arms = read_arms(write(tmp_path / "log", lines))
    assert arms.num_ungrouped == 2
    (arm,) = arms.groups["pirate"].values()
    assert len(arm.calls) == 4
    assert arm.values("ttft_s") == pytest.approx([0.2] * 3)


def test_logs_that_were_put_aside_are_read_too(tmp_path):
    log = write(tmp_path / "log", [call(2, "arm-a")])
    write(tmp_path / "log.1", [call(1, "arm-a")])
    write(tmp_path / "log.2", [call(0, "arm-a")])
    (arm,) = read_arms(log).groups["pirate"].values()
    assert [line["id"] for line in arm.calls] == ["answer-0", "answer-1", "answer-2"]


def test_a_log_that_is_put_aside_while_it_is_read_is_read_once_and_whole(tmp_path, monkeypatch):
    log = write(tmp_path / "log", [call(1, "arm-a")])
    write(tmp_path / "log.1", [call(0, "arm-a")])
    was, opened = Path.open, []

    def put_aside_after_the_first(path, *args, **options):
        file = was(path, *args, **options)
        opened.append(path)
        if len(opened) == 1:
            (tmp_path / "log.1").rename(tmp_path / "log.2")
            log.rename(tmp_path / "log.1")
            write(log, [call(2, "arm-a")])
        return file

    monkeypatch.setattr(Path, "open", put_aside_after_the_first)
    (arm,) = read_arms(log).groups["pirate"].values()
    assert [line["id"] for line in arm.calls] == ["answer-0", "answer-1"]


def test_who_thinks_again_has_one_opinion_of_an_answer(tmp_path):
    log = write(tmp_path / "log", [call(0, "arm-a"), call(1, "arm-b")])
    said = [
        {"id": "answer-0", "score": score, "owner": owner}
        for owner, score in [("anne", -1.0), ("bob", 0.0), ("anne", 1.0)]
    ]
    said += [{"id": "v", "vote": "b", "models": ["arm-a", "arm-b"], "owner": "anne"}] * 3
    arms = read_arms(log, write(tmp_path / "feedback", said))
    assert sorted(arms.groups["pirate"]["arm-a"].scores) == [0.0, 1.0]
    assert arms.votes["pirate"] == [("arm-b", "arm-a", False)]


@pytest.mark.parametrize(
    "line",
    [
        {"id": "answer-0", "score": "good"},
        {"id": "answer-0", "score": 2},
        {"id": "v", "vote": "c", "models": ["arm-a", "arm-b"]},
        {"id": "v", "vote": "z", "models": ["arm-a", "arm-b"]},
        {"id": "v", "vote": "a", "models": None},
        {"id": "v", "vote": "a", "models": ["arm-a", "arm-b"], "ids": ["answer-0"]},
    ],
)
def test_feedback_that_was_edited_by_hand_is_named(tmp_path, line):
    log = write(tmp_path / "log", [call(0, "arm-a"), call(1, "arm-b")])
    with pytest.raises(FileFormatError, match="line 1: no line of /v1/feedback"):
        read_arms(log, write(tmp_path / "feedback", [line]))


def test_feedback_finds_its_answers_by_either_id_and_votes_by_name(tmp_path):
    lines = [call(i, "arm-a" if i % 2 else "arm-b") for i in range(40)]
    a, b = "mrss/arm-a-model", "arm-b"
    feedback = [{"id": f"answer-{i}", "score": 1.0 if i % 2 else -1.0} for i in range(30)]
    feedback += [{"id": "call-31", "score": 0.5}, {"id": "unknown", "score": 1.0}]
    feedback += [{"id": f"v{i}", "vote": "b", "models": [b, a]} for i in range(12)]
    feedback += [{"id": "t", "vote": "tie", "models": [a, b]}]
    feedback += [{"id": "w", "vote": "a", "models": [a, b], "ids": ["answer-1", "answer-2"]}]
    feedback += [{"id": "x", "vote": "a", "models": [a, "nobody"]}]
    arms = read_arms(write(tmp_path / "log", lines), write(tmp_path / "feedback", feedback))
    assert sum(arms.groups["pirate"]["arm-a"].scores) == 15.5
    assert arms.num_unknown == 2
    assert arms.votes["pirate"].count(("arm-a", "arm-b", False)) == 13
    (group,) = report_arms(arms)["groups"]
    winners = {c["measure"]: c["winner"] for c in group["comparisons"]}
    assert winners["votes"] == "arm-a"


@pytest.mark.parametrize("what", ["log", "feedback"])
def test_a_file_that_is_not_there_or_of_another_kind_is_named(tmp_path, what):
    log = write(tmp_path / "log", [call(0, "arm-a")])
    bad = write(tmp_path / "bad", [{"hello": 1}])
    odd = write(
        tmp_path / "odd", [{**call(0, "arm-a"), "group": ["a", "b"], "id": "x", "score": 3}]
    )
    files = {"log": log, "feedback": None, what: tmp_path / "nothing"}
    with pytest.raises(FileFormatError, match="there is no"):
        read_arms(*files.values())
    for path in (bad, odd):
        with pytest.raises(FileFormatError, match="line 1: no line of"):
            read_arms(*{**files, what: path}.values())


def leaves(intervals, truth):
    """Whether the truth was outside at any of the moments."""
    return any(not low <= truth <= high for low, high in intervals)


def looks(num):
    """Return when somebody looks who looks often: at every call, then at every fiftieth."""
    return sorted({*range(1, 100), *range(100, num + 1, 50)})


def test_proportions_hold_at_every_call_however_few():
    rng = np.random.default_rng(6)
    num_runs, outside = 15, 0
    for _ in range(num_runs):
        successes = np.cumsum(rng.random(300) < 0.1)
        outside += leaves(
            (sequential.proportion(int(successes[n - 1]), n, 0.1) for n in looks(300)), 0.1
        )
    assert outside <= binomial_bound(num_runs, 0.1)
    assert sequential.proportion(0, 0, 0.05) == (0.0, 1.0)
    low, high = sequential.proportion(500, 1000, 0.05)
    assert 0.44 < low < 0.5 < high < 0.56


def peeking_error(num_runs, num_calls, rng):
    """Return how often two equal streams were told apart by looking again and again."""
    told_apart = {"means": 0, "proportions": 0, "scores": 0, "fixed": 0}
    for _ in range(num_runs):
        a, b = (rng.lognormal(0.0, 1.0, num_calls) for _ in range(2))
        sums = [np.cumsum(x) for x in (a, b, a * a, b * b)]
        intervals = {name: [] for name in told_apart}
        for n in looks(num_calls):
            moments = []
            for total, squares in ((sums[0], sums[2]), (sums[1], sums[3])):
                mean = total[n - 1] / n
                variance = (squares[n - 1] / n - mean**2) * n / max(1, n - 1)
                moments.append(sequential.Moments(n, mean, variance))
            interval = sequential.mean_difference(*moments, 0.05)
            if interval is not None:
                intervals["means"].append(interval)
                width = 1.96 * np.sqrt(sum(m.variance / n for m in moments))
                middle = moments[0].mean - moments[1].mean
                intervals["fixed"].append((middle - width, middle + width))
            counts = [(int((x[:n] > 2).sum()), n) for x in (a, b)]
            intervals["proportions"].append(sequential.proportion_difference(*counts, 0.05))
        scores = [np.clip(np.log(x), -1, 1) for x in (a, b)]
        means = [np.cumsum(x) / np.arange(1, num_calls + 1) for x in scores]
        for n in looks(num_calls):
            # Width is all that the values decide beside their mean.
            low, high = sequential.bounded_mean([0.0] * n, 0.025)
            middle = means[0][n - 1] - means[1][n - 1]
            intervals["scores"].append((middle + 2 * low, middle + 2 * high))
        for name, of_name in intervals.items():
            told_apart[name] += leaves(of_name, 0.0)
    return told_apart


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_peeking_at_equal_arms_errs_no_more_often_than_is_said():
    found = peeking_error(300, 3000, np.random.default_rng(8))
    bound = binomial_bound(300, 0.05)
    assert max(found["means"], found["proportions"], found["scores"]) <= bound
    # What an interval of fixed size makes of the same peeking.
    assert found["fixed"] > 2 * bound


def test_intervals_become_narrow_enough_to_find_something():
    widths = []
    for num in (100, 1000, 10_000):
        moments = sequential.Moments(num, 0.0, 1.0)
        low, high = sequential.mean_difference(moments, moments, 0.05)
        widths.append((high - low) / (2 * 1.96 * np.sqrt(2 / num)))
    assert all(1.0 < width < 2.0 for width in widths)
    assert all(
        sequential.bounded_mean([0.0] * a, 0.05)[1] > sequential.bounded_mean([0.0] * b, 0.05)[1]
        for a, b in pairwise((10, 100, 1000))
    )
