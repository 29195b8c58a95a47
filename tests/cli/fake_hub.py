"""A Hugging Face hub on loopback: a listing, file metadata, ranged downloads, and a stall."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories in memory.

    Attributes:
        stall_after: after so many bytes of a file, hang until the client is gone.
        drop_after: after so many bytes of a file, close the connection.
        wrong_digest: announce sha256s that no file has.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos = repos
        self.requests: list[tuple[str, str, str | None]] = []
        self.stall_after: int | None = None
        self.drop_after: int | None = None
        self.stalled = threading.Event()
        self.wrong_digest = False
        self.url = ""

    def digest(self, data: bytes) -> str:
        return "0" * 64 if self.wrong_digest else hashlib.sha256(data).hexdigest()

    def ranges(self, path: str) -> list[str | None]:
        """Return the Range headers of the GETs of a file, in order."""
        return [r for method, p, r in self.requests if method == "GET" and p.endswith(path)]


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` on a free port; `hub.url` is its address."""

    class Handler(_Handler):
        fake = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.stall_after = None
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        self.fake.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/main", path):
            self._listing(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(match[1], match[2], with_body)
        else:
            self._refuse("RevisionNotFound")

    def _listing(self, repo: str) -> None:
        if repo not in self.fake.repos:
            self._refuse("RepoNotFound")
            return
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "lfs": {"sha256": self.fake.digest(data), "size": len(data), "pointerSize": 134},
            }
            for name, data in self.fake.repos[repo].items()
        ]
        body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, repo: str, name: str, with_body: bool) -> None:
        data = self.fake.repos[repo][name]
        start = int(re.findall(r"\d+", self.headers.get("Range") or "0")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if with_body:
            self._send(data[start:])

    def _send(self, data: bytes) -> None:
        cut = self.fake.stall_after or self.fake.drop_after
        self.wfile.write(data[:cut])
        if cut is not None and cut < len(data):
            self.close_connection = True
            if self.fake.stall_after:
                self.fake.stalled.set()
                # Reading the client's side of the connection ends when the client does.
                with suppress(ConnectionResetError):
                    self.rfile.read(1)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
