"""Several tasks, or threads, that read one stream."""

import asyncio
import threading
from concurrent.futures import Future

import pytest
from fakes import Wait, text
from test_streams import HI, WAIT_S, contents, finish_reasons

from mrss_provider.errors import EngineUnavailableError
from mrss_provider.provider.answers import RunningAnswer
from mrss_provider.provider.streams import ChunkStream


@pytest.mark.parametrize("is_async", [True, False])
def test_two_who_read_one_stream_both_come_to_its_end(provider, backend, is_async):
    wait = Wait()
    backend.script = [text("a"), wait, text("b")]
    chunks = []

    async def read(stream):
        chunks.extend([chunk async for chunk in stream])

    async def main(stream):
        reading = asyncio.gather(read(stream), read(stream))
        await asyncio.to_thread(wait.reached.wait)
        await asyncio.sleep(0)
        wait.go.set()
        await asyncio.wait_for(reading, WAIT_S)

    stream = provider.astreaming(model="base", messages=HI, optional_params={})
    if is_async:
        asyncio.run(main(stream))
    else:
        threads = [threading.Thread(target=lambda: chunks.extend(stream)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait.reached.wait()
        wait.go.set()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)
    assert sorted(contents(chunks)) == ["a", "b"]
    assert finish_reasons(chunks) == {0: "stop"}
    assert len(chunks) == 4


class TwoTakes:
    """An answer of one delta, which is held back until somebody has taken the end."""

    def __init__(self):
        self.num_takes = 0
        self.has_ended = threading.Event()

    info = None

    def take_blocking(self):
        self.num_takes += 1
        if self.num_takes == 1:
            self.has_ended.wait(0.1)
            return ["a"]
        self.has_ended.set()
        return []

    def cancel(self):
        pass


class Written(list):
    """Chunks in the order in which they are written."""

    def write(self, deltas, info):
        self.extend(deltas)
        return deltas

    def end(self):
        self.append("end")
        return ["end"]


def test_what_one_thread_takes_comes_before_what_the_next_takes():
    written = Written()
    stream = ChunkStream(TwoTakes(), written, "base")
    threads = [threading.Thread(target=next, args=(stream,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert written == ["a", "end"]


def test_a_reader_whose_loop_is_closed_ends_nothing_for_the_other(provider, backend):
    backend.script = [wait := Wait(), text("a")]
    stream = provider.astreaming(model="base", messages=HI, optional_params={})
    woken = threading.Event()

    def gone():
        raise RuntimeError("Event loop is closed")

    for wake in (gone, woken.set):
        assert stream._answer._take_or_arm(wake) is None
    wait.go.set()
    assert woken.wait(WAIT_S)
    chunks = list(stream)
    assert contents(chunks) == ["a"]
    assert finish_reasons(chunks) == {0: "stop"}


def test_who_is_woken_for_what_another_has_taken_sleeps_again(provider, backend, monkeypatch):
    answer = provider.astreaming(model="base", messages=HI, optional_params={})._answer
    wakes = []
    is_late = threading.Event()

    def late(wake):
        is_late.set()
        wake()

    def take_or_arm(wake):
        wakes.append(wake)
        if len(wakes) == 1:
            wake()
        elif len(wakes) == 2:
            threading.Timer(0.05, late, [wake]).start()
        else:
            assert is_late.is_set()
            return []
        return None

    monkeypatch.setattr(answer, "_take_or_arm", take_or_arm)
    assert answer.take_blocking() == []


class StoppedThread:
    """An I/O thread that ends before it has begun what it was given."""

    def submit(self, coroutine):
        coroutine.close()
        given = Future()
        given.cancel()
        return given


def test_who_reads_a_stream_that_never_began_is_told():
    answer = RunningAnswer(StoppedThread(), open_stream=None, timeout_s=1)
    met = []

    def read():
        try:
            answer.take_blocking()
        except EngineUnavailableError as exc:
            met.append(exc)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(1)
    assert [str(exc) for exc in met] == ["the answer was cancelled"]
    with pytest.raises(EngineUnavailableError, match="cancelled"):
        answer.wait_admitted(1)
