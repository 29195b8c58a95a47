"""The engine's server on a Unix socket, in a thread of the test process, over a scripted backend.

What an answer does is told by the prompt, so that tests which share a proxy share no script.
"""

import socket
import struct
import threading
from array import array
from dataclasses import replace

import uvicorn
from fakes import FINGERPRINT, PROMPT_TOKENS, SUMMARY, FakeBackend, Wait, text, traced
from uvicorn.protocols.http.h11_impl import H11Protocol

from mrss_provider.backend import Delta, Embeddings, TokenLogprob, ToolCallDelta
from mrss_provider.errors import ContextLengthError, QueueFullError, UnknownNameError
from mrss_provider.mixture import parse_mixture
from mrss_provider.server.app import create_app

KNOWN = ("base", "knowledge", "tone")
WORDS = (" one", " two", " three")
CALLS = (
    Delta(reasoning="Hm.", num_tokens=1),
    Delta(tool_calls=(ToolCallDelta(0, "call_0", "paint", '{"a":'),), num_tokens=1),
    Delta(tool_calls=(ToolCallDelta(0, arguments=" 1}"),), num_tokens=1),
    Delta(tool_calls=(ToolCallDelta(1, "call_1", "paint", "{}"),), num_tokens=1),
    Delta(finish_reason="tool_calls"),
)
WAIT_S = 10.0


def user(prompt="Hi"):
    """Return the messages of a chat that asks this."""
    return [{"role": "user", "content": prompt}]


class ScriptedBackend(FakeBackend):
    """Answers WORDS, or as the prompt says.

    "call ..." thinks and calls twice, "wait first ..." and "wait later ..." block before or after
    the first word, "full" and "too long" are refused, "break" breaks off with an error that is
    none of ours.
    """

    def __init__(self):
        super().__init__(self._script)
        self._waits = {}
        self._opened = threading.Condition()

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
        stream = await super().open(request)
        with self._opened:
            self._opened.notify_all()
        return stream

    async def embed(self, request):
        """Return vectors that tell how long each input is."""
        vectors = tuple(array("f", [len(text), 1.0]) for text in request.inputs)
        return Embeddings(request.model, FINGERPRINT, vectors, PROMPT_TOKENS)

    def asked(self, prompt):
        """Return (request, stream) of every admitted request with this prompt."""
        pairs = zip(self.requests, self.streams, strict=True)
        return [(request, stream) for request, stream in pairs if prompt_of(request) == prompt]

    def blocked(self, prompt):
        """Return the stream that answers `prompt`, once it blocks."""
        with self._opened:
            assert self._opened.wait_for(lambda: self.asked(prompt), WAIT_S)
        assert self._waits[prompt].reached.wait(WAIT_S)
        ((_, stream),) = self.asked(prompt)
        return stream

    def _script(self, request):
        prompt = prompt_of(request)
        words = [text(word) for word in WORDS]
        if request.sampling.logprobs:
            words = [
                replace(word, logprobs=(TokenLogprob(i, word.text.encode(), -float(i)),))
                for i, word in enumerate(words)
            ]
        if request.mixture.trace:
            words = [traced(word.text) for word in words]
            words[-1] = replace(words[-1], finish_reason="stop", trace_summary=SUMMARY)
        if prompt.startswith("wait"):
            wait = self._waits[prompt] = Wait()
            return [wait, *words] if "first" in prompt else [words[0], wait, *words[1:]]
        if prompt.startswith("call"):
            return CALLS
        if prompt == "break":
            return [words[0], ZeroDivisionError("a secret")]
        return words


def prompt_of(request):
    """Return the text that the test sent."""
    return request.prompt if request.messages is None else request.messages[-1].content


class EngineThread:
    """The server over `backend`, on a Unix socket and on TCP, from construction to `stop`.

    Attributes:
        url: the TCP address.
        peers: ids of the processes that connected to the socket.
    """

    def __init__(self, backend, config):
        self.peers = peers = set()

        class Protocol(H11Protocol):
            def connection_made(self, transport):
                peer = transport.get_extra_info("socket")
                if peer.family == socket.AF_UNIX:
                    peers.add(_peer_pid(peer))
                super().connection_made(transport)

        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind(str(config.socket))
        tcp = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{tcp.getsockname()[1]}"
        uvicorn_config = uvicorn.Config(
            create_app(backend, config), http=Protocol, log_config=None, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(uvicorn_config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [unix, tcp]}, daemon=True
        )
        self._thread.start()

    def stop(self):
        self._server.should_exit = True
        self._thread.join(5)


def _peer_pid(peer):
    size = struct.calcsize("3i")
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return struct.unpack("3i", raw)[0]
