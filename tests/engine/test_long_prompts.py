"""How much of a long prompt the host looks at: while it does, every other answer waits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_model import VOCAB, FakeModel, FakePool, fake_state, mixture, request

from mrss_provider.config import EngineConfig
from mrss_provider.engine.engine import Engine
from mrss_provider.engine.request import EngineRequest
from mrss_provider.model.state import StateSnapshot

CHUNK_LEN = 32
LENGTH = 20 * CHUNK_LEN
# Its first token, its last one, and such.
FEW = 4
MIXED = mixture(fake_state("amber"))


class CountedPrompt(tuple[int, ...]):
    """A prompt that counts the tokens that were asked of it, in whatever way."""

    num_seen = 0

    def __iter__(self) -> Iterator[int]:
        self.num_seen += len(self)
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_seen += len(found) if isinstance(index, slice) else 1
        return found

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        # numpy would look into a tuple without asking.
        return np.array(list(self), *args, **kwargs)


def long_request() -> tuple[EngineRequest, CountedPrompt]:
    wanted = request("long", [1], MIXED, max_tokens=2)
    # Without 0 and 1, which are looked at once more: they might be booleans.
    prompt = CountedPrompt(2 + i % (VOCAB - 3) for i in range(LENGTH))
    object.__setattr__(wanted, "prompt", prompt)
    return wanted, prompt


def make_engine(cache_bytes: int = 1 << 20) -> Engine:
    config = EngineConfig(
        max_rows=4,
        prefill_chunk_len=CHUNK_LEN,
        prefill_alone_len=CHUNK_LEN,
        max_context_len=2 * LENGTH,
        cache_bytes=cache_bytes,
    )
    return Engine(FakeModel(), None, config, allowed_ids=range(VOCAB - 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_prompt_is_gone_through_once_on_arrival_and_then_a_chunk_a_step(cache_bytes: int) -> None:
    engine = make_engine(cache_bytes)
    engine.add(request("beside", [5], mixture(None), max_tokens=100))
    engine.step()
    wanted, prompt = long_request()
    # As `AsyncEngine` does before it hands a request to the engine's thread.
    engine.check(wanted)
    engine.add(wanted)
    assert LENGTH <= prompt.num_seen <= LENGTH + FEW
    while engine.num_free_rows < 3:
        before = prompt.num_seen
        engine.step()
        assert prompt.num_seen - before <= CHUNK_LEN + FEW


def test_the_prompt_as_an_array_is_made_once_and_nobody_writes_to_it() -> None:
    wanted, prompt = long_request()
    ids = wanted.prompt_ids
    assert ids is wanted.prompt_ids
    assert ids.dtype == np.int32
    assert torch.equal(torch.tensor(ids.tolist()), torch.tensor(list(prompt)))
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 3


def test_what_a_prompt_leaves_in_the_cache_is_copied_at_few_of_its_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each copy takes as long as a good part of a step, and everybody waits for it."""
    copied: list[int] = []
    plain = FakePool.snapshot
    engine = make_engine()
    wanted = request("long", [1 + i % (VOCAB - 2) for i in range(LENGTH)], MIXED, max_tokens=0)

    def snapshot(pool: FakePool, slot: int) -> StateSnapshot:
        # The first step reads the first chunk.
        copied.append(CHUNK_LEN * num_steps)
        return plain(pool, slot)

    monkeypatch.setattr(FakePool, "snapshot", snapshot)
    engine.add(wanted)
    num_steps = 0
    while engine.has_work:
        num_steps += 1
        engine.step()
    # 128 tokens apart, then by a quarter of the length; the last two before the end; the end.
    assert copied == [128, 256, 384, 512, 576, 608, 640]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_chunk_that_a_turn_cuts_short_is_kept_as_others_near_the_end(max_tokens: int) -> None:
    engine, turn = make_engine(), 8 * CHUNK_LEN + 3
    prompt = [1 + i % (VOCAB - 2) for i in range(turn + CHUNK_LEN - 2)]
    with_base = mixture(None, fake_state("amber"))
    wanted = replace(
        request("turns", prompt, with_base, max_tokens=max_tokens), reinjections=(turn,)
    )
    for num_cached in (0, turn):
        engine.add(wanted)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        assert [output.num_cached for output in outputs] == [num_cached]
