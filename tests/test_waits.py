"""Refusing early: a request that would start too late is told so when it comes."""

import math
from types import SimpleNamespace

import pytest

from mrss_provider.async_engine.thread import EngineThread
from mrss_provider.async_engine.waits import Queueing, Waits
from mrss_provider.errors import QueueFullError


class Queue:
    """An engine with a queue that we move."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self.num_started = 0

    def num_before(self, owner: str) -> int:
        return 1 if owner == "guest" else self.num_waiting


def watched(*, interval_s: float, num_waiting: int = 10) -> tuple[Queue, Waits]:
    """Return a queue whose requests have got their rows one every `interval_s` seconds."""
    now, queue = [0.0], Queue()
    waits = Waits(queue, clock=lambda: now[0])
    queue.num_waiting = num_waiting
    for _ in range(20):
        waits.note()
        now[0] += interval_s
        queue.num_started += 1
    return queue, waits


def test_the_estimate_is_what_the_queue_took():
    queue, waits = watched(interval_s=2.0)
    assert isinstance(queue, Queueing)
    # Ten before it and itself, two seconds each.
    waits.check("flood", 22.1)
    with pytest.raises(QueueFullError, match="would wait about 22 s") as caught:
        waits.check("flood", 21.9)
    assert caught.value.retry_after_s == pytest.approx(22.0)


def test_an_owner_whose_turn_comes_sooner_waits_less():
    _, waits = watched(interval_s=2.0)
    waits.check("guest", 5.0)


def test_nobody_is_refused_where_nobody_waits():
    queue, waits = watched(interval_s=2.0)
    queue.num_waiting = 0
    waits.check("flood", 0.0)


def test_nobody_is_refused_before_anything_is_known():
    queue = Queue()
    waits = Waits(queue)
    queue.num_waiting = 5
    waits.note()
    waits.check("flood", 0.001)


def test_who_has_no_deadline_waits():
    _, waits = watched(interval_s=1000.0)
    waits.check("flood", math.inf)


def test_an_idle_time_is_no_interval():
    now, queue = [0.0], Queue()
    waits = Waits(queue, clock=lambda: now[0])
    for _ in range(5):
        queue.num_waiting = 0
        waits.note()
        now[0] += 3600.0
        queue.num_waiting = 2
        waits.note()
        for _ in range(3):
            now[0] += 0.5
            queue.num_started += 1
            waits.note()
    waits.check("flood", 1.6)


class StuckEngine(Queue):
    """Never has rows for anybody; each step takes as long as the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.added = []
        self.has_work = False

    def add(self, request) -> None:
        self.added.append(request)

    def abort(self, request_id, index=None) -> None:
        pass

    def step(self) -> list:
        return []

    def close(self) -> None:
        pass


class NoSink:
    loop = None


def test_the_thread_refuses_before_the_engine_is_asked(monkeypatch):
    engine = StuckEngine()
    thread = EngineThread(lambda: engine)
    monkeypatch.setattr(
        Waits, "check", lambda self, owner, within_s: refuse() if within_s < 5 else None
    )
    thread.start()
    thread.loaded.result(10)
    asked = SimpleNamespace(id="r0", n=1, owner="a")
    with pytest.raises(QueueFullError):
        thread.add(asked, NoSink, 4.0).result(10)
    assert not engine.added
    thread.add(asked, NoSink, 6.0).result(10)
    assert engine.added == [asked]
    thread.abort("r0")
    thread.stop()
    thread.join(10)


def refuse():
    raise QueueFullError("later")
