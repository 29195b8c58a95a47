"""`/v1/feedback`: what is taken, what is refused, and what is in the file afterwards."""

import json
import os

import pytest
from fakes import FakeBackend
from starlette.testclient import TestClient

from mrss_provider.config import ServerConfig
from mrss_provider.errors import StorageError
from mrss_provider.server.app import create_app
from mrss_provider.server.auth import KeyRing
from mrss_provider.server.feedback import Feedback, default_path
from mrss_provider.server.keys import Key, hash_of

SCORE = {"id": "chatcmpl-1", "score": 0.5}
VOTE = {"id": "round-1", "vote": "b", "models": ["mrss/tone", "mrss/base"]}
KEYS = KeyRing(fixed=(Key("ada", hash_of("user-key")), Key("root", hash_of("admin-key"), "admin")))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "feedback.jsonl"


@pytest.fixture
def client(path):
    with TestClient(
        create_app(FakeBackend(), ServerConfig(feedback=path)), "http://localhost"
    ) as client:
        yield client


def test_what_was_posted_is_in_the_file_and_in_the_list(client, path):
    bodies = [
        {**SCORE, "models": ["mrss/tone"], "note": "fine"},
        {**VOTE, "ids": ["chatcmpl-1", "chatcmpl-2"]},
        {"id": "round-2", "vote": "tie", "models": ["a", "b", "c", "d"]},
    ]
    for body in bodies:
        response = client.post("/v1/feedback", json=body)
        assert response.status_code == 201, response.text
        assert response.json()["object"] == "feedback"
        assert response.json()["id"] == body["id"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("time", "owner")} for line in lines]
    assert kept == bodies
    assert client.get("/v1/feedback", params={"limit": 2}).json()["data"] == lines[1:]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"score": 1}, "id"),
        ({**SCORE, "id": ""}, "id"),
        ({**SCORE, "id": "x" * 257}, "id"),
        ({"id": "x"}, "score"),
        ({**SCORE, **VOTE}, "score"),
        ({**SCORE, "score": 1.5}, "score"),
        ({**SCORE, "score": True}, "score"),
        ({**SCORE, "models": ["a", "b"]}, "models"),
        ({**SCORE, "note": "x" * 2001}, "note"),
        ({**VOTE, "vote": "c"}, "vote"),
        ({**VOTE, "vote": "B"}, "vote"),
        ({**VOTE, "models": ["a", "a"]}, "models"),
        ({**VOTE, "models": ["a"]}, "models"),
        ({"id": "x", "vote": "a"}, "models"),
        ({**VOTE, "ids": ["1"]}, "ids"),
        ({**SCORE, "scores": 1}, None),
        ([], None),
    ],
)
def test_what_is_no_feedback_is_refused_by_name_and_not_kept(client, path, body, param):
    response = client.post("/v1/feedback", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not path.exists()


def test_the_owner_of_the_key_is_kept_and_only_an_admin_reads(path):
    app = create_app(FakeBackend(), ServerConfig(feedback=path), keys=KEYS)
    with TestClient(app, "http://localhost") as client:
        user, admin = ({"authorization": f"Bearer {name}-key"} for name in ("user", "admin"))
        assert client.post("/v1/feedback", json=SCORE).status_code == 401
        assert client.post("/v1/feedback", json=SCORE, headers=user).status_code == 201
        assert client.get("/v1/feedback", headers=user).status_code == 403
        (line,) = client.get("/v1/feedback", headers=admin).json()["data"]
        assert line["owner"] == "ada"


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "²"])
def test_limit_out_of_range_is_refused(client, limit):
    response = client.get("/v1/feedback", params={"limit": limit})
    assert response.json()["error"]["param"] == "limit"


def test_a_full_file_stays_as_it_is(path):
    feedback = Feedback(path, max_bytes=40)
    feedback.append(SCORE)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="has reached 40 bytes"):
        feedback.append(SCORE)
    assert path.read_bytes() == before


def test_a_line_that_the_disk_takes_in_part_only_is_refused_and_taken_back(path, monkeypatch):
    feedback = Feedback(path)
    feedback.append(SCORE)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:-5]))
        with pytest.raises(StorageError, match="No space left"):
            feedback.append(VOTE)
    feedback.append(VOTE)
    assert feedback.last(10) == [SCORE, VOTE]


def test_a_file_that_is_no_text_is_told(client, path):
    path.parent.mkdir()
    path.write_bytes(b"\xff\n")
    answer = client.get("/v1/feedback")
    assert answer.status_code == 507
    assert "none of ours" in answer.json()["error"]["message"]


def test_a_folder_that_cannot_be_made_is_a_507(tmp_path):
    (tmp_path / "file").write_text("")
    config = ServerConfig(feedback=tmp_path / "file" / "feedback.jsonl")
    with TestClient(create_app(FakeBackend(), config), "http://localhost") as client:
        response = client.post("/v1/feedback", json=SCORE)
    assert response.status_code == 507
    assert "--feedback" in response.json()["error"]["message"]


def test_without_a_name_it_is_in_the_users_folder_of_state(tmp_path):
    assert default_path({"XDG_STATE_HOME": str(tmp_path)}) == tmp_path / "mrss/feedback.jsonl"
