"""API keys: at rest, at the door, and what each may do."""

import json
import stat

import pytest
from fakes import FakeBackend
from starlette.testclient import TestClient

from mrss_provider.config import ServerConfig
from mrss_provider.errors import AuthenticationError, ConfigError, ConflictError, NotFoundError
from mrss_provider.server.app import create_app
from mrss_provider.server.auth import KeyRing, check_exposure
from mrss_provider.server.keys import (
    Limits,
    create_key,
    find,
    keys_of_environment,
    new_key,
    read_keys,
    revoke_key,
)
from mrss_provider.server.run import run_server

CHAT = {"model": "tone", "messages": [{"role": "user", "content": "hi"}]}
USER, ADMIN = "user-0123456789abcdef", "admin-0123456789abcdef"
BOTH = {"MRSS_API_KEY": USER, "MRSS_ADMIN_KEY": ADMIN}


def client_of(env=None, backend=None, **config) -> TestClient:
    server_config = ServerConfig(**config)
    keys = KeyRing.of(server_config, env or {})
    app = create_app(backend or FakeBackend(), server_config, keys=keys)
    return TestClient(app, base_url="http://127.0.0.1:9000")


def bearer(key) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_is_kept_as_a_hash_only(tmp_path):
    file = tmp_path / "keys.jsonl"
    key = create_key(file, "alice", "user", Limits(max_concurrent=2))
    text = file.read_text()
    assert key not in text
    assert key.removeprefix("mrss-") not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (kept,) = read_keys(file)
    assert (kept.id, kept.kind, kept.limits) == ("alice", "user", Limits(max_concurrent=2))
    assert find([kept], key) is kept
    assert find([kept], key + "x") is None


def test_no_two_keys_are_alike():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) >= 40 for key in keys)


def test_revoking_leaves_the_others_and_the_comments(tmp_path):
    file = tmp_path / "keys.jsonl"
    file.write_text("# ours\n\n")
    create_key(file, "alice", "user", Limits())
    kept = create_key(file, "bob", "admin", Limits())
    with pytest.raises(ConflictError, match="'alice'"):
        create_key(file, "alice", "user", Limits())
    revoke_key(file, "alice")
    with pytest.raises(NotFoundError, match="'alice'"):
        revoke_key(file, "alice")
    assert file.read_text().startswith("# ours\n\n{")
    assert find(read_keys(file), kept).id == "bob"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x", "line 1"),
        ("[]", "JSON object"),
        ('{"id": "a"}', "sha256"),
        ('{"id": "a", "sha256": "00"}', "64 hexadecimal"),
        (json.dumps({"id": "a b", "sha256": "0" * 64}), "id"),
        (json.dumps({"id": "a", "sha256": "0" * 64, "kind": "root"}), "user or admin"),
        (json.dumps({"id": "a", "sha256": "0" * 64, "max_concurrent": -1}), "max_concurrent"),
        (json.dumps({"id": "a", "sha256": "0" * 64, "tokens_per_minute": True}), "integer"),
        (json.dumps({"id": "a", "sha256": "0" * 64, "more": 1}), "more"),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_line(tmp_path, line, words):
    file = tmp_path / "keys.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ConfigError, match=words):
        read_keys(file)


def test_a_key_that_could_be_guessed_is_refused():
    with pytest.raises(ConfigError, match="MRSS_API_KEY must have at least 16"):
        keys_of_environment({"MRSS_API_KEY": "secret"})


@pytest.mark.parametrize("header", [None, "Basic abc", "Bearer", "Bearer ", f"Bearer {USER}x"])
def test_without_a_known_key_nothing_is_answered(header):
    backend = FakeBackend()
    with client_of(BOTH, backend) as client:
        headers = {} if header is None else {"authorization": header}
        response = client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"
    assert USER not in response.text
    assert not backend.requests


@pytest.mark.parametrize(("key", "owner"), [(USER, "env"), (ADMIN, "env-admin")])
def test_a_key_lets_in_and_names_the_owner(key, owner):
    backend = FakeBackend()
    with client_of(BOTH, backend) as client:
        response = client.post("/v1/chat/completions", json=CHAT, headers=bearer(key))
    assert response.status_code == 200
    assert backend.requests[0].owner == owner


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(path):
    with client_of(BOTH) as client:
        assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/metrics", "/v1/states", "/nothing"])
def test_everything_else_does(path):
    with client_of(BOTH) as client:
        assert client.get(path).status_code == 401


@pytest.mark.parametrize(
    ("env", "config", "key", "status"),
    [
        (BOTH, {}, USER, 403),
        (BOTH, {}, ADMIN, 200),
        ({}, {}, None, 200),
        ({}, {"host": "0.0.0.0", "no_auth": True}, None, 401),
        ({"MRSS_ADMIN_KEY": ADMIN}, {"host": "0.0.0.0", "no_auth": True}, None, 401),
        ({"MRSS_ADMIN_KEY": ADMIN}, {"host": "0.0.0.0", "no_auth": True}, ADMIN, 200),
        ({}, {"socket": "/tmp/s"}, None, 200),
    ],
)
def test_administration_is_for_admins(env, config, key, status):
    with client_of(env, **config) as client:
        response = client.get("/metrics", headers={} if key is None else bearer(key))
    assert response.status_code == status


def test_no_auth_lets_everybody_generate_but_no_wrong_key():
    with client_of(BOTH, host="0.0.0.0", no_auth=True) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        wrong = client.post("/v1/chat/completions", json=CHAT, headers=bearer("x" * 40))
    assert wrong.status_code == 401


@pytest.mark.parametrize(
    "config", [{"host": "0.0.0.0"}, {"host": "::"}, {"host": "192.0.2.1"}, {"host": "example"}]
)
def test_a_server_that_others_reach_does_not_start_without_keys(config, monkeypatch):
    with pytest.raises(ConfigError, match="--no-auth"):
        run_server(FakeBackend(), ServerConfig(**config))
    server_config = ServerConfig(**config)
    check_exposure(server_config, KeyRing.of(server_config, BOTH))
    check_exposure(ServerConfig(**config, no_auth=True), KeyRing())


def test_no_host_is_not_all_hosts():
    with pytest.raises(ConfigError, match="host must be an address or a name, got ''") as caught:
        ServerConfig(host="")
    assert caught.value.param == "host"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_a_local_one_may(host):
    check_exposure(ServerConfig(host=host), KeyRing())


def test_a_file_without_keys_lets_nobody_in_and_says_so(tmp_path, caplog):
    file = tmp_path / "keys.jsonl"
    file.write_text("")
    with client_of(keys_file=file) as client:
        assert client.get("/v1/models").status_code == 401
    assert f"{file} holds no key, so every request is refused" in caplog.text


def test_a_file_that_is_not_there_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing(tmp_path / "keys.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        lambda file: create_key(file, "bob", "user", Limits()),
        lambda file: revoke_key(file, "bob"),
        KeyRing,
    ],
)
def test_a_file_that_is_no_text_is_refused_and_stays(tmp_path, change):
    file = tmp_path / "keys.jsonl"
    file.write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        change(file)
    assert file.read_bytes() == b"\xff\n"


def test_keys_come_and_go_while_the_server_runs(tmp_path, caplog):
    file, now = tmp_path / "keys.jsonl", [0.0]
    first = create_key(file, "alice", "user", Limits())
    keys = KeyRing(file, clock=lambda: now[0])
    assert keys.caller(f"Bearer {first}").id == "alice"
    second = create_key(file, "bob", "admin", Limits())
    now[0] += 2
    assert keys.caller(f"Bearer {second}").is_admin
    revoke_key(file, "alice")
    now[0] += 2
    with pytest.raises(AuthenticationError):
        keys.caller(f"Bearer {first}")
    file.write_text("no key\n")
    now[0] += 2
    assert keys.caller(f"Bearer {second}").id == "bob"
    assert "the API keys stay as they were" in caplog.text


def test_a_reload_by_hand_does_not_wait(tmp_path):
    file = tmp_path / "keys.jsonl"
    create_key(file, "alice", "user", Limits())
    keys = KeyRing(file, clock=lambda: 0.0)
    second = create_key(file, "bob", "user", Limits())
    keys.reload()
    assert keys.caller(f"Bearer {second}").id == "bob"


def test_a_page_of_another_origin_reads_nothing_unless_it_may():
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    path = "/v1/chat/completions"
    with client_of(BOTH) as client:
        assert "access-control-allow-origin" not in client.options(path, headers=asked).headers
    with client_of(BOTH, cors_origins="https://a.example, https://b.example") as client:
        preflight = client.options(path, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        response = client.post(path, json=CHAT, headers={**bearer(USER), **asked})
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        refused = client.post(path, json=CHAT, headers={**bearer(USER), "origin": "https://c.d"})
        assert "access-control-allow-origin" not in refused.headers


def test_a_page_may_ask_with_openais_client():
    # What its version 6 sends from a browser beside what every page may.
    sent = ("authorization", "content-type", "user-agent", "x-stainless-lang", "x-stainless-os")
    asked = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": ", ".join(sent),
    }
    with client_of(BOTH, cors_origins="https://a.example") as client:
        preflight = client.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200
        allowed = preflight.headers["access-control-allow-headers"].split(",")
        assert {name.strip().lower() for name in allowed} >= set(sent)
        refused = client.options("/v1/chat/completions", headers={**asked, "origin": "https://c.d"})
        assert "access-control-allow-origin" not in refused.headers
