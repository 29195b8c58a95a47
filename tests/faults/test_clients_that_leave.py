"""A client that is gone at any byte, of its request or of the answer, leaves nothing behind."""

import json
import socket

import pytest
from served import BODY, served


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served")) as found:
        yield found


def request_bytes(stream):
    body = json.dumps({**BODY, "max_tokens": 60 if stream else 8, "stream": stream}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        # Else the server would keep the connection, and reading on would wait.
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def connect(server):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(str(server.socket))
    return client


def read(client, most):
    """Read up to `most` bytes; return how many came."""
    count = 0
    while count < most and (data := client.recv(min(4096, most - count))):
        count += len(data)
    return count


def check_served(server, expected):
    server.wait_idle()
    assert server.text() == expected


def test_in_mid_request(server):
    expected = server.text()
    whole = request_bytes(stream=True)
    for size in [*range(0, len(whole), 13), len(whole)]:
        with connect(server) as client:
            client.sendall(whole[:size])
    check_served(server, expected)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_in_mid_answer(server, stream):
    expected = server.text()
    size = 0
    is_complete = False
    while not is_complete:
        with connect(server) as client:
            client.sendall(request_bytes(stream))
            is_complete = read(client, size) < size
            if size % 2:
                # Gone without a word, as a machine whose power was cut.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        # Events of a stream are much alike.
        size += (61 if stream else 119) if size < 900 else 900
        is_complete = is_complete or size > 6000
    check_served(server, expected)


def test_many_at_once_before_they_read_anything(server):
    expected = server.text()
    clients = [connect(server) for _ in range(40)]
    for number, client in enumerate(clients):
        client.sendall(request_bytes(stream=bool(number % 2)))
    for client in clients:
        client.close()
    check_served(server, expected)
