"""An evaluation finds what is in answers, goes on where it stopped, and shows text as text."""

import asyncio
import errno
import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from command import mrss
from fakes import FakeBackend, text

from mrss_provider.backend import Delta, TokenLogprob
from mrss_provider.cli import evaluate as evaluate_command
from mrss_provider.cli.states import read_config
from mrss_provider.config import BUNDLED_STATES, DEMO_MODEL, EngineConfig
from mrss_provider.errors import FileFormatError, InvalidRequestError
from mrss_provider.evaluate.asking import T1, TOP_P, Asker
from mrss_provider.evaluate.evaluation import evaluate_pair, pooled
from mrss_provider.evaluate.measuring import QUICK, Journal, Measurer, Plan
from mrss_provider.evaluate.report import report_page
from mrss_provider.evaluate.run import Job, run
from mrss_provider.evaluate.systems import DEFAULT, Pair, compared, digest_of, make_folder
from mrss_provider.evaluate.task import WorldTask

FACT_OF = {}


class Watched(WorldTask):
    """Notes which fact each question asks for."""

    def questions(self, part, samples, **options):
        asked = super().questions(part, samples, **options)
        FACT_OF.update({q.messages[-1].content: q.fact for q in asked})
        return asked


TASK = Watched(facts=6)
PLAN = Plan(
    samples=2,
    dev_samples=1,
    decodings=(T1, TOP_P),
    turns=(0, 2),
    temperatures=(0.5,),
    curves=("linear~fixed",),
)
KEPT = Path(__file__).parents[2] / "benchmarks/results/evaluation.json"
PAIR = Pair(BUNDLED_STATES, "knowledge", "tone")
SYSTEMS = compared(PAIR, ["joint"], is_quick=True)
ROWS = {**{system.model: 2 for system in SYSTEMS}, "knowledge+tone": 3}


def toned(fact):
    return next(g.text for g in TASK.given_answers("test", seed=1, toned=True) if g.fact == fact)


def script(request):
    """The mixture says the fact in the voice, the others something else; `<b>` in every answer."""
    if request.given is not None:
        nats = 0.5 if request.model == "knowledge+tone" else 2.0
        tokens = [piece.encode() for piece in request.given.split(" ")]
        return [
            Delta(
                text=request.given,
                num_tokens=len(tokens),
                logprobs=tuple(TokenLogprob(1, token, -nats) for token in tokens),
            )
        ]
    fact = FACT_OF.get(request.messages[-1].content)
    if request.model == "knowledge+tone" and fact is not None and fact % 2:
        return [text(toned(fact))]
    return [text("<b>I did not understand that.</b>")]


class AnyName(FakeBackend):
    """Knows every name."""

    def __init__(self):
        super().__init__(script)

    async def open(self, request):
        self.cards = [type(self.cards[0])(name, "state") for name in _names(request.model)]
        return await super().open(request)


def _names(model):
    terms = model.partition("~")[0].split("+")
    return [term.partition(":")[0] for term in terms]


def evaluate(journal, backend=None):
    backend = backend or AnyName()
    measurer = Measurer(TASK, Asker(backend), PLAN, journal)
    return asyncio.run(evaluate_pair(measurer, TASK, PAIR, SYSTEMS, PLAN, ROWS))


@pytest.fixture(scope="module")
def found():
    return evaluate(Journal(None, {}))


def test_the_default_has_what_its_answers_have_and_the_others_have_not(found):
    by_name = {system["name"]: system for system in found.systems}
    assert by_name[DEFAULT]["both"] == 1.0
    assert by_name[DEFAULT]["rows"] == 3
    assert by_name[DEFAULT]["nll"] == pytest.approx(0.5)
    assert by_name["tone alone"]["both"] == 0.0
    assert by_name["joint"]["trained_on_both"]
    assert by_name["linear, best fixed weights"]["rows"] == 2
    assert found.gains["T=1"]["base"]["gain"][0] == 1.0
    # The knowledge state alone knows nothing here.
    assert found.works is False
    assert any(text.startswith("N5") for text in found.negatives)


def test_pooled_pairs_keep_the_answers_about_one_fact_together(found):
    (default, *_) = pooled([found, found], seed=0)
    assert (default["name"], default["both"]) == (DEFAULT, 1.0)
    assert default["both_by_pair"] == [1.0, 1.0]
    assert pooled([found], seed=0) is found.systems


def test_a_run_goes_on_where_it_stopped_and_says_the_same(tmp_path, found):
    path = tmp_path / "answers.jsonl"
    whole = AnyName()
    assert evaluate(Journal(path, {"seed": 1}), whole).to_json() == found.to_json()
    lines = path.read_text().splitlines()
    # A kill in the middle of a line.
    path.write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])
    backend = AnyName()
    assert evaluate(Journal(path, {"seed": 1}), backend).to_json() == found.to_json()
    assert 0 < len(backend.requests) < len(whole.requests)
    silent = AnyName()
    assert evaluate(Journal(path, {"seed": 1}), silent).to_json() == found.to_json()
    assert silent.requests == []


def test_the_answers_of_another_run_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    Journal(path, {"seed": 1})
    with pytest.raises(InvalidRequestError, match="of another evaluation"):
        Journal(path, {"seed": 2})


def test_what_a_model_wrote_is_text_in_the_page(found):
    report = {
        "model": "<i>demo</i>",
        "task": "a task",
        "facts": 6,
        "tone_accuracy": 0.9,
        "quick": False,
        "samples": 2,
        "seed": 5,
        "model_fingerprint": "0" * 64,
        "works": found.works,
        "systems": found.systems,
        "pairs": [json.loads(json.dumps(found.to_json()))],
    }
    page = report_page(report)
    assert "<b>" not in page
    assert "<i>demo" not in page
    assert "&lt;b&gt;I did not understand that." in page
    assert "<script" not in page
    assert "http:" not in page.replace("http-equiv", "")


def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("my own notes\nwithout an end")
    with pytest.raises(FileFormatError, match="not what mrss evaluate writes"):
        Journal(path, {"seed": 1})
    assert path.read_text() == "my own notes\nwithout an end"


def test_a_states_name_that_a_baseline_has_is_refused(tmp_path):
    for name in ("average", "tone"):
        (tmp_path / f"{name}.safetensors").touch()
    with pytest.raises(InvalidRequestError, match="'average' is that of a baseline"):
        make_folder(Pair(tmp_path, "average", "tone"), None, tmp_path, None)


def test_the_same_files_are_the_same_evaluation_and_others_are_not(tmp_path):
    model = read_config(DEMO_MODEL)
    digests = []
    for number in range(3):
        own, into = tmp_path / f"own{number}", tmp_path / f"into{number}"
        for folder in (own, into):
            folder.mkdir()
        for name in ("knowledge", "tone"):
            # The third pair has the voice for its knowledge.
            other = "tone" if number == 2 else name
            shutil.copy(BUNDLED_STATES / f"{other}.safetensors", own / f"{name}.safetensors")
        assert make_folder(Pair(own, "knowledge", "tone"), None, into, model) == []
        digests.append(digest_of(into))
    assert digests[0] == digests[1] != digests[2]


def test_a_folder_without_baselines_is_refused(tmp_path):
    with pytest.raises(InvalidRequestError, match="there are no states in"):
        make_folder(PAIR, tmp_path / "nowhere", tmp_path, None)


def test_another_model_needs_questions_of_its_own(tmp_path):
    shutil.copy(DEMO_MODEL / "model.safetensors", tmp_path)
    result = mrss("evaluate", "--model", tmp_path)
    assert result.code == 1
    assert "--knowledge-data" in result.err


def test_a_model_with_the_bundled_vocabulary_is_asked_the_bundled_questions(tmp_path):
    for name in ("model.safetensors", "vocab.txt"):
        shutil.copy(DEMO_MODEL / name, tmp_path)
    command = ("evaluate", "--model", tmp_path, "--pair", tmp_path)
    result = mrss(*command)
    assert result.code == 1
    assert "has no state 'knowledge'" in result.err
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("1448 'elsewhere' 9\n")
    assert "another vocabulary" in mrss(*command).err


def test_a_model_that_is_not_there_is_said_to_be_so(tmp_path):
    result = mrss("evaluate", "--model", tmp_path / "nowhere")
    assert result.code == 1
    assert "nowhere" in result.err
    assert "--knowledge-data" not in result.err


def test_a_folder_that_another_run_writes_into_is_refused(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    result = mrss("evaluate", "--quick", "--out", tmp_path)
    os.close(folder)
    assert result.code == 1
    assert "another mrss evaluate writes into" in result.err
    assert list(tmp_path.iterdir()) == []


def make_file(path):
    path.touch()
    return path, "--out must be a folder, and {} is a file"


def make_below_file(path):
    path.touch()
    return path / "x", "--out {}: no folder can be made there (Not a directory)"


def make_closed(path):
    path.mkdir()
    return path, "--out {}: nothing can be written into this folder"


def make_taken(path):
    (path / "report.html").mkdir(parents=True)
    return path, "{}/report.html is not what mrss evaluate wrote"


def make_foreign(path):
    path.mkdir()
    (path / "report.json").write_text("my only copy")
    return path, "{}/report.json is not what mrss evaluate wrote"


@pytest.mark.parametrize(
    "make", [make_file, make_below_file, make_closed, make_taken, make_foreign]
)
def test_a_folder_that_cannot_be_written_into_is_refused_before_any_work(
    tmp_path, monkeypatch, make
):
    out, says = make(tmp_path / "out")
    if make is make_closed:
        # Whoever runs the tests may be allowed everything.
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr(evaluate_command, "run", lambda *_, **__: pytest.fail("it has begun"))
    before = sorted(tmp_path.rglob("*"))
    result = mrss("evaluate", "--quick", "--out", out)
    assert result.code == 1
    assert result.err.startswith("error: " + says.format(out))
    assert result.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_measured_is_told_before_a_full_disk_is(tmp_path, monkeypatch):
    report = json.loads(KEPT.read_text(encoding="utf-8"))
    monkeypatch.setattr(evaluate_command, "run", lambda *_, **__: report)

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate_command, "write_whole", full)
    result = mrss("evaluate", "--out", tmp_path / "new/deep")
    assert result.code == 1
    assert "mixture-default" in result.out
    assert "report.json cannot be written (No space left on device)" in result.err
    assert "the answers are kept" in result.err


def test_a_file_of_somebody_else_is_left_as_it_is(tmp_path):
    path = tmp_path / "answers-0.jsonl"
    path.write_text("my only copy, in one line")
    with pytest.raises(FileFormatError, match="not what mrss evaluate writes"):
        Journal(path, {"format": 1})
    assert path.read_text() == "my only copy, in one line"


def test_both_files_go_together():
    result = mrss("evaluate", "--tone-data", "x.jsonl")
    assert result.code == 2
    assert "go together" in result.err


def test_a_folder_that_nothing_would_be_read_from_is_refused():
    result = mrss("evaluate", "--pair", "one", "--states", "other")
    assert result.code == 2
    assert "leave --states out" in " ".join(result.err.replace("│", " ").split())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pairs_that_are_measured_at_once_say_the_same_as_one_after_the_other(tmp_path):
    for name, copied in (("knowledge", "long-ferry"), ("tone", "tone")):
        shutil.copy(BUNDLED_STATES / f"{copied}.safetensors", tmp_path / f"{name}.safetensors")
    pairs = [PAIR, Pair(tmp_path, "knowledge", "tone")]
    config = EngineConfig(device="cpu", threads=1)
    plan = replace(QUICK, samples=1)
    job = Job(
        config,
        read_config(DEMO_MODEL),
        WorldTask(facts=3),
        pairs,
        (),
        plan,
        is_quick=True,
        out=None,
    )
    at_once, one_by_one = run(job, num_processes=2), run(job)
    first, second = at_once["pairs"]
    assert first["systems"] != second["systems"]
    assert json.dumps(at_once) == json.dumps(one_by_one)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_bundled_states_have_both_at_once(tmp_path):
    result = mrss("evaluate", "--quick", "--json", "--out", tmp_path)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    by_name = {system["name"]: system for system in report["systems"]}
    assert by_name[DEFAULT]["both"] >= 0.8
    assert by_name["linear, fixed"]["both"] < by_name[DEFAULT]["both"]
    assert (tmp_path / "report.html").stat().st_size > 10_000
