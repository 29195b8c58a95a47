"""Asking the cells: order, bounds, what is kept, and how a comparison goes on after a kill."""

import asyncio
import itertools
import json
import os
from collections import Counter

import pytest
from compare_fakes import FULL, FakeConnection, make_folder, result, write_prompts

from mrss_provider.compare.calls import Call, Piece, ask, call_of
from mrss_provider.compare.cells import Metronome, Pace, ask_all, left_to_do, plan
from mrss_provider.compare.folder import Folder, Settings
from mrss_provider.compare.jsonl import JsonLines
from mrss_provider.compare.prompts import Prompt, read_prompts
from mrss_provider.errors import ConflictError, FileFormatError, StorageError

MODELS = ("a", "b", "c")


def run(folder, connection, concurrency=2, cells=None, on_result=lambda _: None):
    cells = plan_of(folder) if cells is None else cells
    with JsonLines(folder.results) as file:
        pace = Pace(concurrency=concurrency)
        asyncio.run(ask_all(cells, connection, folder.settings, pace, file, on_result))


def plan_of(folder):
    return plan(folder.prompts.prompts, folder.settings.models, folder.settings.seeds)


def test_models_take_turns_so_that_drift_meets_all_alike():
    prompts = [Prompt(f"p{i}", prompt="x") for i in range(9)]
    cells = plan(prompts, MODELS, (0, 1))
    assert len({cell.key for cell in cells}) == len(cells) == 54
    rounds = [cells[i : i + 3] for i in range(0, 54, 3)]
    for together in rounds:
        assert {cell.model for cell in together} == set(MODELS)
        assert len({(cell.prompt.id, cell.seed) for cell in together}) == 1
    # Each place, and each neighbour, equally often.
    orders = [tuple(cell.model for cell in together) for together in rounds]
    assert Counter(orders) == dict.fromkeys(itertools.permutations(MODELS), 3)
    many = plan(prompts, tuple("abcdef"), (0,))
    assert len({cell.key for cell in many}) == 54
    assert plan(prompts, MODELS, (0, 1)) == cells


def test_every_cell_is_asked_once_with_its_seed_and_within_the_bound(tmp_path):
    folder = make_folder(tmp_path, MODELS, num_prompts=4, seeds=(5, 6), params={"top_p": 0.5})
    connection = FakeConnection(dict.fromkeys(MODELS, "one two three"))
    run(folder, connection, concurrency=2)
    results = folder.read_results()
    assert {r.key for r in results} == {c.key for c in plan_of(folder)}
    assert connection.most_open == 2
    assert {call.seed for call in connection.calls} == {5, 6}
    assert all(call.params == {"top_p": 0.5} for call in connection.calls)
    one = results[0]
    assert one.text == "one two three "
    assert (one.finish_reason, one.prompt_tokens, one.completion_tokens) == ("stop", 3, 3)
    assert one.model_id == f"id-of-{one.model}"
    assert one.ttft_s == one.chunk_s[0]
    assert list(one.chunk_s) == sorted(one.chunk_s)
    assert one.total_s >= one.chunk_s[-1]


def test_times_are_those_of_the_clock():
    ticks = itertools.count()
    call = call_of(Prompt("p", prompt="x"), "a", 0, {}, 1.0)
    connection = FakeConnection({"a": "one two"})
    found = asyncio.run(ask(connection, call, "p", clock=lambda: float(next(ticks))))
    assert (found.ttft_s, found.chunk_s, found.total_s) == (1.0, (1.0, 2.0), 3.0)
    assert found.tokens_per_s == 0.5


def test_an_answer_that_goes_on_for_too_long_is_an_error_with_what_came():
    class Endless:
        async def stream(self, call):
            yield Piece(text="On")
            await asyncio.Event().wait()

    found = asyncio.run(ask(Endless(), Call("a", prompt="x", timeout_s=0.01), "p0"))
    assert (found.text, found.error["type"]) == ("On", "Timeout")
    assert "within 0.01 s" in found.error["message"]


def test_an_error_is_a_result_and_is_asked_again_only_if_wanted(tmp_path):
    folder = make_folder(tmp_path, ("a", "b"), num_prompts=2)
    run(folder, FakeConnection({"a": "fine", "b": FULL}))
    results = folder.read_results()
    failed = [r for r in results if r.error is not None]
    assert {r.model for r in failed} == {"b"}
    assert failed[0].error == {"type": "RateLimitError", "message": str(FULL), "status": 429}
    cells = plan_of(folder)
    assert left_to_do(cells, results, retry_errors=False) == []
    again = left_to_do(cells, results, retry_errors=True)
    assert {cell.model for cell in again} == {"b"}
    run(folder, FakeConnection({"b": "fine now"}), cells=again)
    assert all(r.error is None for r in folder.read_results())
    assert len(folder.results.read_bytes().splitlines()) == 6


def test_what_a_kill_tore_is_asked_again_and_nothing_else(tmp_path):
    folder = make_folder(tmp_path, ("a", "b"), num_prompts=3)
    answers = dict.fromkeys("ab", "fine")
    run(folder, FakeConnection(answers))
    whole = folder.results.read_bytes()
    lines = whole.splitlines(keepends=True)
    folder.results.write_bytes(b"".join(lines[:3]) + lines[3][:25])
    assert len(folder.read_results()) == 3
    left = left_to_do(plan_of(folder), folder.read_results(), retry_errors=False)
    connection = FakeConnection(answers)
    run(folder, connection, cells=left)
    assert len(connection.calls) == 3
    assert folder.results.read_bytes().startswith(b"".join(lines[:3]))
    assert {r.key for r in folder.read_results()} == {c.key for c in plan_of(folder)}


def test_cancelling_keeps_whole_lines(tmp_path):
    folder = make_folder(tmp_path, ("a", "b"), num_prompts=20)
    done = []

    async def main():
        with JsonLines(folder.results) as file:
            asking = asyncio.create_task(
                ask_all(
                    plan_of(folder),
                    FakeConnection(dict.fromkeys("ab", "fine")),
                    folder.settings,
                    Pace(concurrency=3),
                    file,
                    lambda r: (done.append(r), len(done) == 5 and asking.cancel()),
                )
            )
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(main())
    assert folder.results.read_bytes().endswith(b"\n")
    kept = {r.key for r in folder.read_results()}
    assert {r.key for r in done} <= kept
    assert len(kept) < 40


def test_a_full_disk_is_one_error_and_the_comparison_goes_on_later(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, ("a", "b"), num_prompts=4)
    connection = FakeConnection({"a": "one", "b": "two"})
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:-9]))
        with pytest.raises(StorageError, match=r"results\.jsonl cannot be written: No space left"):
            run(folder, connection)
    run(folder, connection)
    assert {r.key for r in folder.read_results()} == {c.key for c in plan_of(folder)}


def test_another_comparison_does_not_go_on_in_the_folder(tmp_path):
    folder = make_folder(tmp_path, ("a", "b"))
    prompts = tmp_path / "prompts.jsonl"
    sha256 = folder.settings.prompts_sha256
    with pytest.raises(ConflictError, match="whose models were a,b, now a,c; choose another --out"):
        Folder.begin(folder.path, Settings(("a", "c"), (0,), prompts_sha256=sha256), prompts)
    write_prompts(prompts, 4)
    changed = Settings(("a", "b"), (0,), prompts_sha256=read_prompts(prompts).sha256)
    with pytest.raises(ConflictError, match="prompt file was another"):
        Folder.begin(folder.path, changed, prompts)
    write_prompts(folder.path / "prompts.jsonl", 4)
    with pytest.raises(FileFormatError, match="was changed since the comparison began"):
        Folder.open(folder.path)


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "results.jsonl"
    with JsonLines(path), pytest.raises(ConflictError, match="being written by another"):
        JsonLines(path)


WHOLE = {"prompt": "p0", "model": "a", "seed": 0, "started": 1.0, "total_s": 1.0}


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "p0"}',
        "3",
        "{",
        json.dumps({**WHOLE, "text": None}),
        json.dumps({**WHOLE, "prompt": ["p0"]}),
        json.dumps({**WHOLE, "total_s": "1"}),
        json.dumps({**WHOLE, "chunk_s": ["soon"]}),
        json.dumps({**WHOLE, "error": {"message": "x"}}),
        json.dumps({**WHOLE, "seed": 7}),
    ],
)
def test_a_line_that_is_no_result_is_named(tmp_path, line):
    folder = make_folder(tmp_path, ("a", "b"))
    with JsonLines(folder.results) as file:
        file.append(result("p0", "a").to_dict())
    with folder.results.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FileFormatError, match="line 2"):
        folder.read_results()


def test_a_result_comes_back_as_it_was_written(tmp_path):
    folder = make_folder(tmp_path, ("a", "b"))
    written = result(
        "p1", "b", 0, text="half \ud83d and\nlines\u2028", cost=0.25, ttft_s=0.5, step_s=0.25
    )
    with JsonLines(folder.results) as file:
        file.append(written.to_dict())
    assert folder.read_results() == [written]


def test_calls_begin_at_the_rate_and_not_faster():
    now, slept = [10.0], []

    async def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    async def main():
        metronome = Metronome(4.0, clock=lambda: now[0], sleep=sleep)
        begun = []
        for _ in range(4):
            await metronome.beat()
            begun.append(now[0])
        now[0] += 100.0
        await metronome.beat()
        begun.append(now[0])
        return begun

    assert asyncio.run(main()) == [10.0, 10.25, 10.5, 10.75, 110.75]
    assert slept == [0.25, 0.25, 0.25]
