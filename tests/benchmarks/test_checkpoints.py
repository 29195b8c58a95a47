"""Random models as files are the random models, and rivals are named as the command line says."""

from pathlib import Path

import pytest
import torch
from checkpoints import official_tensors, write_checkpoint, write_states
from random_models import SHAPES, Shape, random_model
from rival_engines import AlbatrossFast, Rival, fla_name, fla_tensor

from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.model import load_model

TINY = {
    7: Shape(2, 128, (16, 16, 8, 24), vocab_size=320),
    6: Shape(2, 128, (16, 24), vocab_size=320, version=6),
}


@pytest.mark.parametrize("version", [6, 7])
def test_a_written_model_is_the_random_model_bit_for_bit(tmp_path: Path, version: int) -> None:
    shape = TINY[version]
    path = write_checkpoint(tmp_path / "x.pth", shape, device="cpu")
    written = load_model(path, device="cpu", dtype="fp32", packed=False, threads=1)
    drawn = random_model(shape, dtype="bf16", compute_dtype="fp32", device="cpu")
    ids, slots = torch.tensor([3, 5]), torch.tensor([0, 1])
    mine, theirs = written.new_pool(2), drawn.new_pool(2)
    for _ in range(3):
        hidden = written.decode(ids, slots, mine)
        assert torch.equal(hidden, drawn.decode(ids, slots, theirs))


def test_written_states_load_without_a_problem(tmp_path: Path) -> None:
    model = random_model(TINY[7], dtype="fp32", device="cpu")
    names = write_states(tmp_path / "states", TINY[7], 3)
    library = StateLibrary(tmp_path / "states", model.config)
    assert (sorted(library.states), library.problems) == (names, ())


def test_flas_names_are_those_that_our_loader_reads_back(tmp_path: Path) -> None:
    official = official_tensors(TINY[7], device="cpu", dtype="fp32")
    theirs = {fla_name(k): fla_tensor(k, t).contiguous() for k, t in official.items()}
    torch.save(theirs, tmp_path / "fla.pth")
    torch.save(official, tmp_path / "official.pth")
    found, expected = (
        load_model(tmp_path / f"{name}.pth", device="cpu", dtype="fp32", packed=False, threads=1)
        for name in ("fla", "official")
    )
    ids, slots = torch.tensor([7]), torch.tensor([0])
    hidden = [model.decode(ids, slots, model.new_pool(1)) for model in (found, expected)]
    assert torch.equal(*hidden)


@pytest.mark.parametrize("text", ["rwkv:x", "albatross", "other", "albatross:/nowhere"])
def test_a_rival_that_is_none_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(SystemExit, match=r"--rival .*(got|is no folder)"):
        Rival.parse(text)


def test_a_rivals_folder_says_what_it_is(tmp_path: Path) -> None:
    for name in ("faster3a_2605", "faster3a_2607"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rwkv7_fast_v3a.py").touch()
    (tmp_path / "COMMIT").write_text("abc1234\n")
    rival = Rival.parse(f"albatross:{tmp_path}")
    assert rival.version() == "abc1234"
    assert Rival.parse(str(rival)) == rival
    newest = AlbatrossFast.file(tmp_path)
    assert newest == tmp_path / "faster3a_2607/rwkv7_fast_v3a.py"
    assert AlbatrossFast.file(tmp_path / "faster3a_2605") == (
        tmp_path / "faster3a_2605/rwkv7_fast_v3a.py"
    )


def test_the_official_shapes_have_whole_heads() -> None:
    for shape in SHAPES.values():
        assert shape.num_heads * shape.head_size == shape.hidden_size
