"""The engine's server on a Unix socket, in a thread of the test process, over a scripted backend.

What an answer does is told by the prompt, so that tests which share a proxy share no script.
"""

import socket
import struct
import threading
from dataclasses import replace

import uvicorn
from fakes import FakeBackend, Wait, text
from uvicorn.protocols.http.h11_impl import H11Protocol

from mrss_provider.backend import TokenLogprob
from mrss_provider.config import ServerConfig
from mrss_provider.errors import ContextLengthError, QueueFullError, UnknownNameError
from mrss_provider.mixture import parse_mixture
from mrss_provider.server.app import create_app

KNOWN = ("base", "knowledge", "tone")
WORDS = (" one", " two", " three")


class ScriptedBackend(FakeBackend):
    """Answers WORDS, or as the prompt says.

    "wait first ..." and "wait later ..." block before or after the first word, "full" and
    "too long" are refused, "break" breaks off with an error that is none of ours.
    """

    def __init__(self):
        super().__init__(_script)

    async def open(self, request):
        for term in parse_mixture(request.model).terms:
            if term.name not in KNOWN:
                raise UnknownNameError(
                    f"unknown state {term.name!r} at position {term.position}; did you mean 'tone'?"
                )
        prompt = prompt_of(request)
        if prompt == "full":
            raise QueueFullError("the queue is full", retry_after_s=2.0)
        if prompt == "too long":
            raise ContextLengthError("9000 tokens are more than the limit of 4096")
        return await super().open(request)

    def asked(self, prompt):
        """Return (request, stream) of every admitted request with this prompt."""
        pairs = zip(self.requests, self.streams, strict=True)
        return [(request, stream) for request, stream in pairs if prompt_of(request) == prompt]


def prompt_of(request):
    """Return the text that the test sent."""
    return request.prompt if request.messages is None else request.messages[-1].content


def _script(request):
    prompt = prompt_of(request)
    words = [text(word) for word in WORDS]
    if request.sampling.logprobs:
        words = [
            replace(word, logprobs=(TokenLogprob(i, word.text.encode(), -float(i)),))
            for i, word in enumerate(words)
        ]
    if prompt.startswith("wait first"):
        return [Wait(), *words]
    if prompt.startswith("wait later"):
        return [words[0], Wait(), *words[1:]]
    if prompt == "break":
        return [words[0], ZeroDivisionError("a secret")]
    return words


class EngineThread:
    """The server over `backend`, from construction to `stop`.

    Attributes:
        peers: process ids that connected.
    """

    def __init__(self, path, backend):
        self.peers = peers = set()

        class Protocol(H11Protocol):
            def connection_made(self, transport):
                peer = transport.get_extra_info("socket")
                size = struct.calcsize("3i")
                raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
                peers.add(struct.unpack("3i", raw)[0])
                super().connection_made(transport)

        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(256)
        app = create_app(backend, ServerConfig(socket=path))
        config = uvicorn.Config(app, http=Protocol, log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, daemon=True
        )
        self._thread.start()

    def stop(self):
        self._server.should_exit = True
        self._thread.join(5)
