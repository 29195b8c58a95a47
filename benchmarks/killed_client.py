"""A client that opens streams, hardly reads them, and waits to be killed; standard library only.

python benchmarks/killed_client.py SOCKET
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

NUM_STREAMS = 4


def raw_request(body: dict[str, Any]) -> bytes:
    """Return a completion request as it goes over the wire."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def main(path: str) -> None:
    """Open streams and read a little of each, for ever."""
    body = {"model": "tone", "prompt": "Hello", "max_tokens": 200, "stream": True}
    clients = []
    for _ in range(NUM_STREAMS):
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        client.sendall(raw_request(body | {"ignore_eos": True}))
        clients.append(client)
    print("asked", flush=True)
    while True:
        for client in clients:
            client.recv(64)
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1])
