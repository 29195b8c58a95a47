"""A disk that is full, or that gives back other bytes than were written, changes no answer."""

from dataclasses import replace

import pytest
from admin_client import write_folders
from served import BODY, full_disk, served

OCTETS = {"content-type": "application/octet-stream"}
LONG = {"prompt": "The cat is red. " * 8, "max_tokens": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    config = replace(
        write_folders(folder), cache_dir=folder / "cache", sessions_dir=folder / "sessions"
    )
    with served(folder, config) as found:
        yield found


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expect_storage_error(response):
    assert response.status_code == 507, response.text
    assert response.json()["error"]["code"] == "storage_failed"


def test_a_mixture_that_cannot_be_written_is_not_there_either(server):
    states = server.backend.config.states
    before = files(states)
    with full_disk():
        expect_storage_error(server.http.put("/v1/mixtures/new", json={"terms": "tone"}))
        expect_storage_error(server.http.put("/v1/mixtures/story", json={"terms": "tone"}))
    assert files(states) == before
    assert server.http.get("/v1/mixtures/new").status_code == 404
    assert server.http.get("/v1/mixtures/story").json()["terms"] == "knowledge+tone"
    assert server.http.put("/v1/mixtures/new", json={"terms": "tone"}).status_code == 201


def test_a_state_that_cannot_be_written_is_not_there_either(server):
    states = server.backend.config.states
    before = files(states)
    data = (states / "more/a.pth").read_bytes()
    query = {"name": "poem", "format": "pth"}
    with full_disk():
        expect_storage_error(
            server.http.post("/v1/states", params=query, content=data, headers=OCTETS)
        )
        expect_storage_error(
            server.http.post("/v1/states", json={"path": "more/a.pth", "name": "poem"})
        )
    assert files(states) == before
    assert server.http.get("/v1/states/poem").status_code == 404


def test_a_session_that_cannot_be_written_is_not_there_either(server):
    begin = {"model": "tone", "prompt": "Hello"}
    made = server.http.post("/v1/sessions", json=begin).json()
    before = files(server.backend.config.sessions_dir)
    with full_disk():
        expect_storage_error(server.http.post("/v1/sessions", json=begin))
        expect_storage_error(server.http.post(f"/v1/sessions/{made['id']}/fork"))
    assert files(server.backend.config.sessions_dir) == before
    listed = server.http.get("/v1/sessions").json()["data"]
    assert [session["id"] for session in listed] == [made["id"]]
    assert server.http.get(f"/v1/sessions/{made['id']}/export").status_code == 200


def test_a_session_whose_answer_cannot_be_saved_stays_as_it_was(server):
    made = server.http.post("/v1/sessions", json={"model": "tone", "prompt": "Hello"}).json()
    goes_on = {"model": "tone", "prompt": " world", "max_tokens": 4, "seed": 1}
    goes_on["mrss"] = {"session": made["id"], "save": True}
    with full_disk():
        answer = server.http.post("/v1/completions", json=goes_on)
    assert answer.status_code == 507
    assert server.http.get(f"/v1/sessions/{made['id']}").json() == made
    assert server.http.post("/v1/completions", json=goes_on).status_code == 200
    assert server.http.get(f"/v1/sessions/{made['id']}").json() != made


def test_a_cache_that_cannot_be_written_changes_no_answer(server):
    expected = server.text(**LONG)
    with full_disk():
        assert server.text(**LONG) == expected
        assert server.text(**LONG | {"model": "tone"})
    assert server.text(**LONG) == expected


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "other"])
@pytest.mark.slow
def test_cache_files_that_are_damaged_change_no_answer(tmp_path, damage):
    config = replace(write_folders(tmp_path), cache_dir=tmp_path / "cache")
    with served(tmp_path, config) as found:
        expected = found.text(**LONG)
    written = sorted(path for path in files(tmp_path / "cache") if path.suffix == ".safetensors")
    assert written
    for path in written:
        data = bytearray(path.read_bytes())
        data[-5] ^= 0x40
        damaged = {
            "flipped": bytes(data),
            "cut": bytes(data[: len(data) // 2]),
            "emptied": b"",
            "other": b'{"not": "a snapshot"}' * 9,
        }
        path.write_bytes(damaged[damage])
    with served(tmp_path, config) as found:
        answer = found.http.post("/v1/completions", json={**BODY, **LONG}).json()
    assert answer["choices"][0]["text"] == expected
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
