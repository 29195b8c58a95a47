"""A scripted engine, its library and its tokenizer: what an AsyncEngine stands on in tests."""

import asyncio
import threading
from dataclasses import replace

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.async_engine.card import Card
from mrss_provider.async_engine.loading import Loaded
from mrss_provider.backend import GenerateRequest, ModelCard
from mrss_provider.chat import TEMPLATES
from mrss_provider.config import EngineConfig
from mrss_provider.engine.request import EOS_ID, ResolvedMixture, TokenOutput
from mrss_provider.errors import UnknownNameError
from mrss_provider.mixture import Method
from mrss_provider.sampling_params import SamplingParams


class ByteTokenizer:
    """Ids 1..256 are the bytes, the ids above are the pieces given."""

    eos_id = EOS_ID

    def __init__(self, *pieces):
        self.table = {i + 1: bytes([i]) for i in range(256)}
        self.table |= {257 + i: piece for i, piece in enumerate(pieces)}

    def encode(self, text):
        return [byte + 1 for byte in text.encode()]

    def ids(self, *pieces):
        by_bytes = {token: i for i, token in self.table.items()}
        return [by_bytes[piece if isinstance(piece, bytes) else piece.encode()] for piece in pieces]

    def token_bytes(self, token_id):
        return self.table.get(token_id)

    def entries(self):
        return self.table


class ScriptEngine:
    """Gives every choice the script's tokens, one a step; `EOS_ID` ends with "stop".

    Attributes:
        gate: when set, each step waits for a permit.
    """

    def __init__(self, script=(), *, gate=None):
        self.script = script
        self.gate = gate
        self.added = []
        self.aborted = []
        self.running = {}
        self.events = threading.Condition()
        self.add_error = None
        self.check_error = None
        self.step_error = None

    def check(self, request):
        if self.check_error is not None:
            raise self.check_error

    def add(self, request):
        if self.add_error is not None:
            raise self.add_error
        self.added.append(request)
        for index in range(request.n):
            script = self.script(request, index) if callable(self.script) else self.script
            self.running[request.id, index] = iter(list(script))

    def abort(self, request_id, index=None):
        with self.events:
            self.aborted.append((request_id, index))
            for key in list(self.running):
                if key[0] == request_id and index in (None, key[1]):
                    del self.running[key]
            self.events.notify_all()

    @property
    def has_work(self):
        return bool(self.running)

    def close(self):
        self.running.clear()

    def step(self):
        if self.gate is not None:
            self.gate.acquire()
        if self.step_error is not None:
            error, self.step_error = self.step_error, None
            raise error
        outputs = []
        for (request_id, index), tokens in list(self.running.items()):
            token = next(tokens, EOS_ID)
            if isinstance(token, Exception):
                output = TokenOutput(request_id, index, None, error=token)
            elif isinstance(token, TokenOutput):
                output = replace(token, request_id=request_id, index=index)
            else:
                reason = "stop" if token == EOS_ID else None
                output = TokenOutput(request_id, index, token, finish_reason=reason)
            if output.finish_reason or output.error:
                del self.running[request_id, index]
            outputs.append(output)
        return outputs

    def wait_aborted(self, expected):
        with self.events:
            assert self.events.wait_for(lambda: expected in self.aborted, 30)


class Library:
    def resolve(self, text, options=None):
        if text == "nobody":
            raise UnknownNameError(f"no state {text!r}")
        warm = 0.25 if text == "warm" else None
        return ResolvedMixture(
            canonical=text,
            states=(None, None),
            names=("base", "base"),
            groups=("", ""),
            ratios=(1.0, 1.0),
            weights=(0.5, 0.5),
            merge=Method("linear"),
            gate=Method("fixed"),
            cut=0.0,
            base_row=0,
            fingerprint="fp",
            temperature=warm,
        )

    def cards(self):
        return [ModelCard("base", "base")]


TOKENS = ByteTokenizer(b"Hello", b" world", b"\n\nUs", b"er", "é".encode() + b"\xf0\x9f", b"!")
IDS = TOKENS.ids
WORLD = TEMPLATES["world"]


def engine_of(script, *, card=None, template=WORLD, loader=None, **config):
    """Return an AsyncEngine over a ScriptEngine."""
    step_engine = script if isinstance(script, ScriptEngine) else ScriptEngine(script)
    loaded = Loaded(step_engine, Library(), TOKENS, template, card or Card())
    return AsyncEngine(EngineConfig(**config), loader=loader or (lambda _: loaded))


def ask(prompt="hi", n=1, timeout_s=30.0, model="tone", messages=None, **sampling):
    return GenerateRequest(
        model,
        SamplingParams(**sampling),
        prompt=None if messages else prompt,
        messages=messages,
        n=n,
        timeout_s=timeout_s,
    )


async def collect(engine, request):
    stream = await engine.open(request)
    try:
        return [delta async for delta in stream]
    finally:
        await stream.aclose()


def answers(script, request, **kwargs):
    """Return the deltas of one request on a fresh engine."""

    async def main():
        async with engine_of(script, **kwargs) as engine:
            return await collect(engine, request)

    return asyncio.run(main())


def joined(deltas, index=0):
    return "".join(delta.text for delta in deltas if delta.index == index)


def reasons(deltas):
    return {delta.index: delta.finish_reason for delta in deltas if delta.finish_reason}
