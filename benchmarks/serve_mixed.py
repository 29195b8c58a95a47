"""What a long prompt does to the inter-token times of others, at the clients of an HTTP server.

Part of `serve_gpu.py`. Streams are read by a process that only notes when bytes come; where a
server writes at exact times it finds the floor that stands beside the result. Several prompts are
sent one after the other, none of them in the state cache; their gaps are counted together, and the
worst of them alone. The streams' tokens are whole characters, so that each has an event.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raw_streams import Recorder, first_token_s, floor
from served_model import PART_S, Load
from streams import Gaps, Tape

from mrss_provider.backend import GenerateRequest
from mrss_provider.client import parse_address
from mrss_provider.engine.logits_processors import BAN
from mrss_provider.openai_schema import StreamOptions, request_to_body
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.tokenizer import Tokenizer

LONG_PROMPT_LEN = 32_768
MIXED_STREAMS = 32
MIXED_LIMIT = 2.0
FLOOR_S = 2.0
# After a prompt, before the next time without one.
PAUSE_S = 0.5
# More tokens than the time allows: the streams run until they are closed.
_ENDLESS = 100_000

Span = tuple[float, float]
"""A stretch of time (monotonic)."""


@dataclass(frozen=True)
class Mixed:
    """What came on the streams, and when there was a prompt beside them."""

    tape: Tape
    alone: Sequence[Span]
    beside: Sequence[Span]

    def worst_p99_ms(self) -> float:
        """Return the 99th percentile beside the prompt that disturbed the most."""
        return max(Gaps.within(self.tape, *span).p99_ms for span in self.beside)


def measure_mixed(args: argparse.Namespace, address: str, name: str) -> dict[str, object]:
    """Return the fields of the mixed load's line, and print what they say."""
    _, path = parse_address(address)
    assert path is not None
    mixed = _run(args, path)
    alone, beside = Gaps.during(mixed.tape, mixed.alone), Gaps.during(mixed.tape, mixed.beside)
    still = floor(MIXED_STREAMS, alone.p50_ms / 1e3, FLOOR_S)
    ratio = beside.p99_ms / alone.p99_ms
    worst = mixed.worst_p99_ms() / alone.p99_ms
    print(
        f"mixed: p99 {ratio:.2f} x beside a prompt ({alone.p99_ms:.2f} to {beside.p99_ms:.2f} ms; "
        f"the worst of {len(mixed.beside)} alone {worst:.2f} x), at most {MIXED_LIMIT:g} is "
        f"wanted; these clients find {still.p99_ms:.2f} ms where there are {still.p50_ms:.2f}"
    )
    ttft_s = sum(end - begin for begin, end in mixed.beside) / len(mixed.beside)
    found = {
        "alone_p50_ms": alone.p50_ms,
        "alone_p99_ms": alone.p99_ms,
        "beside_p50_ms": beside.p50_ms,
        "beside_p99_ms": beside.p99_ms,
        "beside_max_ms": beside.max_ms,
        "alone_tokens_an_event": alone.tokens_an_event,
        "beside_tokens_an_event": beside.tokens_an_event,
        "floor_p99_ms": still.p99_ms,
        "floor_max_ms": still.max_ms,
        "long_ttft_s": ttft_s,
        "p99_ratio": ratio,
        "worst_p99_ratio": worst,
    }
    return {
        "model": name,
        "rows": MIXED_STREAMS,
        "states": 1,
        "requests": MIXED_STREAMS,
        "prompt_tokens": LONG_PROMPT_LEN,
        "prompts": len(mixed.beside),
        "prompt_tokens_per_s": round(LONG_PROMPT_LEN / ttft_s, 1),
        **{key: round(value, 3) for key, value in found.items()},
        "limit_ratio": MIXED_LIMIT,
        "dtype": args.dtype,
        "state_dtype": args.state_dtype,
        "scope": "mixed load over HTTP",
    }


def _run(args: argparse.Namespace, path: Path) -> Mixed:
    """Read the streams of a server, and send it a prompt now and then."""
    load, banned = Load(MIXED_STREAMS), _silent_ids()
    requests = [load.request(i, _ENDLESS, args.top_p) for i in range(MIXED_STREAMS)]
    bodies = [_body(replace(x, sampling=replace(x.sampling, logit_bias=banned))) for x in requests]
    prompts = [_body(_long(first_id)) for first_id in range(1, args.mixed_prompts + 2)]
    alone: list[Span] = []
    beside: list[Span] = []
    with Recorder(path, bodies) as recorder:
        recorder.wait_running()
        # Once for nothing: what this length and one row more compile and capture is not what is
        # measured.
        first_token_s(path, prompts.pop(), PART_S)
        for prompt in prompts:
            time.sleep(PAUSE_S)
            begun = time.monotonic()
            time.sleep(args.mixed_s)
            sent = time.monotonic()
            ttft_s = first_token_s(path, prompt, PART_S)
            alone.append((begun, sent))
            beside.append((sent, sent + ttft_s))
        return Mixed(recorder.stop(), alone, beside)


def _silent_ids() -> dict[int, float]:
    """Return bans of the tokens that are part of a character, as `logit_bias`.

    Their text comes with the next token's. Random weights draw 6 in 1000, whose gaps of two steps
    would be most of a slowest hundredth.
    """
    tokenizer = Tokenizer.load()
    return {i: BAN for i in tokenizer.entries() if not tokenizer.stream_decoder().push([i])}


def _long(first_id: int) -> GenerateRequest:
    """Return a prompt that is another one from its first token on: none of it is in the cache."""
    ids = tuple(first_id + i % 60_000 for i in range(LONG_PROMPT_LEN))
    sampling = SamplingParams(max_tokens=4, seed=0, ignore_eos=True)
    return GenerateRequest("base", sampling, prompt=ids, timeout_s=PART_S)


def _body(request: GenerateRequest) -> str:
    """Return a request as JSON, its answer to be streamed with the number of its tokens."""
    stream = StreamOptions(stream=True, include_usage=True, include_num_tokens=True)
    return json.dumps(request_to_body(request, stream))
