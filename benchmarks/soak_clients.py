"""Clients of a soak, those that behave and those that do not, each in its own manner."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import killed_client
from killed_client import raw_request

from mrss_provider.backend import GenerateRequest, Message, MixtureOptions
from mrss_provider.client import Client
from mrss_provider.errors import (
    EngineUnavailableError,
    InvalidRequestError,
    MRSSError,
    QueueFullError,
    RequestTimeoutError,
)
from mrss_provider.sampling_params import SamplingParams

MODELS = (
    "base",
    "knowledge",
    "tone",
    "knowledge+tone",
    "base:0.2+tone:0.8~linear~fixed",
    "knowledge+tone~geometric",
    "knowledge+tone~route",
)
QUESTIONS = (
    "Who keeps the bakery?",
    "Tell me a joke.",
    "Hello! " * 60,
    "Where is the harbour? " * 20,
)
CHECKED = {"model": "knowledge+tone", "prompt": "Hello", "max_tokens": 12, "seed": 7}
CHECKED |= {"temperature": 1.0, "ignore_eos": True}

Call = Callable[[], Coroutine[Any, Any, str]]


class Clients:
    """Everybody who asks, and what became of them.

    Attributes:
        ends: how requests ended; what nobody could expect is "failed" or "wrong".
        failures: what the first unexpected ones said.
        first_ms: from request to first token, of answers that were read to their end.
        whole_ms: to the last.
    """

    def __init__(self, socket_path: Path, rng: random.Random) -> None:
        self.ends: Counter[str] = Counter()
        self.failures: list[str] = []
        self.first_ms: list[float] = []
        self.whole_ms: list[float] = []
        self._rng = rng
        self._path = socket_path
        self._client = Client(f"unix://{socket_path}")
        transport = httpx.AsyncHTTPTransport(uds=str(socket_path))
        self._http = httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=120.0
        )
        self._expected: str | None = None
        self._kinds: dict[Call, float] = {
            self.read_all: 8,
            self.read_whole: 4,
            self.check: 2,
            self.leave: 3,
            self.cancel: 2,
            self.read_slowly: 1,
            self.talk: 2,
            self.ask_nonsense: 1,
            self.be_impatient: 1,
        }
        # Each kind comes once before chance decides, however short the soak is.
        self._unasked = list(self._kinds)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()
        await self._http.aclose()

    async def work(self, until: float, pause_s: float) -> None:
        """Ask one request after the other, of random kinds, until a monotonic time."""
        calls, weights = list(self._kinds), list(self._kinds.values())
        while time.monotonic() < until:
            (call,) = self._rng.choices(calls, weights)
            if self._unasked:
                call = self._unasked.pop()
            try:
                end = await call()
            except QueueFullError:
                end = "busy"
            except (MRSSError, httpx.HTTPError, AssertionError, OSError) as exc:
                end = self.failed(f"{call.__name__}: {exc!r}")
            self.ends[end] += 1
            await asyncio.sleep(self._rng.random() * 2 * pause_s)

    def failed(self, why: str) -> str:
        """Note what nobody could expect."""
        if len(self.failures) < 20:
            self.failures.append(why[:300])
        return "failed"

    async def read_all(self) -> str:
        """Read a streamed answer to its end."""
        begun = time.monotonic()
        first = None
        stream = await self._client.open(self._request())
        try:
            async for delta in stream:
                if first is None and delta.num_tokens:
                    first = time.monotonic()
        finally:
            await stream.aclose()
        if first is not None:
            self.first_ms.append(1e3 * (first - begun))
        self.whole_ms.append(1e3 * (time.monotonic() - begun))
        return "answered"

    async def read_whole(self) -> str:
        """Wait for an answer in one piece."""
        body = {"model": self._rng.choice(MODELS), "max_tokens": self._rng.randint(1, 40)}
        response = await self._post("/v1/completions", {**body, "prompt": "Hello"})
        return "answered" if response.status_code == 200 else "busy"

    async def check(self) -> str:
        """Ask what has one right answer, whatever else goes on."""
        response = await self._post("/v1/completions", CHECKED)
        if response.status_code != 200:
            return "busy"
        text = response.json()["choices"][0]["text"]
        if self._expected is None:
            self._expected = text
        if text != self._expected:
            self.failed(f"{text!r} came instead of {self._expected!r}")
            return "wrong"
        return "checked"

    async def leave(self) -> str:
        """Leave after the first token."""
        stream = await self._client.open(self._request(max_tokens=60))
        try:
            async for delta in stream:
                if delta.usage is None:
                    break
        finally:
            await stream.aclose()
        return "left"

    async def cancel(self) -> str:
        """Leave at any moment, before or after admission."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._rng.random() * 0.1):
                await self.read_all()
        return "cancelled"

    async def read_slowly(self) -> str:
        """Take a few bytes of the answer at a time, and leave in mid-answer every other time."""
        reader, writer = await asyncio.open_unix_connection(str(self._path), limit=1024)
        body = {"model": "tone", "prompt": "Hello", "max_tokens": 40, "stream": True}
        writer.write(raw_request(body))
        most = self._rng.choice((20, 10_000))
        try:
            for _ in range(most):
                if not (data := await reader.read(512)) or b"[DONE]" in data:
                    break
                await asyncio.sleep(0.02)
        finally:
            writer.close()
        return "read slowly"

    async def talk(self) -> str:
        """Begin a session, go on with it, branch off, forget both."""
        begin = {"model": "tone", "messages": [{"role": "user", "content": "Who are you?"}]}
        made = await self._post("/v1/sessions", begin)
        if made.status_code == 429:
            return "busy"
        assert made.status_code == 201, made.text
        ids = [made.json()["id"]]
        goes_on = {
            "model": "tone",
            "messages": [{"role": "user", "content": "And then?"}],
            "max_tokens": 16,
            "mrss": {"session": ids[0], "save": True},
        }
        try:
            answer = await self._post("/v1/chat/completions", goes_on)
            assert answer.status_code in (200, 429), answer.text
            forked = await self._post(f"/v1/sessions/{ids[0]}/fork", {})
            assert forked.status_code == 201, forked.text
            ids.append(forked.json()["id"])
        finally:
            for session_id in ids:
                await self._http.delete(f"/v1/sessions/{session_id}")
        return "talked"

    async def ask_nonsense(self) -> str:
        """Ask for a name that nothing has."""
        try:
            stream = await self._client.open(
                GenerateRequest("nobody", SamplingParams(), prompt="x")
            )
        except InvalidRequestError:
            return "refused"
        await stream.aclose()
        return self.failed("a name that nothing has was served")

    async def be_impatient(self) -> str:
        """Have a deadline that passes before the end."""
        request = self._request(max_tokens=200, timeout_s=0.05)
        try:
            stream = await self._client.open(request)
            try:
                async for _ in stream:
                    pass
            finally:
                await stream.aclose()
        except (RequestTimeoutError, EngineUnavailableError):
            return "timed out"
        return "answered"

    async def kill_some(self, until: float, every_s: float) -> None:
        """Start clients in processes of their own and kill them, until a monotonic time."""
        while time.monotonic() < until:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                killed_client.__file__,
                str(self._path),
                stdout=asyncio.subprocess.PIPE,
            )
            assert child.stdout is not None
            await child.stdout.readline()
            await asyncio.sleep(self._rng.random() * 0.5)
            child.kill()
            await child.wait()
            self.ends["killed"] += killed_client.NUM_STREAMS
            await asyncio.sleep(every_s)

    def _request(self, max_tokens: int = 40, timeout_s: float = 120.0) -> GenerateRequest:
        rng = self._rng
        model = rng.choice(MODELS)
        sampling = SamplingParams(
            max_tokens=rng.randint(1, max_tokens),
            seed=rng.getrandbits(32),
            stop=rng.choice(((), ("the",), ("\n", "matey"))),
            repetition_penalty=rng.choice((1.0, 1.1)),
            logprobs=rng.random() < 0.2,
            ignore_eos=rng.random() < 0.3,
        )
        weights = {"tone": rng.random() + 0.1} if model == "knowledge+tone" else None
        shared: dict[str, Any] = {
            "n": rng.choice((1, 1, 1, 2)),
            "mixture": MixtureOptions(weights=weights),
            "timeout_s": timeout_s,
        }
        question = rng.choice(QUESTIONS)
        if rng.random() < 0.3:
            return GenerateRequest(model, sampling, prompt=question, **shared)
        return GenerateRequest(model, sampling, messages=(Message("user", question),), **shared)

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        response = await self._http.post(path, json=body)
        if response.status_code not in (200, 201, 429):
            raise AssertionError(f"{path}: {response.status_code} {response.text[:200]}")
        return response
