"""Where an engine that is started by itself has its socket, and which addresses come before it."""

import os
import tempfile
from pathlib import Path

import pytest
from engine_place import own_place

from mrss_provider import autostart
from mrss_provider.autostart import engine_address, socket_path
from mrss_provider.errors import ConfigError


@pytest.fixture
def place():
    with own_place() as found:
        yield found


def test_each_configuration_has_its_own_socket(place):
    paths = {
        socket_path(place.env),
        socket_path(place.env | {"MRSS_MODEL": "/m"}),
        socket_path(place.env | {"MRSS_STATES": "/s"}),
        socket_path(place.env | {"MRSS_DTYPE": "fp32"}),
    }
    assert len(paths) == 4
    assert socket_path(place.env) in paths
    assert socket_path(place.env | {"MRSS_PORT": "1", "OTHER": "x"}) in paths


def test_a_relative_model_is_another_one_in_another_folder(place, tmp_path, monkeypatch):
    env = place.env | {"MRSS_MODEL": "m"}
    here = socket_path(env)
    monkeypatch.chdir(tmp_path)
    assert socket_path(env) != here


def test_a_relative_tokenizer_is_another_one_in_another_folder(place, tmp_path, monkeypatch):
    env = place.env | {"MRSS_TOKENIZER": "vocab.txt"}
    here = socket_path(env)
    monkeypatch.chdir(tmp_path)
    assert socket_path(env) != here
    assert socket_path(place.env | {"MRSS_TOKENIZER": str(tmp_path / "vocab.txt")}) == (
        socket_path(env)
    )


@pytest.mark.parametrize("kind", ["missing", "file", "relative", "unreadable"])
def test_a_runtime_folder_that_cannot_be_used_gives_way_to_the_next(place, monkeypatch, kind):
    runtime = place.folder / "x"
    monkeypatch.chdir(place.folder)
    if kind in ("relative", "unreadable"):
        runtime.mkdir(mode=0o700)
    if kind == "file":
        runtime.touch()
    elif kind == "relative":
        runtime = Path("x")
    elif kind == "unreadable":
        # Not by the mode, which does not stop a superuser.
        make = Path.mkdir

        def mkdir(self, *args, **kwargs):
            if self.parent == runtime:
                raise PermissionError(13, "Permission denied")
            make(self, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(tempfile, "tempdir", str(place.folder))
    env = place.env | {"XDG_RUNTIME_DIR": str(runtime)}
    assert socket_path(env).parent == place.folder / f"mrss-{os.getuid()}"


def test_the_last_reason_is_told_when_no_folder_can_be_used(place, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(autostart, "_make_private", refuse)
    with pytest.raises(ConfigError, match=r"\(/tmp/mrss-\d+: Permission denied\); set MRSS_SOCKET"):
        socket_path(place.env)


def test_a_path_that_is_too_long_gives_way_to_a_shorter_one(place):
    long = place.folder / ("x" * 90)
    long.mkdir()
    path = socket_path(place.env | {"XDG_RUNTIME_DIR": str(long)})
    assert not path.is_relative_to(long)
    assert len(os.fsencode(path)) < 104


def test_a_folder_that_others_can_write_to_is_refused(place):
    (place.folder / "mrss").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        socket_path(place.env)


def test_a_link_in_the_folders_place_is_refused(place):
    (place.folder / "elsewhere").mkdir(mode=0o700)
    (place.folder / "mrss").symlink_to(place.folder / "elsewhere")
    with pytest.raises(ConfigError, match="mode 0700"):
        socket_path(place.env)


@pytest.mark.parametrize(
    ("api_base", "env", "expected"),
    [
        ("http://a:1", {"MRSS_SOCKET": "/s"}, "http://a:1"),
        (None, {"MRSS_SOCKET": "/s"}, "unix:///s"),
        ("", {"MRSS_SOCKET": "unix:///s"}, "unix:///s"),
        (None, {"MRSS_SOCKET": "http://b:2"}, "http://b:2"),
        (None, {"MRSS_SOCKET": ""}, None),
        (None, {}, None),
    ],
)
def test_an_address_that_was_given_wins(api_base, env, expected):
    assert engine_address(api_base, env) == expected
