"""What is fuzzed: parsers of what others wrote, each as a function of bytes.

A target returns, or raises an `MRSSError`: anything else is a defect. Some also check that what
they understood comes back the same. `make fuzz` drives them with atheris, `test_parsers.py` with
hypothesis.
"""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from safetensors.torch import save
from tiny_model import tuned_state, vocabulary, write_checkpoint, write_vocabulary

from mrss_provider.backend import StreamInfo
from mrss_provider.client_stream import ClientStream
from mrss_provider.engine.gate_file import SHAPES, load_gate
from mrss_provider.engine.gate_metadata import GateMetadata
from mrss_provider.engine.mixtures_file import read_mixtures
from mrss_provider.errors import MRSSError
from mrss_provider.http1 import Connection
from mrss_provider.mixture import parse_method, parse_mixture
from mrss_provider.model import ModelConfig, load_model, load_tuned_state
from mrss_provider.model.snapshot_file import (
    SnapshotBlob,
    dump_snapshots,
    load_snapshots,
    read_metadata,
)
from mrss_provider.model.state import StateSnapshot
from mrss_provider.openai_schema import (
    embed_request_to_body,
    parse_chat_request,
    parse_completion_request,
    parse_detokenize_request,
    parse_embed_request,
    parse_tokenize_request,
    request_to_body,
)
from mrss_provider.server.body import parse_json
from mrss_provider.tokenizer import Tokenizer


@dataclass(frozen=True)
class Target:
    """A parser, and inputs that it understands to begin from."""

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]


def names(data: bytes) -> None:
    mixture = parse_mixture(data.decode(errors="replace"))
    assert parse_mixture(mixture.canonical()).canonical() == mixture.canonical()


def methods(data: bytes) -> None:
    kind = "merge" if data[:1] == b"m" else "gate"
    method = parse_method(data[1:].decode(errors="replace"), kind, kind)
    assert parse_method(method.text, kind, kind) == method


def bodies(data: bytes) -> None:
    parse = parse_chat_request if data[:1] == b"c" else parse_completion_request
    parsed = parse(parse_json(data[1:]))
    if len(parsed.requests) == 1:
        body = json.loads(json.dumps(request_to_body(parsed.request)))
        again = parse_chat_request if parsed.kind == "chat" else parse_completion_request
        assert again(body).request == parsed.request


def inputs(data: bytes) -> None:
    kind, body = data[:1], parse_json(data[1:])
    if kind == b"e":
        parsed = parse_embed_request(body)
        again = json.loads(json.dumps(embed_request_to_body(parsed.request, parsed.encoding)))
        assert parse_embed_request(again) == parsed
    elif kind == b"t":
        parse_tokenize_request(body)
    else:
        parse_detokenize_request(body)


def mixtures_toml(data: bytes) -> None:
    with _written("mixtures.toml", data) as path:
        read_mixtures(path)


def state_safetensors(data: bytes) -> None:
    with _written("state.safetensors", data) as path:
        state = load_tuned_state(path, CONFIG, name="x")
    assert torch.isfinite(state.wkv).all()


def state_pth(data: bytes) -> None:
    with _written("state.pth", data) as path:
        state = load_tuned_state(path, CONFIG, name="x")
    assert torch.isfinite(state.wkv).all()


def gates(data: bytes) -> None:
    with _written("gate.safetensors", data) as path:
        load_gate(path, CONFIG, name="x")


def snapshots(data: bytes) -> None:
    blob = load_snapshots(data, CONFIG, torch.float32)
    # A fuzzer that watches comparisons learns the checksums of its own files.
    if read_metadata(data)["sha256"] == read_metadata(SNAPSHOTS)["sha256"]:
        assert blob.tokens.tolist() == [1, 2]
        assert all(bool((part == 1).all()) for part in (blob.rows[0].wkv, blob.rows[0].shift_att))


def vocabularies(data: bytes) -> None:
    with _written("vocab.txt", data) as path:
        tokenizer = Tokenizer.load(path)
    tokenizer.encode("Hello, world")


def http1(data: bytes) -> None:
    """Feed an answer in two pieces: the connection ends it, with or without an error."""
    LOOP.run_until_complete(_http1(data))


async def _http1(data: bytes) -> None:
    for cut in (len(data), len(data) // 2):
        connection = Connection()
        connection.connection_made(_Socket())
        connection.data_received(data[:cut])
        connection.data_received(data[cut:])
        connection.connection_lost(None)
        try:
            status, headers = await connection.head()
            httpx.Response(status, headers=headers)
            while await connection.read():
                pass
        except httpx.HTTPError:
            pass


def events(data: bytes) -> None:
    """Read a stream of events to its end or error, whatever pieces it comes in."""
    LOOP.run_until_complete(_events(data))


async def _events(data: bytes) -> None:
    wholes = []
    for size in (len(data) + 1, 7):
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        stream = ClientStream(StreamInfo("x", 1, "f", 1), _Pieces(pieces), 60.0, lambda ended: None)
        text = ""
        try:
            async for delta in stream:
                text += delta.text
        except MRSSError as exc:
            text += f"<{type(exc).__name__}>"
        finally:
            await stream.aclose()
        wholes.append(text)
    assert wholes[0] == wholes[1]


class _Socket(asyncio.Transport):
    """A transport that goes nowhere."""

    def write(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _Pieces:
    """A connection whose body comes in these pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def read(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    def close(self) -> None:
        pass


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield a folder that is there no longer than it is needed: a fuzzer's process just stops."""
    with tempfile.TemporaryDirectory(prefix="mrss-fuzz-") as folder:
        yield Path(folder)


@contextmanager
def _written(name: str, data: bytes) -> Iterator[Path]:
    with _folder() as folder:
        path = folder / name
        path.write_bytes(data)
        yield path


def _config() -> ModelConfig:
    with _folder() as folder:
        file = write_checkpoint(folder / "tiny.safetensors")
        return load_model(file, device="cpu", dtype="fp32", threads=1).config


def _pth() -> bytes:
    data = io.BytesIO()
    torch.save(tuned_state(), data)
    return data.getvalue()


def _gate() -> bytes:
    tensors = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    metadata = GateMetadata(
        CONFIG.name, CONFIG.shape_text(), CONFIG.fingerprint, states={}, training={}, licence="MIT"
    )
    return save(tensors, metadata={k: v for k, v in metadata.to_strings().items() if v})


def _vocabulary() -> bytes:
    with _folder() as folder:
        return write_vocabulary(folder / "vocab.txt", vocabulary()).read_bytes()


def _snapshot() -> bytes:
    shift = torch.ones(CONFIG.num_layers, CONFIG.hidden_size)
    row = StateSnapshot(torch.ones(CONFIG.state_shape), shift, shift.clone())
    return dump_snapshots(SnapshotBlob((row,), torch.tensor([1, 2], dtype=torch.int32), {}), CONFIG)


CONFIG = _config()
SNAPSHOTS = _snapshot()
LOOP = asyncio.new_event_loop()

_CHAT = b"""{"model": "tone", "messages": [{"role": "user", "content": "hi"}], "n": 2,
 "temperature": 0.5, "stop": ["a"], "logit_bias": {"5": 1}, "stream": true, "seed": 3,
 "mrss": {"weights": {"tone": 1}, "merge": "delta", "gate": "fixed", "cut": 0.1}}"""
_INPUT = b"""{"model": "tone", "input": ["a", [1, 2]], "encoding_format": "base64",
"dimensions": 3, "mrss": {"pooling": "last"}, "timeout": 2, "user": "u"}"""
_TEXT = b"""{"model": "a+b:2~linear", "prompt": [[1, 2], "x"], "max_tokens": 3, "logprobs": 2,
"echo": true, "best_of": 3,
 "params": {"top_p": 0.3}, "timeout": 1e1, "mrss_gatingweight": ["1", 2]}"""
_TOML = b"""[story]
terms = "knowledge:0.5 + tone"
merge = "delta"
gate = "novelty"
cut = 0.1
temperature = 1
"""
_EVENT = (
    b'data: {"choices": [{"index": 0, "delta": {"content": "h\\u00e9"}, "num_tokens": 1, '
    b'"finish_reason": null, "logprobs": {"content": []}}]}\n\n'
)
_END = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\n'
_FAILED = b'data: {"error": {"message": "m", "type": "t", "code": "timeout", "status": 408}}\n\n'
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"

TARGETS: dict[str, Target] = {
    "names": Target(
        names,
        [b"knowledge+tone", b"base:0.2+tone:0.8~linear~fixed", b"a+b~delta~novelty:0.1"],
    ),
    "methods": Target(methods, [b"mdelta", b"gschedule:amber=1@0,0@20", b"gposterior:0.1"]),
    "bodies": Target(bodies, [b"c" + _CHAT, b"t" + _TEXT, b"t" + _CHAT]),
    "inputs": Target(
        inputs, [b"e" + _INPUT, b"t" + _CHAT, b't{"prompt": "x"}', b'd{"tokens": [1]}']
    ),
    "mixtures_toml": Target(mixtures_toml, [_TOML]),
    "state_safetensors": Target(state_safetensors, [save(tuned_state())]),
    "state_pth": Target(state_pth, [_pth()]),
    "gates": Target(gates, [_gate()]),
    "snapshots": Target(snapshots, [SNAPSHOTS]),
    "vocabularies": Target(vocabularies, [_vocabulary()]),
    "http1": Target(
        http1,
        [
            _HEAD + b"content-length: 5\r\n\r\nhello",
            _HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n" + _HEAD + b"\r\nto the end",
        ],
    ),
    "events": Target(
        events, [_EVENT * 2 + _END + b"data: [DONE]\n\n", _EVENT + b": x\n\n" + _FAILED]
    ),
}
