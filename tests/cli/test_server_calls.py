"""What a command says when something else than an engine answers it, such as a reverse proxy."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from command import mrss

PAGE = b"<html>nobody is here</html>"
ANSWERS = {
    "bad": (502, {}, PAGE),
    "late": (504, {}, PAGE),
    "broken": (500, {}, b'{"detail": "oh"}'),
    "closed": (401, {}, PAGE),
    "moved": (301, {"location": "https://there/x"}, b""),
    "nowhere": (404, {}, b'{"detail": "Not Found"}'),
    "absent": (404, {}, b'{"error": {"code": "not_found", "message": "no session absent"}}'),
    "down": (503, {}, b'{"error": {"code": "engine_unavailable", "message": "it drains"}}'),
    "login": (200, {"content-type": "text/html"}, PAGE),
}


class _Other(BaseHTTPRequestHandler):
    """Answers by the id of the session that is asked for."""

    def do_GET(self) -> None:
        status, headers, body = ANSWERS[self.path.split("/")[3]]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Other) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("session", "said"),
    [
        ("bad", "no engine answers behind {0}: what stands before it said status 502"),
        ("late", "what stands before the engine at {0} waited no longer for it (status 504)"),
        ("broken", "what stands before the engine at {0} answered with status 500"),
        ("closed", "what stands before the engine at {0} answered with status 401"),
        ("moved", "{0} is not where the engine is: it redirects to https://there/x; name that"),
        ("nowhere", "{0} is not an mrss engine (no /v1/sessions/nowhere there)"),
        ("absent", "no session absent"),
        ("down", "it drains"),
        ("login", "{0} is not an mrss engine (no /v1/sessions/login there)"),
    ],
)
def test_who_answered_is_told(address: str, session: str, said: str) -> None:
    found = mrss("session", "show", session, "--server", address)
    assert (found.code, found.out) == (1, "")
    assert found.err.startswith(f"error: {said.format(address)}")


def test_a_page_of_somebody_else_is_no_session(address: str, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    found = mrss("session", "export", "login", file, "--server", address)
    assert found.code == 1
    assert "is not an mrss engine (no /v1/sessions/login/export there)" in found.err
    assert not file.exists()
