import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from command import mrss

from mrss_provider.server.keys import find, read_keys

SERVER = """
import sys
from pathlib import Path
from fakes import FakeBackend
from mrss_provider.config import ServerConfig
from mrss_provider.server.logs import log_to_stderr
from mrss_provider.server.run import run_server

log_to_stderr("text")
run_server(FakeBackend(), ServerConfig(socket=Path(sys.argv[1]), keys_file=Path(sys.argv[2])))
"""


def test_a_key_is_made_listed_and_revoked(tmp_path):
    file = tmp_path / "keys.jsonl"
    where = ("--keys-file", str(file))
    made = mrss("keys", "create", "alice", "--max-concurrent", "3", *where)
    assert (made.code, made.out.count("\n")) == (0, 1)
    key = made.out.strip()
    assert find(read_keys(file), key).id == "alice"
    mrss("keys", "create", "op", "--admin", *where)
    listed = mrss("keys", "list", *where)
    assert key not in listed.out
    rows = [line.split() for line in listed.out.splitlines()]
    assert rows[0] == ["ID", "KIND", "CREATED", "LIMITS"]
    assert [(row[0], row[1], row[3]) for row in rows[1:]] == [
        ("alice", "user", "max_concurrent=3"),
        ("op", "admin", "-"),
    ]
    as_json = [json.loads(x) for x in mrss("keys", "list", "--json", *where).out.splitlines()]
    assert as_json[0]["max_concurrent"] == 3
    assert mrss("keys", "revoke", "alice", *where).code == 0
    assert [found.id for found in read_keys(file)] == ["op"]


def test_failures_are_one_sentence(tmp_path):
    where = ("--keys-file", str(tmp_path / "keys.jsonl"))
    mrss("keys", "create", "alice", *where)
    for args, words in (
        (("create", "alice"), "there is a key 'alice'"),
        (("create", "a b"), "a key's id must have"),
        (("revoke", "bob"), "there is no key 'bob'"),
    ):
        result = mrss("keys", *args, *where)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        assert words in result.err


def test_a_server_that_others_reach_needs_keys():
    result = mrss("serve", "--host", "0.0.0.0", "--port", "9")
    assert result.code == 1
    assert "no API keys are set" in result.err


def test_sighup_reads_the_keys_again(tmp_path):
    file, socket = tmp_path / "keys.jsonl", tmp_path / "s"
    where = ("--keys-file", str(file))
    mrss("keys", "create", "alice", *where)
    command = [sys.executable, "-c", SERVER, str(socket), str(file)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    server = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert any("listening on" in line for line in server.stderr)
        os.kill(server.pid, signal.SIGHUP)
        assert any("read 1 API keys" in line for line in server.stderr)
        key = mrss("keys", "create", "bob", *where).out.strip()
        transport = httpx.HTTPTransport(uds=str(socket))
        with httpx.Client(transport=transport, base_url="http://engine") as client:
            headers = {"authorization": f"Bearer {key}"}
            # Without a signal the file is looked at once a second.
            while client.get("/version", headers=headers).status_code == 401:
                time.sleep(0.05)
            assert client.get("/version").status_code == 401
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0
