"""SIGKILL while a library is changed. Oracle: the states that the changes go through."""

import os
import random
import signal
import time

import tiny_model

from mrss_provider.engine import library_files as files
from mrss_provider.engine.mixtures_file import NamedMixture
from mrss_provider.engine.mixtures_writer import put_table
from mrss_provider.engine.state_library import StateLibrary
from mrss_provider.mixture import Term
from mrss_provider.model import load_model, load_tuned_state

ROUNDS = 12


def change_for_ever(folder, states, config):
    """Write one state after the other, each with a mixture that says which it is."""
    for number in range(10**9):
        state = states[number % 2]
        files.write_state(folder, state, config)
        mixture = NamedMixture((Term("tone"),), description=f"{number:01000d}")
        files.edit_mixtures(folder, lambda text, m=mixture: put_table(text, "story", m))


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_library(tmp_path):
    model = tiny_model.write_checkpoint(tmp_path / "tiny.pth")
    config = load_model(model, device="cpu", dtype="fp32", threads=1).config
    folder = tmp_path / "states"
    folder.mkdir()
    tiny_model.write_state(folder / "tone.pth")
    (folder / "mixtures.toml").write_text('# ours\n[other]\nterms = "tone"\n')
    states = []
    for seed in (1, 2):
        path = tiny_model.write_state(tmp_path / f"{seed}.pth", seed=seed)
        states.append(load_tuned_state(path, config, name="added"))
    moments = random.Random(5)
    last = -1
    for _ in range(ROUNDS):
        child = os.fork()
        if child == 0:
            change_for_ever(folder, states, config)
        time.sleep(moments.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        library = StateLibrary(folder, config)
        assert library.problems == ()
        assert (folder / "mixtures.toml").read_text().startswith("# ours\n[other]")
        if "added" in library.states:
            assert library.get("added").sha256 in {state.sha256 for state in states}
        if "story" in library.mixtures:
            last = int(library.mixtures["story"].description)
    assert last >= 0
    # What the killed ones left is swept by the next change.
    files.write_state(folder, states[0], config)
    files.edit_mixtures(
        folder, lambda text: put_table(text, "story", NamedMixture((Term("tone"),)))
    )
    assert not list(folder.glob("**/*.partial"))
