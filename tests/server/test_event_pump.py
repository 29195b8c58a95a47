"""Events written by calls: the same bytes as a task writes, each in its step, none lost."""

import asyncio
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from script_engine import TOKENS, Library
from virtual_clock import run_virtually

from mrss_provider.async_engine.stream import TextStream
from mrss_provider.backend import StreamInfo
from mrss_provider.config import ServerConfig
from mrss_provider.engine.request import EOS_ID, EngineRequest, TokenOutput
from mrss_provider.errors import EngineError
from mrss_provider.server.app import create_app
from mrss_provider.server.stalls import KnowsConnection

STEP_S = 0.004
STALL_S = 2.0
PIECES = TOKENS.ids("Hello", "\n\nUs", "er", "!", '"', "\\")
# And the bytes of a character of four.
IDS = st.sampled_from([*PIECES, *(1 + byte for byte in "😀".encode())])


class Backend:
    """Every answer is a `TextStream`, to which the test gives tokens.

    Attributes:
        aborted: of which requests and answers.
    """

    def __init__(self):
        self.streams = []
        self.aborted = []

    async def open(self, request):
        sampling = replace(request.sampling, max_tokens=999)
        own = EngineRequest("r", (1,), Library().resolve("tone"), sampling, n=request.n)
        info = StreamInfo("tone", 1, "f", 1)
        self.streams.append(TextStream(own, info, TOKENS, request.sampling.stop, "", self))
        return self.streams[-1]

    def abort(self, request_id, index=None):
        self.aborted.append((request_id, index))

    async def models(self):
        return []

    async def aclose(self):
        return None


class Connection:
    """An ASGI server's end of one request.

    Attributes:
        bodies: (time, bytes) of each write.
        is_open: whether the client reads; the next write waits until it does.
        left: set when the client hangs up.
    """

    def __init__(self, **fields):
        self.bodies = []
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.left = asyncio.Event()
        chat = {"model": "tone", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        options = {"include_num_tokens": True, "include_usage": True}
        self._body = json.dumps(chat | {"stream_options": options} | fields).encode()

    async def receive(self):
        if self._body:
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.is_open.wait()
        if message.get("body"):
            self.bodies.append((asyncio.get_running_loop().time(), message["body"]))

    def ask(self, app):
        """Begin the request."""
        path = "/v1/chat/completions"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
        scope |= {"query_string": b"", "headers": [(b"host", b"localhost")]}
        scope["headers"].append((b"content-type", b"application/json"))
        return asyncio.create_task(app(scope, self.receive, self.send))

    def text(self):
        """Return what was written, but for what is new in each answer."""
        return re.sub(rb'"chatcmpl-\w+"|"created":\d+', b"?", b"".join(b for _, b in self.bodies))


def app_of(backend, *, by_calls):
    app = create_app(backend, ServerConfig(stall_s=STALL_S))
    return KnowsConnection(app) if by_calls else app


async def stream_of(backend):
    """Return the stream of the request that was begun last."""
    while not backend.streams:
        await asyncio.sleep(0)
    return backend.streams[-1]


def give(stream, step):
    """Let a step's outputs come, together."""
    for output in step:
        stream.on_output(output)


def outputs_of(index, ids, end, *, logprobs):
    """Return an answer's outputs, one a step; `end` is its last one."""
    logprob = -0.5 if logprobs else None
    outputs = [TokenOutput("r", index, token_id, logprob) for token_id in ids]
    return [*outputs, replace(end, index=index)]


ENDS = st.sampled_from(
    [
        TokenOutput("r", 0, EOS_ID, finish_reason="stop"),
        TokenOutput("r", 0, TOKENS.ids("!")[0], finish_reason="length"),
        TokenOutput("r", 0, None, error=EngineError("the engine failed")),
    ]
)


@settings(max_examples=40, deadline=None)
@given(
    answers=st.lists(st.tuples(st.lists(IDS, max_size=12), ENDS), min_size=1, max_size=2),
    stop=st.lists(st.sampled_from(["\n\nUser", "!!", "Hello!"]), max_size=1),
    sizes=st.lists(st.integers(1, 10), min_size=30, max_size=30),
    logprobs=st.sampled_from([False, False, True]),
)
def test_the_bytes_are_those_that_a_task_writes(answers, stop, sizes, logprobs):
    columns = [outputs_of(n, *answer, logprobs=logprobs) for n, answer in enumerate(answers)]
    steps = [
        [column[at] for column in columns if at < len(column)]
        for at in range(max(map(len, columns)))
    ]

    async def main(by_calls):
        backend = Backend()
        connection = Connection(n=len(answers), stop=stop, logprobs=logprobs)
        asked = connection.ask(app_of(backend, by_calls=by_calls))
        stream = await stream_of(backend)
        left, sizes_left = list(steps), list(sizes)
        while left:
            # Steps that come while the reader does not look.
            size = sizes_left.pop()
            for step in left[:size]:
                give(stream, step)
            left = left[size:]
            await asyncio.sleep(STEP_S)
        await asked
        return connection.text()

    assert run_virtually(main(by_calls=True)) == run_virtually(main(by_calls=False))


@pytest.mark.parametrize("by_calls", [True, False])
def test_a_stop_string_ends_its_answer_in_the_engine_before_the_next_token(by_calls):
    async def main():
        backend, connection = Backend(), Connection(n=2, stop=["!!"])
        asked = connection.ask(app_of(backend, by_calls=by_calls))
        stream = await stream_of(backend)
        aborted = []
        for token_id in TOKENS.ids(*"ab!!"):
            give(stream, [TokenOutput("r", 1, token_id), TokenOutput("r", 0, PIECES[0])])
            await asyncio.sleep(STEP_S)
            aborted.append(list(backend.aborted))
        give(stream, [TokenOutput("r", 0, EOS_ID, finish_reason="stop")])
        await asked
        return aborted, backend.aborted

    assert run_virtually(main()) == ([[], [], [], [("r", 1)]], [("r", 1)])


def test_each_tokens_event_leaves_in_its_step_in_one_write():
    async def main():
        backend, connection = Backend(), Connection(n=2)
        asked = connection.ask(app_of(backend, by_calls=True))
        stream = await stream_of(backend)
        for token_id in TOKENS.ids(*"Hello!!!!!"):
            give(stream, [TokenOutput("r", index, token_id) for index in range(2)])
            await asyncio.sleep(STEP_S)
        give(stream, [TokenOutput("r", index, EOS_ID, finish_reason="stop") for index in range(2)])
        await asked
        return connection.bodies

    *events, end = run_virtually(main())
    assert [when for when, _ in events] == pytest.approx([STEP_S * n for n in range(10)])
    assert all(body.count(b"data: ") == 2 for _, body in events)
    assert end[1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(("logprobs", "num_passed"), [(False, 2), (True, 11)])
def test_only_what_is_not_text_alone_passes_the_layers_between(logprobs, num_passed):
    passed = []

    async def main():
        backend, connection = Backend(), Connection(logprobs=logprobs)
        app = app_of(backend, by_calls=False)

        async def layer(scope, receive, send):
            async def counted(message):
                passed.append(bool(message.get("body")))
                await send(message)

            await app(scope, receive, counted)

        asked = connection.ask(KnowsConnection(layer))
        stream = await stream_of(backend)
        for token_id in TOKENS.ids(*"Hello!!!!!"):
            give(stream, [TokenOutput("r", 0, token_id, -0.5 if logprobs else None)])
            await asyncio.sleep(STEP_S)
        give(stream, [TokenOutput("r", 0, EOS_ID, finish_reason="stop")])
        await asked
        return len(connection.bodies)

    assert run_virtually(main()) == 11
    # The first event and the last ones, if not all.
    assert sum(passed) == num_passed


def test_a_client_that_does_not_read_for_a_while_gets_all_in_order():
    text = "abcdefghij" * 5

    async def main():
        backend, connection = Backend(), Connection()
        asked = connection.ask(app_of(backend, by_calls=True))
        stream = await stream_of(backend)
        for n, token_id in enumerate(TOKENS.ids(*text)):
            if n == 10:
                connection.is_open.clear()
            if n == 30:
                connection.is_open.set()
            give(stream, [TokenOutput("r", 0, token_id)])
            await asyncio.sleep(STEP_S)
            assert n < 10 or n >= 30 or len(connection.bodies) == 10
        give(stream, [TokenOutput("r", 0, EOS_ID, finish_reason="stop")])
        await asked
        return connection.text()

    found = re.findall(rb'"content":"(\w*)"', run_virtually(main()))
    assert b"".join(found).decode() == text


def test_a_client_that_never_reads_is_dropped():
    async def main():
        backend, connection = Backend(), Connection()
        asked = connection.ask(app_of(backend, by_calls=True))
        stream = await stream_of(backend)
        loop = asyncio.get_running_loop()
        for n, token_id in enumerate(TOKENS.ids(*"ab" * 9999)):
            if n == 5:
                connection.is_open.clear()
                began = loop.time()
            give(stream, [TokenOutput("r", 0, token_id)])
            await asyncio.sleep(STEP_S)
            if asked.done():
                return asked.cancelled(), loop.time() - began, backend.aborted, connection.bodies
        return None

    is_cancelled, took_s, aborted, bodies = run_virtually(main())
    assert is_cancelled
    assert STALL_S <= took_s <= 1.6 * STALL_S
    assert aborted == [("r", None)]
    assert len(bodies) == 5


@pytest.mark.parametrize("is_open", [True, False])
def test_who_hangs_up_ends_the_answer_at_once(is_open):
    async def main():
        backend, connection = Backend(), Connection()
        asked = connection.ask(app_of(backend, by_calls=True))
        stream = await stream_of(backend)
        for n, token_id in enumerate(TOKENS.ids(*"abcdef")):
            if n == 3 and not is_open:
                connection.is_open.clear()
            give(stream, [TokenOutput("r", 0, token_id)])
            await asyncio.sleep(STEP_S)
        connection.left.set()
        await asked
        # What the engine had on its way comes to nobody.
        give(stream, [TokenOutput("r", 0, 1)])
        return backend.aborted, len(connection.bodies)

    assert run_virtually(main()) == ([("r", None)], 6 if is_open else 3)


def test_a_write_that_fails_ends_the_answer_and_nobody_elses(caplog):
    async def main():
        backend = Backend()
        connections = [Connection(), Connection()]
        app = app_of(backend, by_calls=True)
        asked = [connection.ask(app) for connection in connections]
        while len(backend.streams) < 2:
            await asyncio.sleep(0)
        for n, token_id in enumerate(TOKENS.ids(*"abcd")):
            if n == 2:
                connections[0].bodies = None
            for stream in backend.streams:
                give(stream, [TokenOutput("r", 0, token_id)])
            await asyncio.sleep(STEP_S)
        give(backend.streams[1], [TokenOutput("r", 0, EOS_ID, finish_reason="stop")])
        ends = await asyncio.gather(*asked, return_exceptions=True)
        return ends, backend.aborted, connections[1].text()

    ends, aborted, text = run_virtually(main())
    assert isinstance(ends[0], AttributeError)
    assert ends[1] is None
    assert aborted == [("r", None)]
    assert text.endswith(b"data: [DONE]\n\n")
    assert "a defect while answering" in caplog.text
