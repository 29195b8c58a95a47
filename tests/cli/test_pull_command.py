import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, serve

from mrss_provider.async_engine.card import read_card
from mrss_provider.cli import pull
from mrss_provider.cli.output import CommandError
from mrss_provider.cli.pull import ALIASES, RemoteFile, choose

_MB = 1 << 20
_LARGE = bytes(4 * _MB)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    repos = {
        "BlinkDL/rwkv7-g1": {
            "README.md": b"hello",
            "rwkv7-g1-0.1b-20250307-ctx4096.pth": b"old",
            "rwkv7-g1d-0.1b-20260129-ctx8192.pth": b"new",
            "rwkv7-g1d-0.4b-20260210-ctx8192.pth": b"0.4b",
        },
        "fla-hub/rwkv7-0.1B-g1": {
            "model.safetensors": b"weights",
            "rwkv_vocab_v20230424.txt": b"vocab",
            "config.json": b"{}",
        },
        "some/large": {"large.pth": _LARGE},
    }
    with serve(FakeHub(repos)) as running:
        yield running


def _start(hub_url: str, *args: str, cwd: Path) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(cwd / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mrss_provider.cli", "pull", *args],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _pull(hub_url: str, *args: str, cwd: Path) -> tuple[int, str, str]:
    process = _start(hub_url, *args, cwd=cwd)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.slow
def test_an_alias_fetches_the_newest_file_and_prints_its_path(hub: FakeHub, tmp_path: Path) -> None:
    code, out, err = _pull(hub.url, "rwkv7-g1-0.1b", "--to", "here", cwd=tmp_path)
    name = "rwkv7-g1d-0.1b-20260129-ctx8192"
    assert (code, out) == (0, f"here/{name}\n"), err
    assert (tmp_path / "here" / name / f"{name}.pth").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("repo", "template", "context"),
    [
        pytest.param("rwkv7-g1-0.1b", "g1", 8192, marks=pytest.mark.slow),
        ("fla-hub/rwkv7-0.1B-g1", "g1", 0),
        pytest.param("some/large", "world", 0, marks=pytest.mark.slow),
    ],
)
def test_the_card_names_the_chat_template_and_is_never_replaced(
    hub: FakeHub, tmp_path: Path, repo: str, template: str, context: int
) -> None:
    _, out, _ = _pull(hub.url, repo, cwd=tmp_path)
    card = read_card(tmp_path / out.strip())
    assert (card.template, card.context_length) == (template, context)
    (tmp_path / out.strip() / "card.toml").write_text('template = "plain"')
    _pull(hub.url, repo, cwd=tmp_path)
    assert read_card(tmp_path / out.strip()).template == "plain"


def test_a_card_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left.*{tmp_path / 'card.toml'}"):
        pull._write_card(tmp_path, "BlinkDL/rwkv7-g1/rwkv7-g1-0.1b.pth")
    assert list(tmp_path.iterdir()) == []


def test_a_safetensors_repository_comes_with_its_vocabulary(hub: FakeHub, tmp_path: Path) -> None:
    code, out, err = _pull(hub.url, "fla-hub/rwkv7-0.1B-g1", cwd=tmp_path)
    assert (code, out) == (0, "models/rwkv7-0.1B-g1\n"), err
    folder = tmp_path / out.strip()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "rwkv_vocab_v20230424.txt").read_bytes() == b"vocab"
    assert not (folder / "config.json").exists()


def test_an_interrupted_download_resumes_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    hub.stall_after = 3 * _MB + 17
    process = _start(hub.url, "some/large", cwd=tmp_path)
    assert hub.stalled.wait(30)
    assert _grows_to(tmp_path / "models", 3 * _MB)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130

    hub.stall_after = None
    kept = next((tmp_path / "models").rglob("*.part")).stat().st_size
    code, out, err = _pull(hub.url, "some/large", cwd=tmp_path)
    assert (code, out) == (0, "models/large\n"), err
    assert hub.ranges("/large.pth") == [None, f"bytes={kept}-"]
    assert (tmp_path / "models/large/large.pth").read_bytes() == _LARGE
    names = sorted(path.name for path in (tmp_path / "models/large").iterdir())
    assert names == ["card.toml", "large.pth"]


def test_a_line_that_drops_is_taken_up_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.drop_after = 3 * _MB
    code, out, err = _pull(hub.url, "some/large", cwd=tmp_path)
    assert (code, out) == (0, "models/large\n"), err
    assert hub.ranges("/large.pth") == [None, f"bytes={3 * _MB}-"]
    assert (tmp_path / "models/large/large.pth").read_bytes() == _LARGE


@pytest.mark.slow
def test_a_file_that_is_there_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    for _ in range(2):
        assert _pull(hub.url, "rwkv7-g1-0.1b", cwd=tmp_path)[0] == 0
    assert hub.ranges(".pth") == [None]


@pytest.mark.slow
def test_a_damaged_download_is_removed(hub: FakeHub, tmp_path: Path) -> None:
    hub.wrong_digest = True
    code, out, err = _pull(hub.url, "rwkv7-g1-0.1b", cwd=tmp_path)
    assert (code, out) == (1, "")
    assert "arrived damaged" in err.splitlines()[-1]
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("nobody/nothing", "error: the hub has no model repository nobody/nothing"),
        ("rwkv7-g1-7.2b", "error: no file matches 'rwkv7-g*-7.2b-*.pth' in BlinkDL/rwkv7-g1"),
        ("BlinkDL/rwkv7-g1", "error: BlinkDL/rwkv7-g1 holds 3 checkpoints, choose one with --file"),
        ("knowledge+tone", "error: 'knowledge+tone' is neither an alias"),
    ],
)
def test_what_cannot_be_pulled_is_told_in_one_sentence(
    hub: FakeHub, tmp_path: Path, what: str, sentence: str
) -> None:
    code, out, err = _pull(hub.url, what, cwd=tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1


def test_no_network_is_told_in_one_sentence(tmp_path: Path) -> None:
    code, out, err = _pull("http://127.0.0.1:9", "rwkv7-g1-0.1b", cwd=tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_all_parts_of_a_sharded_checkpoint_are_chosen() -> None:
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = "model.safetensors.index.json"
    files = [RemoteFile(name, 1) for name in [*names, index, "rwkv_vocab_v20230424.txt"]]
    assert [f.path for f in choose(files, None, "r")] == [f.path for f in files]


def test_a_pattern_that_leaves_two_of_one_date_is_refused() -> None:
    files = [RemoteFile("a-1b-20250101.pth", 1), RemoteFile("b-1b-20250101.pth", 1)]
    with pytest.raises(CommandError, match=r"2 checkpoints, choose one with --file"):
        choose(files, "*-1b-*.pth", "r")


def test_aliases_name_official_repositories_in_lower_case() -> None:
    assert all(alias == alias.lower() for alias in ALIASES)
    assert {repo.split("/")[0] for repo, _ in ALIASES.values()} == {"BlinkDL"}


def _grows_to(folder: Path, num_bytes: int) -> bool:
    """Wait, 30 s at most, until the unfinished download has that many bytes on disk."""
    tick = threading.Event()
    for _ in range(1500):
        if any(p.stat().st_size >= num_bytes for p in folder.rglob("*.part")):
            return True
        tick.wait(0.02)
    return False
