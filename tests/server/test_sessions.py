"""`/v1/sessions` and `mrss session` over a real engine. Oracle: a chat that was never put away."""

import json
import os

import pytest
from admin_client import serving_engine, write_folders
from command import mrss
from fakes import FakeBackend, serving
from starlette.testclient import TestClient

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.config import ServerConfig
from mrss_provider.server.app import create_app
from mrss_provider.server.auth import KeyRing
from mrss_provider.server.keys import Key, hash_of

OCTETS = {"content-type": "application/octet-stream"}
PROMPT = {"model": "knowledge+tone", "prompt": "Hello world, hello the cat"}
SAMPLING = {"seed": 3, "max_tokens": 12, "ignore_eos": True, "temperature": 1.0}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("sessions"))


@pytest.fixture
def client(config):
    with serving_engine(config) as client:
        yield client


def text_of(client, **body) -> str:
    response = client.post("/v1/completions", json={**SAMPLING, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def make(client, **body) -> dict:
    response = client.post("/v1/sessions", json={**PROMPT, **body})
    assert response.status_code == 201, response.text
    return response.json()


def go_on(client, session_id, text=" and a dog", **mrss) -> str:
    options = {"session": session_id, **mrss}
    return text_of(client, model=PROMPT["model"], prompt=text, mrss=options)


def test_going_on_is_as_if_nothing_had_been_put_away(client):
    made = make(client)
    assert made["object"] == "session"
    assert made["mixture"] == "knowledge+tone"
    assert "owner" not in made
    whole = text_of(client, **{**PROMPT, "prompt": PROMPT["prompt"] + " and a dog"})
    assert go_on(client, made["id"]) == whole
    assert client.get(f"/v1/sessions/{made['id']}").json() == made


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": 2, "best_of": 3}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"mrss": {"session": "ses_0"}}, "mrss.session"),
    ],
)
def test_what_only_an_answer_has_makes_no_session(client, said, param):
    refused = client.post("/v1/sessions", json={**PROMPT, **said})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert client.get("/v1/sessions").json()["data"] == []


def test_a_chat_is_saved(client):
    body = {"model": "tone", "messages": [{"role": "user", "content": "Hello"}]}
    made = client.post("/v1/sessions", json=body)
    assert made.status_code == 201
    assert made.json()["num_tokens"] > 0


def test_a_fork_is_another_session(client):
    made = make(client)
    other = client.post(f"/v1/sessions/{made['id']}/fork")
    assert other.status_code == 201
    before = go_on(client, made["id"])
    go_on(client, made["id"], save=True)
    assert go_on(client, other.json()["id"]) == before
    listed = [item["id"] for item in client.get("/v1/sessions").json()["data"]]
    assert {made["id"], other.json()["id"]} <= set(listed)


def test_an_exported_session_goes_on_elsewhere(client, config):
    made = make(client)
    exported = client.get(f"/v1/sessions/{made['id']}/export")
    assert exported.headers["content-type"] == "application/octet-stream"
    expected = go_on(client, made["id"])
    with serving_engine(config) as other:
        sent = other.post("/v1/sessions/import", content=exported.content, headers=OCTETS)
        assert sent.status_code == 201, sent.text
        assert go_on(other, sent.json()["id"]) == expected


def test_a_deleted_session_is_gone(client):
    made = make(client)
    assert client.delete(f"/v1/sessions/{made['id']}").json()["deleted"] is True
    for response in (
        client.get(f"/v1/sessions/{made['id']}"),
        client.delete(f"/v1/sessions/{made['id']}"),
        client.post(f"/v1/sessions/{made['id']}/fork"),
        client.get(f"/v1/sessions/{made['id']}/export"),
        client.get("/v1/sessions/..%2F..%2Fetc"),
    ):
        assert response.status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": ["a", "b"]}, 400),
        ({"stream": True}, 400),
        ({"model": "absent"}, 400),
        ({"modell": "tone"}, 400),
        ({"mrss": {"given": "Hi"}}, 400),
    ],
)
def test_a_body_that_makes_no_session(client, body, status):
    before = client.get("/v1/sessions").json()
    assert client.post("/v1/sessions", json={**PROMPT, **body}).status_code == status
    assert client.get("/v1/sessions").json() == before


@pytest.mark.parametrize(
    ("data", "headers", "status"),
    [(b"x", OCTETS, 400), (b"", OCTETS, 400), (b"x", {}, 400), (bytes(3000), OCTETS, 413)],
)
def test_an_import_that_is_refused(config, data, headers, status):
    with serving_engine(config, max_session_bytes=2000) as client:
        response = client.post("/v1/sessions/import", content=data, headers=headers)
        assert response.status_code == status
        assert client.get("/v1/sessions").json()["data"] == []


def test_a_session_belongs_to_the_key_that_made_it(config):
    keys = KeyRing(fixed=[Key(name, hash_of(name * 16)) for name in ("ann", "bob")])
    ann, bob = ({"authorization": f"Bearer {name * 16}"} for name in ("ann", "bob"))
    app = create_app(AsyncEngine(config), ServerConfig(), keys=keys)
    with TestClient(app, base_url="http://127.0.0.1:9000") as client:
        made = client.post("/v1/sessions", json=PROMPT, headers=ann).json()
        path = f"/v1/sessions/{made['id']}"
        assert client.get(path, headers=ann).json() == made
        assert client.get("/v1/sessions", headers=bob).json()["data"] == []
        absent = client.get("/v1/sessions/none", headers=bob).json()
        stolen = [
            client.get(path, headers=bob),
            client.delete(path, headers=bob),
            client.post(f"{path}/fork", headers=bob),
            client.get(f"{path}/export", headers=bob),
        ]
        assert [response.status_code for response in stolen] == [404] * 4
        # Whether it exists is nobody else's business either.
        said = stolen[0].json()["error"]["message"].replace(made["id"], "none")
        assert said == absent["error"]["message"]
        assert client.get(path).status_code == 401
        assert client.get(path, headers=ann).status_code == 200


def test_a_session_of_a_model_that_was_replaced_is_refused(client):
    made = make(client)
    expected = go_on(client, made["id"])
    assert client.post("/v1/model", json={"path": "second"}).status_code == 200
    body = {**SAMPLING, **PROMPT, "mrss": {"session": made["id"]}}
    refused = client.post("/v1/completions", json=body)
    assert (refused.status_code, "model" in refused.json()["error"]["message"]) == (400, True)
    # It is not lost: it goes on when its model is back.
    assert client.post("/v1/model", json={"path": "first"}).status_code == 200
    assert go_on(client, made["id"]) == expected


def test_a_session_whose_state_was_replaced_is_told_so_and_goes_on_with_the_old_one(client):
    def load(file):
        client.delete("/v1/states/fresh")
        added = client.post("/v1/states", json={"path": f"more/{file}.pth", "name": "fresh"})
        assert added.status_code == 201, added.text

    load("a")
    made = make(client, model="fresh")
    body = {**SAMPLING, "model": "fresh", "prompt": " and", "mrss": {"session": made["id"]}}
    expected = text_of(client, **body)
    load("b")
    refused = client.post("/v1/completions", json=body).json()["error"]
    assert (refused["param"], "has been replaced" in refused["message"]) == ("mrss.session", True)
    load("a")
    assert text_of(client, **body) == expected


def test_an_engine_without_sessions_says_so():
    with TestClient(create_app(FakeBackend()), base_url="http://127.0.0.1:9000") as client:
        assert client.get("/v1/sessions").status_code == 404


def test_the_command_does_what_the_routes_do(config, tmp_path):
    socket = tmp_path / "engine.sock"
    server = ("--server", f"unix://{socket}")
    file = tmp_path / "saved.safetensors"
    with serving(AsyncEngine(config), ServerConfig(socket=socket)):
        made = mrss("session", "save", "mrss/tone", "-m", "Hello", *server)
        assert made.code == 0, made.err
        session_id = made.out.strip()
        assert session_id in made.err
        forked = mrss("session", "fork", session_id, *server).out.strip()
        assert mrss("session", "export", session_id, str(file), *server).code == 0
        assert file.stat().st_mode & 0o777 == 0o600
        again = mrss("session", "export", session_id, str(file), *server)
        assert (again.code, "exists" in again.err) == (1, True)
        link, pipe = tmp_path / "link", tmp_path / "pipe"
        link.symlink_to(file)
        os.mkfifo(pipe)
        assert mrss("session", "export", session_id, str(link), "--force", *server).code == 0
        assert link.is_symlink()
        refused = mrss("session", "export", session_id, str(pipe), "--force", *server)
        assert (refused.code, "is no regular file" in refused.err) == (1, True)
        assert pipe.is_fifo()
        imported = mrss("session", "import", str(file), *server).out.strip()
        listed = mrss("session", "list", "--json", *server).out.splitlines()
        assert {json.loads(line)["id"] for line in listed} == {session_id, forked, imported}
        assert "MIXTURE" in mrss("session", "list", *server).out
        assert json.loads(mrss("session", "show", forked, *server).out)["mixture"] == "tone"
        assert mrss("session", "delete", forked, *server).code == 0
        gone = mrss("session", "show", forked, *server)
        assert (gone.code, gone.out) == (1, "")
        prompt = mrss("session", "save", "tone", "--prompt", *server, stdin="the cat")
        assert prompt.code == 0
    absent = mrss("session", "list", *server)
    assert absent.code == 1
    assert "mrss serve" in absent.err
