"""A defect in what reads one answer ends that answer; those of the same step are whole."""

from __future__ import annotations

import asyncio

import pytest
from script_engine import IDS, ScriptEngine, ask, collect, engine_of, joined

from mrss_provider.async_engine.choice import Choice
from mrss_provider.async_engine.stream import TextStream
from mrss_provider.errors import EngineError


@pytest.fixture
def broken_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an answer be unreadable from its 20th token on if its prompt is one byte."""
    read = Choice.read

    def broken(self: Choice) -> bool:
        if len(self._prompt) == 1 and self.num_tokens + self.num_waiting >= 20:
            raise KeyError("a defect")
        return read(self)

    monkeypatch.setattr(Choice, "read", broken)


async def ends(engine: ScriptEngine, *, closes_early: bool) -> tuple[object, str]:
    async with engine_of(engine) as front:
        stream = await front.open(ask("x"))
        whole = asyncio.create_task(collect(front, ask("abc")))
        error = None
        try:
            async for _ in stream:
                if closes_early:
                    # Nobody waits for the rest.
                    await asyncio.to_thread(engine.wait_given, 40)
                    break
        except EngineError as exc:
            error = exc
        await stream.aclose()
        await asyncio.to_thread(engine.wait_aborted, (engine.added[0].id, None))
        return error, joined(await whole)


class Given(ScriptEngine):
    """Counts its steps; the answer to `x` has no end, the other one a hundred tokens."""

    def __init__(self) -> None:
        super().__init__(lambda r, _: IDS("!") * (10**6 if len(r.prompt) == 1 else 100))
        self.num_given = 0

    def step(self):  # type: ignore[no-untyped-def]
        outputs = super().step()
        with self.events:
            self.num_given += 1
            self.events.notify_all()
        return outputs

    def wait_given(self, count: int) -> None:
        with self.events:
            assert self.events.wait_for(lambda: self.num_given >= count, 30)


@pytest.mark.parametrize("closes_early", [False, True])
def test_an_answer_that_cannot_be_read_ends_alone_and_gives_its_rows_back(
    broken_read: None, closes_early: bool
) -> None:
    error, other = asyncio.run(ends(Given(), closes_early=closes_early))
    assert other == "!" * 100
    if not closes_early:
        assert "the answer cannot be read: KeyError('a defect')" in str(error)


def test_a_sink_that_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    take = TextStream.on_output

    def broken(self: TextStream, output: object) -> None:
        if self.info.prompt_tokens == 1:
            raise KeyError("a defect")
        take(self, output)  # type: ignore[arg-type]

    monkeypatch.setattr(TextStream, "on_output", broken)

    engine = Given()

    async def main() -> str:
        async with engine_of(engine) as front:
            bad, good = await front.open(ask("x")), asyncio.create_task(collect(front, ask("abc")))
            with pytest.raises(EngineError, match="a defect"):
                await anext(bad)
            # Its rows are free though nobody has closed it.
            await asyncio.to_thread(engine.wait_aborted, (engine.added[0].id, None))
            return joined(await good)

    assert asyncio.run(main()) == "!" * 100
