"""`mrss compare` as it is typed, with a connection that has no network."""

import json
import resource
import signal

import numpy as np
import pytest
from arm_calls import traffic, write
from command import mrss
from compare_fakes import FULL, FakeConnection, write_prompts

from mrss_provider.cli import compare_jobs, compare_vote
from mrss_provider.compare.calls import CallError


@pytest.fixture
def connect(monkeypatch):
    """Return what puts a connection in place, and hands it back."""

    def put(answers):
        connection = FakeConnection(answers)
        monkeypatch.setattr(compare_jobs, "_connection", lambda asking: connection)
        return connection

    return put


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check = {"type": "contains", "value": "right"}
    write_prompts(tmp_path / "prompts.jsonl", 8, checks=[check])
    return tmp_path


RUN = ("compare", "--models", "good,bad", "--prompts", "prompts.jsonl", "--seeds", 3)


def test_the_winner_is_named_and_files_are_there(folder, connect):
    connection = connect({"good": "all right", "bad": "all wrong"})
    found = mrss(*RUN, "--max-tokens", 9, "--params", '{"top_k": 3}')
    assert found.code == 0, found.err
    assert "checks: good is better than bad: +1 [+1, +1], 95 %, 8 prompts" in found.out
    assert connection.is_closed
    # A word for each of the models first, and every cell once.
    asked = connection.calls
    assert [call.params["max_tokens"] for call in asked[:2]] == [1, 1]
    assert len(asked) == 2 + 48
    assert all(call.params == {"top_k": 3, "max_tokens": 9} for call in asked[2:])
    summary = json.loads((folder / "comparison/summary.json").read_text())
    assert summary["num_done"] == summary["num_cells"] == 48
    assert "good" in (folder / "comparison/report.html").read_text()
    lines = (folder / "comparison/results.jsonl").read_text().splitlines()
    assert {json.loads(line)["model"] for line in lines} == {"good", "bad"}


def test_the_same_command_goes_on_and_asks_nothing_twice(folder, connect):
    connect({"good": "right", "bad": "wrong"})
    mrss(*RUN)
    results = folder / "comparison/results.jsonl"
    whole = results.read_bytes()
    results.write_bytes(whole[: len(whole) // 2])
    connection = connect({"good": "right", "bad": "wrong"})
    found = mrss(*RUN, "--no-warm-up", "--json")
    assert "of 48 cells are done; going on" in found.err
    assert 0 < len(connection.calls) < 48
    assert json.loads(found.out)["num_done"] == 48
    connection = connect({})
    assert mrss(*RUN).code == 0
    assert connection.calls == []


def test_ctrl_c_keeps_what_came_and_exits_with_130(folder, connect):
    left = iter(range(9))

    def until_stopped(call):
        if next(left, None) is None:
            signal.raise_signal(signal.SIGINT)
        return "right"

    connect({"good": until_stopped, "bad": until_stopped})
    found = mrss(*RUN, "--no-warm-up", "--concurrency", 1)
    assert found.code == 130
    assert "stopped with 9 of 48 cells; the same command goes on" in found.err
    connect({"good": "right", "bad": "right"})
    assert mrss(*RUN).code == 0


def test_failures_are_in_the_exit_status_and_can_be_asked_again(folder, connect):
    connect({"good": "right", "bad": FULL})
    found = mrss(*RUN)
    assert found.code == 3
    assert "failed: bad on p" in found.err
    assert "RateLimitError: the queue is full" in found.err
    connect({"good": "right", "bad": "right"})
    assert mrss(*RUN).code == 3
    assert mrss(*RUN, "--retry-errors").code == 0
    connect({"good": FULL, "bad": FULL})
    assert mrss(*RUN, "--out", "other").code == 1


def test_a_judge_is_asked_and_votes_are_counted(folder, connect, monkeypatch):
    def judge(call):
        is_first = "[Answer A]\nall right" in call.messages[0]["content"]
        return f"verdict: {'A' if is_first else 'B'}"

    connect({"good": "all right", "bad": "all wrong", "judge": judge})
    found = mrss(*RUN[:-2], "--judge", "judge")
    assert "judge judge: good is preferred to bad: +1 [+1, +1]" in found.out
    assert "judge judge: 16 verdicts, 0 could not be read, 0 failed, 0 comparisons" in found.out

    voted = mrss("compare", "vote", "comparison", stdin="a\nx\nt\nq\n")
    assert voted.code == 0, voted.err
    assert "good" not in voted.out + voted.err
    assert "'x' is none of a, b, t and q" in voted.err
    assert len((folder / "comparison/votes.jsonl").read_text().splitlines()) == 2
    rest = mrss("compare", "vote", "comparison", stdin="b\n" * 6)
    assert "1 of 6" in rest.out
    again = mrss("compare", "vote", "comparison")
    assert again.code == 1
    assert "nothing left for 'me' to vote on" in again.err
    reported = mrss("compare", "report", "comparison")
    assert "votes: " in reported.out
    assert "judge judge: 16 verdicts" in reported.out


LIVE = ("compare", "--models", "a,b", "--live", "Hi?")


def test_two_answers_stream_side_by_side(connect):
    connection = connect({"a": "one two", "b": "three"})
    found = mrss(*LIVE, "--first-seed", 4)
    assert found.code == 0, found.err
    assert "[a] stop, first text after" in found.out
    assert "one two" in found.out
    assert "three" in found.out
    assert {call.seed for call in connection.calls} == {4}
    assert connection.most_open == 2
    assert len(connection.calls) == 4


def test_live_failures_are_in_the_exit_status(connect):
    connect({"a": "one two", "b": FULL})
    found = mrss(*LIVE)
    assert found.code == 3
    assert "one two" in found.out
    assert "[b] RateLimitError: the queue is full" in found.out
    connect({"a": FULL, "b": FULL})
    found = mrss(*LIVE)
    assert found.code == 1
    assert "no model answered" in found.err


def test_panes_are_drawn_within_the_terminal():
    import io

    from rich.console import Console

    from mrss_provider.cli.compare_live import Panes
    from mrss_provider.compare.calls import Piece

    panes = Panes(["first", "second"])
    panes.taker(0)(Piece(text="[bold]word[/] \x1b[2J " * 400))
    console = Console(file=io.StringIO(), width=60, height=12, force_terminal=False)
    console.print(panes.table(console))
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= 12
    assert all(len(line) <= 60 for line in lines)
    assert "[bold]word[/]" in console.file.getvalue()
    assert "\x1b" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--prompts", "prompts.jsonl"), "give --models"),
        (("--models", "a"), "at least two"),
        (("--models", "a,b,a"), "names 'a' twice"),
        (("--models", "a,b"), "give --prompts"),
        (("--models", "a,b", "--prompts", "prompts.jsonl", "--params", "[]"), "JSON object"),
        (("--models", "a,b", "--prompts", "prompts.jsonl", "--params", '{"n": 2}'), "'n'"),
        ((*RUN[1:], "--params", '{"top_p": [NaN]}'), "params may not hold NaN or infinity"),
        ((*RUN[1:], "--temperature", "nan"), "--temperature must be a finite number, got nan"),
        (("--models", "a,b,c,d,e", "--live", "x"), "2 to 4 models"),
        (("--models", "a,b", "--live", "x", "--json"), "leave --json out"),
        (("--models", "a,b", "--live", "x", "--seeds", "1"), "leave --seeds out"),
        (("--models", "a,b", "--live", "x", "--judge", "m"), "leave --judge out"),
        (("--models", "a,b", "report", "x"), "do not go with 'report'"),
        (("--judge", "m", "report", "x"), "do not go with 'report'"),
        (("--out", "x", "vote", "x"), "do not go with 'vote'"),
        (("report",), "give the folder"),
        (("report", "x", "--from-log", "y"), "give the folder"),
        (("report", "--from-log", "y", "--judge", "m"), "of a comparison, not of a log"),
        (("report", "x", "--group", "g"), "go with --from-log"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(folder, connect, args, said):
    connection = connect({})
    found = mrss("compare", *args)
    assert found.code == 2
    assert said in " ".join(found.err.replace("│", " ").split())
    assert connection.calls == []
    assert not (folder / "comparison").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--models", "a,b", "--prompts", "nothing.jsonl"), "No such file"),
        ((*RUN[1:], "--base-url", "localhost:4000"), "--base-url must be http://host:port"),
        ((*RUN[1:], "--scorer", "taste"), "must be knowledge, tone"),
        (("report", "nowhere"), "nowhere holds no comparison"),
        (("vote", "nowhere"), "nowhere holds no comparison"),
        (("report", "--from-log", "nothing"), "there is no nothing"),
    ],
)
def test_what_is_not_there_is_one_sentence(folder, connect, args, said):
    found = mrss("compare", *args)
    assert found.code == 1
    assert found.err.startswith("error: ")
    assert said in found.err
    assert not (folder / "comparison").exists()


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("prompts.jsonl", "--out must be a folder, and prompts.jsonl is a file"),
        ("prompts.jsonl/x", "prompts.jsonl/x: no folder can be made there (Not a directory)"),
    ],
)
def test_what_is_no_folder_is_told_before_anybody_is_asked(folder, connect, out, said):
    connection = connect({})
    found = mrss(*RUN, "--out", out)
    assert (found.code, connection.calls) == (1, [])
    assert said in found.err


@pytest.mark.parametrize("name", ["results.jsonl", "report.html", "prompts.jsonl"])
def test_files_of_somebody_else_are_not_written_over(folder, connect, name):
    connection = connect({})
    (folder / "own").mkdir()
    (folder / "own" / name).write_text("my only copy")
    found = mrss(*RUN, "--out", "own")
    assert (found.code, connection.calls) == (1, [])
    assert f"own holds no comparison, and has {name}, which would be written over" in found.err
    assert [path.name for path in (folder / "own").iterdir()] == [name]
    assert (folder / "own" / name).read_text() == "my only copy"


def test_a_full_disk_is_told_with_the_file_and_the_same_command_runs_when_there_is_room(
    folder, connect
):
    connection = connect({"good": "right", "bad": "wrong"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        found = mrss(*RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (found.code, connection.calls) == (1, [])
    assert "comparison/prompts.jsonl" in found.err
    assert mrss(*RUN).code == 0


def test_a_comparison_may_be_kept_beside_its_own_prompts(folder, connect):
    connect({"good": "all right", "bad": "all wrong"})
    assert mrss(*RUN, "--out", ".").code == 0
    assert (folder / "results.jsonl").exists()


def test_an_error_of_several_lines_is_told_in_one(folder, connect):
    connect({"good": "right", "bad": CallError("BadRequest", "no such model\n Learn\tmore")})
    found = mrss(*RUN)
    assert found.code == 3
    assert "seed 0: BadRequest: no such model Learn more\n" in found.err


def test_an_empty_log_is_said_to_be_empty(folder):
    (folder / "calls.jsonl").touch()
    found = mrss("compare", "report", "--from-log", "calls.jsonl")
    assert (found.code, found.out) == (1, "")
    assert "calls.jsonl holds no call of a weighted group yet" in found.err


def test_a_log_is_reported_by_arms(folder):
    log = write(folder / "calls.jsonl", traffic(np.random.default_rng(1), 600, slower=3.0))
    found = mrss("compare", "report", "--from-log", log)
    assert found.code == 0, found.err
    assert found.out.startswith("pirate\narm ")
    assert "ttft_s: arm-a is sooner than arm-b (arm-a to arm-b 0.3" in found.out
    assert "hold at all times at once" in found.out
    assert mrss("compare", "report", "--from-log", log, "--group", "x").code == 1
    as_json = json.loads(mrss("compare", "report", "--from-log", log, "--json").out)
    assert as_json["groups"][0]["num_calls"] == 600


def test_a_voter_must_have_a_name():
    with pytest.raises(compare_vote.CommandError, match="1 to 64"):
        compare_vote.vote(None, "")
