"""`/v1/states`, `/v1/mixtures`, `/v1/model`. Oracle: a server that starts with what is on disk."""

import json
import tempfile

import pytest
from admin_client import serving_engine, write_folders
from fakes import FakeBackend
from starlette.testclient import TestClient

from mrss_provider.config import ServerConfig
from mrss_provider.server.app import create_app
from mrss_provider.server.auth import KeyRing
from mrss_provider.server.keys import Key, hash_of

OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture
def config(tmp_path):
    return write_folders(tmp_path)


@pytest.fixture
def client(config):
    with serving_engine(config) as client:
        yield client


def ids_of(client) -> list[str]:
    return [item["id"] for item in client.get("/v1/models").json()["data"]]


def answer_of(client, model, **more) -> dict:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "seed": 1, **more}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def expect_error(response, status, words="") -> None:
    """The error has OpenAI's form and RWKV-Infer's `detail`."""
    assert response.status_code == status, response.text
    assert words in response.json()["detail"]
    assert response.json()["error"]["message"] == response.json()["detail"]


def test_a_state_is_loaded_used_and_removed(client, config):
    made = client.post("/v1/states", json={"path": "more/a.pth", "name": "poetry"})
    assert made.status_code == 201
    assert made.json()["added"] is True
    assert client.get("/v1/states/poetry").json() == made.json()
    assert answer_of(client, "poetry+tone")["mrss"]["mixture"] == "poetry+tone"
    with serving_engine(config) as again:
        assert ids_of(again) == ids_of(client)
    removed = client.delete("/v1/states/poetry").json()
    assert removed == {"object": "state", "name": "poetry", "deleted": True, "kept_file": None}
    assert "poetry" not in ids_of(client)
    expect_error(client.get("/v1/states/poetry"), 404, "poetry")
    expect_error(client.delete("/v1/states/poetry"), 404, "poetry")


def test_a_state_is_uploaded(client, config):
    data = (config.states / "more/b.pth").read_bytes()
    made = client.post("/v1/states?name=sent&format=pth", content=data, headers=OCTETS)
    assert made.status_code == 201
    by_path = client.post("/v1/states", json={"path": "more/b.pth", "name": "same"}).json()
    assert made.json()["sha256"] == by_path["sha256"]


@pytest.mark.parametrize(
    ("query", "headers", "data", "status"),
    [
        ("name=sent", OCTETS, b"no state", 400),
        ("name=sent", OCTETS, b"", 400),
        ("name=sent&format=pth", OCTETS, b"no state", 400),
        ("name=sent&format=exe", OCTETS, b"x", 400),
        ("name=..%2Fsent", OCTETS, b"x", 400),
        ("", OCTETS, b"x", 400),
        ("name=sent", {"content-type": "text/plain"}, b"x", 400),
        ("name=sent", {"content-type": "multipart/form-data; boundary=x"}, b"x", 400),
        ("name=sent", OCTETS, bytes((1 << 20) + 1), 413),
    ],
)
def test_an_upload_that_is_refused_leaves_nothing(client, config, query, headers, data, status):
    before = ids_of(client)
    response = client.post(f"/v1/states?{query}", content=data, headers=headers)
    expect_error(response, status)
    assert tempfile.gettempdir() not in response.text
    assert ids_of(client) == before
    assert not (config.states / "added").exists()


def test_an_upload_without_a_length_is_bounded_too(client):
    def pieces():
        for _ in range(40):
            yield bytes(1 << 15)

    response = client.post("/v1/states?name=sent", content=pieces(), headers=OCTETS)
    expect_error(response, 413, "max_state_bytes")


@pytest.mark.parametrize("name", ["a" * 300, "a%00b"])
def test_a_name_that_no_file_can_have_is_no_state(client, name):
    expect_error(client.delete(f"/v1/states/{name}"), 404, "there is no state")


def test_removing_a_file_of_the_operators_keeps_it(client, config):
    client.delete("/v1/mixtures/story")
    assert client.delete("/v1/states/tone").json()["kept_file"] == "tone.pth"
    assert (config.states / "tone.pth").exists()
    assert ids_of(client) == ["base", "knowledge"]


def test_a_mixture_is_made_changed_and_removed(client, config):
    body = {"name": "warm", "terms": "tone:2+base", "merge": "linear", "temperature": 0.5}
    made = client.post("/v1/mixtures", json=body)
    shown = {"object": "mixture", **body, "served": {"reinject": "never"}}
    assert (made.status_code, made.json()) == (201, shown)
    expect_error(client.post("/v1/mixtures", json=body), 409, "warm")
    assert answer_of(client, "warm")["mrss"]["mixture"] == "base:0.5+tone~linear"
    put = client.put("/v1/mixtures/warm", json={"terms": "tone"})
    assert (put.status_code, put.json()["terms"]) == (200, "tone")
    assert put.json()["served"] == {"reinject": "never"}
    assert client.put("/v1/mixtures/cold", json={"terms": "tone"}).status_code == 201
    with serving_engine(config) as again:
        assert again.get("/v1/mixtures").json() == client.get("/v1/mixtures").json()
    assert client.delete("/v1/mixtures/warm").json()["deleted"] is True
    expect_error(client.get("/v1/mixtures/warm"), 404)
    assert (config.states / "mixtures.toml").read_text().startswith("# ours\n[story]")


@pytest.mark.parametrize(
    ("said", "spelled"),
    [
        ({"gate": {"name": "novelty", "tau": 0.1}}, {"gate": "novelty:0.1"}),
        ({"merge": {"name": "power", "exponent": 2}}, {"merge": "power:2"}),
        ({"gate": "novelty:0.1"}, {"gate": "novelty:0.1"}),
    ],
)
def test_a_mixtures_methods_may_be_objects_as_in_its_file(client, said, spelled):
    made = client.post("/v1/mixtures", json={"name": "warm", "terms": "tone+base", **said})
    assert made.status_code == 201
    assert spelled.items() <= made.json().items()
    # It is the bodies' schema of `/openapi.json` that lets them be.
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for kind in said:
        assert "object" in schemas["MixtureBody"]["properties"][kind]["type"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "x", "terms": "tone", "gate": {"name": "novelty", "tua": 1}}, 400, "'tua'"),
        ({"name": "x", "terms": "tone", "gate": {"tau": 1}}, 400, "gate must be one of"),
        ({"name": "x", "terms": "tone", "gate": ["fixed"]}, 400, "gate must be a text"),
        ({"name": "x", "terms": "absent"}, 400, "absent"),
        ({"name": "x", "terms": "tone", "merg": "linear"}, 400, "did you mean 'merge'"),
        ({"name": "x"}, 400, "terms is missing"),
        ({"name": "x", "terms": 5}, 400, "must be a text"),
        ({"name": "x", "terms": "tone", "top_p": "much"}, 400, "top_p"),
        ({"name": "x", "terms": "tone", "top_p": 7}, 400, "top_p"),
        ({"name": "x", "terms": "tone", "sampling_order": "no"}, 400, "sampling_order"),
        ({"name": "x", "terms": "tone", "reinject": "no"}, 400, "reinject"),
        ({"name": "x", "terms": "tone", "description": "\ud800"}, 400, "surrogate"),
        ({"name": "tone", "terms": "tone"}, 409, "state"),
        ([], 400, "JSON object"),
    ],
)
def test_a_mixture_that_means_nothing(client, body, status, words):
    response = client.post(
        "/v1/mixtures", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    expect_error(response, status, words)


def test_a_state_in_use_is_a_conflict(client):
    expect_error(client.delete("/v1/states/tone"), 409, "story")


def test_the_model_is_replaced(client):
    before = answer_of(client, "tone")
    assert client.get("/v1/model").json()["file"] == "first"
    loaded = client.post("/v1/model", json={"path": "models/second", "display_name": "My Model"})
    assert (loaded.status_code, loaded.json()["file"]) == (200, "second")
    assert client.get("/version").json()["model"] == "second"
    after = answer_of(client, "My Model tone")
    assert after["system_fingerprint"] != before["system_fingerprint"]
    assert client.get("/ready").status_code == 200


def test_a_model_that_cannot_be_loaded_changes_nothing(client):
    before = answer_of(client, "tone")
    expect_error(client.post("/v1/model", json={"path": "absent"}), 404)
    expect_error(client.post("/v1/model", json={"path": "../states/tone.pth"}), 400, "inside")
    expect_error(client.post("/v1/model", json={"path": "second", "drain_s": -1}), 400, "drain_s")
    assert client.get("/ready").status_code == 200
    assert answer_of(client, "tone")["choices"] == before["choices"]


def test_without_a_model_requests_and_readiness_are_503(client):
    assert client.delete("/v1/model").json()["deleted"] is True
    assert client.get("/health").status_code == 200
    for response in (
        client.get("/ready"),
        client.get("/v1/models"),
        client.post("/v1/completions", json={"model": "tone", "prompt": "x"}),
        client.get("/v1/states"),
    ):
        assert response.status_code == 503
        assert "no model is loaded" in response.json()["error"]["message"]
    assert client.post("/v1/model", json={"path": "first"}).status_code == 200
    assert client.get("/ready").status_code == 200


CALLS = [
    ("GET", "/v1/states"),
    ("POST", "/v1/states"),
    ("DELETE", "/v1/states/tone"),
    ("GET", "/v1/mixtures"),
    ("POST", "/v1/mixtures"),
    ("PUT", "/v1/mixtures/x"),
    ("DELETE", "/v1/mixtures/x"),
    ("GET", "/v1/model"),
    ("POST", "/v1/model"),
    ("DELETE", "/v1/model"),
    ("POST", "/loadmodel"),
    ("POST", "/removemodel"),
    ("POST", "/loadstatemodel"),
    ("POST", "/mrss_loadstatemodel"),
    ("POST", "/mrss_set_gatingweight"),
    ("POST", "/removestatemodel"),
]


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_administration_needs_an_admin(method, path):
    keys = KeyRing(
        fixed=[Key("ann", hash_of("u" * 32), "user"), Key("bob", hash_of("a" * 32), "admin")]
    )
    app = create_app(FakeBackend(), ServerConfig(), keys=keys)
    with TestClient(app, base_url="http://127.0.0.1:9000") as client:
        statuses = [
            client.request(method, path, headers=headers).status_code
            for headers in (
                {},
                {"authorization": f"Bearer {'u' * 32}"},
                {"authorization": f"Bearer {'a' * 32}"},
            )
        ]
    # A fake cannot be administered: who is let in learns that, or that the body is no JSON.
    assert statuses[:2] == [401, 403]
    assert statuses[2] in (400, 404)


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_another_sites_page_may_not_administer(method, path):
    with TestClient(create_app(FakeBackend()), base_url="http://127.0.0.1:9000") as client:
        evil = client.request(method, path, headers={"origin": "http://evil.example"})
        own = client.request(method, path, headers={"origin": "http://127.0.0.1:9000"})
    assert evil.status_code == 403
    assert own.status_code != 403
