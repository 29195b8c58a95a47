"""The log: one form for people, one for machines, and never what was asked or answered."""

import json
import logging

import pytest
from fakes import FakeBackend, text
from starlette.testclient import TestClient

from mrss_provider.config import ServerConfig
from mrss_provider.errors import ContextLengthError, QueueFullError
from mrss_provider.server.app import create_app
from mrss_provider.server.logs import JsonFormatter, log_to_stderr

SECRET = "Xylophon-geheim"


def line_of(caplog) -> dict:
    return json.loads(JsonFormatter().format(caplog.records[-1]))


def test_a_json_line_has_the_fields_of_its_record(caplog):
    caplog.set_level(logging.INFO)
    logging.getLogger("mrss_provider.x").info(
        "r%d ended", 7, extra={"fields": {"request_id": "r7", "completion_tokens": 4}}
    )
    line = line_of(caplog)
    assert line["message"] == "r7 ended"
    assert (line["level"], line["logger"]) == ("INFO", "mrss_provider.x")
    assert (line["request_id"], line["completion_tokens"]) == ("r7", 4)
    assert line["time"].endswith("Z")


def test_a_json_line_stays_one_line_with_an_exception(caplog):
    try:
        raise ValueError("bang\nbang")
    except ValueError:
        logging.getLogger("mrss_provider.x").exception("a\nb")
    formatted = JsonFormatter().format(caplog.records[-1])
    assert "\n" not in formatted
    assert "ValueError: bang" in json.loads(formatted)["exception"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_goes_to_stderr(form, capsys):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        log_to_stderr(form)
        logging.getLogger("mrss_provider.x").info("hello")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "hello" in shown.err
    assert shown.err.startswith("{") == (form == "json")


BACKENDS = {
    "answered": FakeBackend([text(SECRET)]),
    "refused": FakeBackend(open_error=QueueFullError("full")),
    "too long": FakeBackend(open_error=ContextLengthError("too long")),
    "defect": FakeBackend(open_error=RuntimeError("bang")),
    "broken": FakeBackend([text("a"), QueueFullError("later")]),
    "broken by a defect": FakeBackend([text("a"), RuntimeError("bang")]),
}
BODIES = {
    "good": {"messages": [{"role": "user", "content": SECRET}]},
    "bad role": {"messages": [{"role": SECRET, "content": SECRET}]},
    "bad key": {"messages": [{"role": "user", "content": SECRET}], "tools": [SECRET]},
    "bad stop": {"messages": [{"role": "user", "content": SECRET}], "stop": [1, SECRET]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("body", BODIES)
def test_no_log_line_holds_what_was_asked_or_answered(kind, body, stream, caplog):
    caplog.set_level(logging.DEBUG)
    app = create_app(BACKENDS[kind], ServerConfig())
    asked = {"model": "tone", "stream": stream, **BODIES[body]}
    with TestClient(app, base_url="http://127.0.0.1:9000", raise_server_exceptions=False) as client:
        client.post("/v1/chat/completions", json=asked)
        client.post("/v1/chat/completions", content=json.dumps(asked)[:-1])
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "asyncio"))]
    form = JsonFormatter()
    assert not any(SECRET in form.format(record) for record in ours)
