import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from command import mrss
from tiny_model import Shape, checkpoint, tuned_state, write_model_folder, write_state

from mrss_provider.cli.states import _verdict, read_config
from mrss_provider.config import BUNDLED_STATES
from mrss_provider.model import OrientationCheck, load_model, load_tuned_state


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "states"
    folder.mkdir()
    write_state(folder / "calm.pth", seed=1)
    write_state(folder / "loud.pth", seed=2)
    (folder / "mixtures.toml").write_text('[both]\nterms = "calm+loud:0.5"\n')
    return folder


@pytest.fixture
def where(model: Path, folder: Path) -> list[str]:
    return ["--model", str(model), "--states", str(folder)]


def test_list_tells_kind_norm_and_base_of_each(where: list[str], folder: Path) -> None:
    result = mrss("states", "list", "--json", *where)
    rows = {row["name"]: row for row in map(json.loads, result.out.splitlines())}
    expected = torch.stack(list(tuned_state(seed=1).values())).norm().item()
    assert rows["calm"]["norm"] == pytest.approx(expected, abs=1e-3)
    assert (rows["calm"]["kind"], rows["calm"]["base"]) == ("state", "not said")
    assert (rows["both"]["kind"], rows["both"]["base"]) == ("mixture", "calm+loud:0.5")
    assert (result.code, result.err) == (0, "")


def test_list_tells_what_is_wrong_with_a_file(where: list[str], folder: Path) -> None:
    write_state(folder / "large.pth", Shape(num_layers=3))
    (folder / "empty.pth").write_bytes(b"")
    result = mrss("states", "list", *where)
    assert result.code == 0
    assert "large" not in result.out
    errors = dict(line.split(" cannot be used: ") for line in result.err.splitlines())
    assert "2 layers" in errors["large"] or "needs 2 of" in errors["large"]
    assert set(errors) == {"large", "empty"}


def test_show_prints_metadata_and_a_norm_a_layer(where: list[str]) -> None:
    result = mrss("states", "show", "loud", *where)
    norms = [f"{t.norm():.3g}" for t in tuned_state(seed=2).values()]
    assert f"norm of each layer: {' '.join(norms)}" in result.out
    assert "orientation: vk" in result.out


def test_show_refuses_an_unknown_name_with_the_nearest(where: list[str]) -> None:
    result = mrss("states", "show", "clam", *where)
    assert (result.code, result.out) == (1, "")
    assert "did you mean 'calm'" in result.err


def test_import_writes_our_form_with_what_was_said(
    where: list[str], folder: Path, model: Path, tmp_path: Path
) -> None:
    file = write_state(tmp_path / "from peft.pth", seed=3, offset=True)
    said = ["--group", "tone", "--bos", "--licence", "CC0-1.0", "--template", "g1"]
    result = mrss("states", "import", file, "--name", "new", *said, *where)
    assert (result.code, result.out) == (0, f"{folder / 'new.safetensors'}\n"), result.err
    config = read_config(model)
    written = load_tuned_state(folder / "new.safetensors", config, name="new", strict=True)
    read = load_tuned_state(file, config, name="new")
    assert written.sha256 == read.sha256
    metadata = written.metadata
    assert (metadata.group, metadata.bos, metadata.licence) == ("tone", True, "CC0-1.0")
    assert metadata.template == "g1"
    # The file does not say which weights it was tuned on, so neither do we.
    assert metadata.base_sha256 is None


def test_import_honours_the_orientation(where: list[str], folder: Path, tmp_path: Path) -> None:
    file = write_state(tmp_path / "x.pth", seed=3)
    for name, orientation in (("a", "vk"), ("b", "kv")):
        mrss("states", "import", file, "--name", name, "--orientation", orientation, *where)
    config = read_config(Path(where[1]))
    a, b = (load_tuned_state(folder / f"{n}.safetensors", config, name=n) for n in "ab")
    assert torch.equal(a.wkv, b.wkv.mT)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("my state", "a letter or digit and then"),
        ("base", "is the untuned model"),
        ("replicate-me", "LiteLLM would send such requests"),
        ("calm", "exists; choose another name, or replace it with --force"),
        ("both", "is a mixture of mixtures.toml"),
    ],
)
def test_import_refuses_a_name_and_tells_why(
    where: list[str], folder: Path, tmp_path: Path, name: str, reason: str
) -> None:
    before = sorted(folder.iterdir())
    file = write_state(tmp_path / "x.pth", seed=3)
    result = mrss("states", "import", file, "--name", name, *where)
    assert (result.code, result.out) == (1, "")
    assert reason in result.err
    assert sorted(folder.iterdir()) == before


def test_import_with_force_replaces_the_old_file(
    where: list[str], folder: Path, tmp_path: Path
) -> None:
    file = write_state(tmp_path / "x.pth", seed=3)
    result = mrss("states", "import", file, "--name", "calm", "--force", *where)
    assert result.code == 0, result.err
    assert (folder / "calm.safetensors").exists()
    assert not (folder / "calm.pth").exists()
    assert "cannot be used" not in mrss("states", "list", *where).err


def test_a_bad_file_leaves_nothing_behind(where: list[str], folder: Path, tmp_path: Path) -> None:
    before = sorted(folder.iterdir())
    file = write_state(tmp_path / "x.pth", Shape(num_layers=3))
    result = mrss("states", "import", file, "--name", "new", *where)
    assert (result.code, result.out) == (1, "")
    assert "needs 2 of [2, 64, 64]" in result.err
    assert sorted(folder.iterdir()) == before


def test_average_is_the_weighted_mean_of_the_tensors(
    where: list[str], folder: Path, model: Path
) -> None:
    result = mrss("states", "average", "calm:3", "loud:1", "--name", "mean", *where)
    assert result.code == 0, result.err
    mean = load_tuned_state(folder / "mean.safetensors", read_config(model), name="mean")
    calm, loud = (torch.stack(list(tuned_state(seed=i).values())) for i in (1, 2))
    torch.testing.assert_close(mean.wkv, 0.75 * calm + 0.25 * loud)


@pytest.mark.parametrize("inside", [False, True], ids=["zeros", "a state in the checkpoint"])
def test_average_takes_base_as_the_models_own_state(
    folder: Path, model: Path, tmp_path: Path, inside: bool
) -> None:
    path = tmp_path / "model.pth"
    own = tuned_state(seed=9) if inside else {}
    torch.save(checkpoint() | own, path)
    where = ["--model", path, "--states", folder]
    mrss("states", "import", folder / "calm.pth", "--name", "tone", "--group", "tone", *where)
    result = mrss("states", "average", "base:0.25", "tone:0.75", "--name", "mild", *where)
    assert result.code == 0, result.err
    mild = load_tuned_state(folder / "mild.safetensors", read_config(path), name="mild")
    calm = torch.stack(list(tuned_state(seed=1).values()))
    base = torch.stack(list(own.values())) if inside else torch.zeros_like(calm)
    torch.testing.assert_close(mild.wkv, 0.75 * calm + 0.25 * base)
    assert mild.metadata.group == "tone"


def test_show_says_that_base_has_no_file(where: list[str]) -> None:
    result = mrss("states", "show", "base", *where)
    assert (result.code, result.out) == (1, "")
    assert "'base' is the untuned model" in result.err


def test_list_names_a_file_of_sparse_tensors_and_goes_on(where: list[str], folder: Path) -> None:
    torch.save({n: t.to_sparse() for n, t in tuned_state().items()}, folder / "odd.pth")
    result = mrss("states", "list", *where)
    assert result.code == 0
    assert "calm" in result.out
    assert "odd cannot be used" in result.err


def test_average_refuses_an_unknown_state(where: list[str]) -> None:
    result = mrss("states", "average", "calm", "quiet", "--name", "mean", *where)
    assert (result.code, result.out) == (1, "")
    assert "unknown state or mixture 'quiet'" in result.err


@pytest.mark.parametrize("term", ["loud~linear", "loud~fixed", "loud@tiny"])
def test_average_refuses_what_it_would_leave_out(where: list[str], term: str) -> None:
    result = mrss("states", "average", "calm", term, "--name", "mean", *where)
    assert (result.code, result.out) == (1, "")
    assert (
        f"an average takes states and weights only, such as knowledge:0.7, got 'calm+{term}'"
        in (result.err)
    )


def test_check_scores_a_text_both_ways_and_fails_on_a_bad_file(
    where: list[str], folder: Path, model: Path, tmp_path: Path
) -> None:
    (folder / "bad.pth").write_bytes(b"nothing")
    text = tmp_path / "sample.txt"
    text.write_text("hello world, hello cat")
    result = mrss("states", "check", "--text", text, *where)
    lines = {line.split()[1].rstrip(":"): line for line in result.out.splitlines()}
    assert result.code == 1
    assert lines["bad"].startswith("FAIL")
    assert set(lines) == {"bad", "calm", "loud"}
    told = float(lines["calm"].split(" vk ")[1].split(",")[0])
    assert told == pytest.approx(_nll(model, folder / "calm.pth", text.read_text()), abs=2e-3)


@pytest.mark.parametrize(
    ("vk", "kv", "base", "told"),
    [
        (1.0, 1.5, 1.4, ""),
        (1.5, 1.0, 1.4, "looks like kv"),
        # Another text than the state is for: it does harm, and its transpose next to nothing.
        (1.4, 1.27, 1.28, "does not tell"),
        # No language of the model's: a blind guess, log(1000), is better.
        (8.5, 7.9, 8.4, "does not tell"),
        (1.0, 1.01, 1.4, "does not tell"),
    ],
)
def test_check_tells_an_orientation_only_where_the_sample_does(
    vk: float, kv: float, base: float, told: str
) -> None:
    found = OrientationCheck(assumed="vk", nll_vk=vk, nll_kv=kv, nll_base=base)
    line = _verdict(Path("x.pth"), found, math.log(1000))
    assert told in line
    assert line.startswith("warn") == (told == "looks like kv")
    assert ("does not tell" in line) == (told == "does not tell")


def test_no_bundled_state_is_told_to_be_transposed() -> None:
    result = mrss("states", "check")
    assert (result.code, result.err) == (0, "")
    marks = [line.split()[0] for line in result.out.splitlines()]
    assert marks == ["ok"] * len(list(BUNDLED_STATES.glob("*.safetensors")))


@pytest.mark.parametrize("content", [b"caf\xe9", None], ids=["latin-1", "missing"])
def test_check_refuses_a_text_that_cannot_be_read(
    where: list[str], tmp_path: Path, content: bytes | None
) -> None:
    text = tmp_path / "sample.txt"
    if content is not None:
        text.write_bytes(content)
    result = mrss("states", "check", "--text", text, *where)
    reason = "is not UTF-8 text (byte 3)" if content else "cannot be read: No such file"
    assert (result.code, result.out) == (1, "")
    assert reason in result.err
    assert len(result.err.splitlines()) == 1


def test_the_bundled_states_of_an_installation_are_not_written_to(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "_bundled" / "states"
    folder.mkdir(parents=True)
    file = write_state(tmp_path / "x.pth")
    where = ["--model", model, "--states", folder]
    result = mrss("states", "import", file, "--name", "new", *where)
    assert (result.code, result.out) == (1, "")
    assert "part of the installation" in result.err


def _nll(folder: Path, state_path: Path, text: str) -> float:
    """Score a text token by token, the plain way."""
    from mrss_provider.tokenizer import Tokenizer

    model = load_model(folder, device="cpu", dtype="auto")
    ids = Tokenizer.load(folder / "vocab.txt").encode(text)
    pool = model.new_pool(1)
    pool.write(0, load_tuned_state(state_path, model.config, name="x"))
    total = 0.0
    for now, following in itertools.pairwise(ids):
        hidden = model.decode(torch.tensor([now]), torch.tensor([0]), pool)
        total -= model.head(hidden).log_softmax(-1)[0, following].item()
    return total / (len(ids) - 1)
