"""With many streams tokens are written together: none late, none lost, the first one at once."""

import asyncio
import contextlib
import json

import pytest
from virtual_clock import run_virtually

from mrss_provider.backend import Delta, StreamInfo, TextPiece, Usage
from mrss_provider.config import ServerConfig
from mrss_provider.errors import EngineError
from mrss_provider.server.app import create_app
from mrss_provider.server.pacing import Pacer
from mrss_provider.server.stalls import KnowsConnection

LONGEST_S = 0.01
STEP_S = 0.004
MANY = 300
BODY = {
    "model": "tone",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "stream_options": {"include_num_tokens": True, "include_usage": True},
}
BOTH_WAYS = pytest.mark.parametrize("by_calls", [False, True])
# Rounding of the clock, and turns that are taken together.
SLACK_S = 6e-4


class StepStream:
    """A word each step; a reader that comes late gets all that have come as one delta."""

    def __init__(self, num_words, error=None):
        self.info = StreamInfo("tone", 1, "f", 1)
        self.made = []
        self.is_closed = False
        self._loop = asyncio.get_running_loop()
        self._num_words = num_words
        self._error = error
        self._num_taken = 0
        self._has_told_usage = False
        self._made_one = asyncio.Event()
        self._maker = asyncio.create_task(self._make())

    async def _make(self):
        for _ in range(self._num_words):
            await asyncio.sleep(STEP_S)
            self.made.append(self._loop.time())
            self._made_one.set()
            self._tell()

    def _tell(self):
        pass

    def __aiter__(self):
        return self

    def ready(self):
        return self._num_taken < len(self.made) or self._maker.done()

    async def __anext__(self):
        while not self.ready():
            self._made_one.clear()
            await self._made_one.wait()
        start, self._num_taken = self._num_taken, len(self.made)
        words = "".join(f" {n}" for n in range(start, self._num_taken))
        is_end = self._num_taken == self._num_words
        if words:
            reason = "length" if is_end and self._error is None else None
            return Delta(text=words, num_tokens=self._num_taken - start, finish_reason=reason)
        if self._error is not None:
            raise self._error
        if self._has_told_usage:
            raise StopAsyncIteration
        self._has_told_usage = True
        return Delta(usage=Usage(1, self._num_words))

    async def aclose(self):
        self.is_closed = True
        self._maker.cancel()


class CallingStream(StepStream):
    """The same for a reader that is called."""

    _call = None

    def take_text(self):
        start, end = self._num_taken, len(self.made)
        if start == end or (end == self._num_words and self._error is None):
            return None
        self._num_taken = end
        return TextPiece(0, "".join(f" {n}" for n in range(start, end)), end - start)

    def call_when_ready(self, call):
        self._call = call

    def _tell(self):
        call, self._call = self._call, None
        if call is not None:
            call()


class StepBackend:
    def __init__(self, num_words, error=None, new_stream=StepStream):
        self.streams = []
        self._arguments = num_words, error
        self._new_stream = new_stream

    async def open(self, request):
        self.streams.append(self._new_stream(*self._arguments))
        return self.streams[-1]

    async def models(self):
        return []

    async def aclose(self):
        return None


async def post(app, left=None):
    """Post `BODY`, hang up at `left`; return (time, bytes) of what was sent."""
    sent = []
    messages = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        if left is None:
            await asyncio.sleep(3600)
        else:
            await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message.get("body"):
            sent.append((asyncio.get_running_loop().time(), message["body"]))

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    return sent


def chunks_of(sent):
    """Return (time, chunk) of each event but the last."""
    events = [(when, event) for when, body in sent for event in body.split(b"\n\n") if event]
    assert events[-1][1] == b"data: [DONE]" or b'"error"' in events[-1][1]
    return [(when, json.loads(event[6:])) for when, event in events if b"[DONE]" not in event]


def answers(num_streams, num_words, error=None, pacing_ms=1e3 * LONGEST_S, *, by_calls=False):
    """Return the streams of a server, and what each of their readers got."""

    async def main():
        backend = StepBackend(num_words, error, CallingStream if by_calls else StepStream)
        app = KnowsConnection(create_app(backend, ServerConfig(pacing_ms=pacing_ms)))
        sent = await asyncio.gather(*(post(app) for _ in range(num_streams)))
        return backend.streams, sent

    return run_virtually(main())


def arrivals(chunks):
    """Return when each token of an answer came."""
    return [
        when
        for when, chunk in chunks
        for choice in chunk.get("choices", [])
        for _ in range(choice["num_tokens"])
    ]


@BOTH_WAYS
def test_no_token_waits_longer_than_it_may_and_the_first_not_at_all(by_calls):
    streams, sent = answers(MANY, 40, by_calls=by_calls)
    for stream, own in zip(streams, sent, strict=True):
        came = arrivals(chunks_of(own))
        late = [when - made for when, made in zip(came, stream.made, strict=True)]
        assert late[0] == 0.0
        assert max(late) <= LONGEST_S + SLACK_S
    num_events = len(chunks_of(sent[0]))
    assert num_events <= 40 * STEP_S / LONGEST_S + 4


@BOTH_WAYS
def test_nothing_is_lost_and_the_end_comes_last(by_calls):
    _, sent = answers(MANY, 25, by_calls=by_calls)
    for own in sent:
        *content, usage = [chunk for _, chunk in chunks_of(own)]
        texts = [chunk["choices"][0]["delta"]["content"] for chunk in content]
        assert "".join(texts) == "".join(f" {n}" for n in range(25))
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in content]
        assert reasons == [None] * (len(content) - 1) + ["length"]
        assert usage["usage"]["completion_tokens"] == 25


@BOTH_WAYS
def test_an_error_comes_after_every_token_before_it(by_calls):
    _, sent = answers(MANY, 7, EngineError("the engine failed"), by_calls=by_calls)
    for own in sent:
        *content, last = [chunk for _, chunk in chunks_of(own)]
        assert sum(chunk["choices"][0]["num_tokens"] for chunk in content) == 7
        assert last["error"]["message"] == "the engine failed"


@BOTH_WAYS
@pytest.mark.parametrize(("num_streams", "pacing_ms"), [(1, 10.0), (32, 10.0), (MANY, 0.0)])
def test_few_streams_and_a_pace_of_zero_hold_nothing_back(num_streams, pacing_ms, by_calls):
    streams, sent = answers(num_streams, 20, pacing_ms=pacing_ms, by_calls=by_calls)
    for stream, own in zip(streams, sent, strict=True):
        assert arrivals(chunks_of(own)) == stream.made


@BOTH_WAYS
def test_who_hangs_up_while_waiting_ends_at_once_and_holds_up_nobody(by_calls):
    async def main():
        backend = StepBackend(50, new_stream=CallingStream if by_calls else StepStream)
        app = KnowsConnection(create_app(backend, ServerConfig(pacing_ms=1e3 * LONGEST_S)))
        left = asyncio.Event()
        readers = [asyncio.create_task(post(app, left if n % 2 else None)) for n in range(MANY)]
        # Between two events of everybody.
        await asyncio.sleep(2.5 * STEP_S)
        left.set()
        await asyncio.sleep(0.001)
        closed = [stream.is_closed for stream in backend.streams]
        return backend.streams, closed, await asyncio.gather(*readers)

    streams, closed, sent = run_virtually(main())
    assert closed == [bool(n % 2) for n in range(MANY)]
    for stream, own in list(zip(streams, sent, strict=True))[::2]:
        late = [
            when - made for when, made in zip(arrivals(chunks_of(own)), stream.made, strict=True)
        ]
        assert max(late) <= LONGEST_S + SLACK_S


def test_pauses_grow_with_the_streams_up_to_the_longest():
    pacer = Pacer(LONGEST_S)
    pauses = []
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(pacer.stream())
            pauses.append(pacer.pause_s)
    assert pauses == sorted(pauses)
    assert pauses[:32] == [0.0] * 32
    assert pauses[-1] == LONGEST_S
    assert pacer.pause_s == 0.0


def test_pauses_that_begin_at_the_end_of_others_have_one_timer():
    async def main():
        pacer = Pacer(LONGEST_S)
        loop = asyncio.get_running_loop()
        turns = []

        def take_turn():
            turns.append(loop.time())
            assert len(loop._scheduled) <= 1
            if len(turns) < 50:
                pacer.call_after_pause(take_turn)

        with contextlib.ExitStack() as stack:
            for _ in range(MANY):
                stack.enter_context(pacer.stream())
            pacer.call_after_pause(take_turn)
            await asyncio.sleep(60 * LONGEST_S)
        return turns

    turns = run_virtually(main())
    assert turns == pytest.approx([LONGEST_S * n for n in range(1, 51)])


def test_turns_come_in_order_each_after_its_pause():
    async def main():
        pacer = Pacer(LONGEST_S)
        loop = asyncio.get_running_loop()
        waited = []

        async def wait(n):
            await asyncio.sleep(n * 1e-4)
            began = loop.time()
            await pacer.pause()
            waited.append((n, loop.time() - began))

        with contextlib.ExitStack() as stack:
            for _ in range(MANY):
                stack.enter_context(pacer.stream())
            await asyncio.gather(*map(wait, range(MANY)))
        return waited

    waited = run_virtually(main())
    assert [n for n, _ in waited] == list(range(MANY))
    assert all(LONGEST_S - SLACK_S <= pause <= LONGEST_S + 1e-6 for _, pause in waited)
