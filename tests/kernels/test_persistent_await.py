"""The loop in which the persistent decode step waits for numbers, run on ones that arrive late."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from ptx_warp import NOT_WRITTEN, NUM_LANES, Trapped, Values, Warp

NUM_TENSORS, NUM_GROUPS = 2, 3
LATEST = 400
MAX_POLLS = 64
# Numbers that are easily taken for one that is not there.
TEMPTING = [0, 0x7FFFFFFF, 0xFFFFFFFE, 0x7FFF7FFF, 0xFFFF7FFF, 0x80000000]


class Form(NamedTuple):
    """How a thread waits: neighbours at once, and the arguments of `await_words`.

    `kind` is "all", "live" (the first group of each tensor only) or "given".
    """

    width: int
    kind: str = "all"
    positive: bool = False
    sampled: bool = False

    @property
    def num_words(self) -> int:
        """Words of a thread."""
        return NUM_TENSORS * NUM_GROUPS * self.width


FORMS = [
    Form(*each)
    for each in product((1, 2, 4), ("all", "live", "given"), (False, True), (False, True))
]


@pytest.fixture(autouse=True)
def await7(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # Not above: every worker would load Gluon.
    from mrss_kernels import persistent7_await

    monkeypatch.setattr(persistent7_await, "_MAX_POLLS", MAX_POLLS)
    return persistent7_await


class Arrivals:
    """Memory whose words arrive one by one; halves of them if they are positive."""

    def __init__(self, random: np.random.Generator, size: int, positive: bool) -> None:
        values = random.integers(0, NOT_WRITTEN, size, np.uint32)
        values = np.where(random.random(size) < 0.5, values, random.choice(TEMPTING, size))
        self.values = (values & (0x7FFF7FFF if positive else NOT_WRITTEN)).astype(np.uint32)
        self.times = random.integers(0, LATEST, (size, 2)) * (random.random((size, 2)) < 0.7)
        if not positive:
            self.times[:, 1] = self.times[:, 0]

    def __call__(self, time: int, addresses: Values) -> Values:
        late = self.times[addresses] > time
        return self.values[addresses] | np.dot(late, [0xFFFF0000, 0xFFFF]).astype(np.uint32)


class Awaited:
    """What a warp waits for: where it is [32, words], and what is known of it, if anything is."""

    def __init__(self, form: Form) -> None:
        random = np.random.default_rng(0)
        num_groups = NUM_LANES * NUM_TENSORS * NUM_GROUPS
        self.memory = Arrivals(random, num_groups * form.width, form.positive)
        firsts = random.permutation(num_groups).reshape(NUM_LANES, -1) * form.width
        self.addresses = (firsts[:, :, None] + np.arange(form.width)).reshape(NUM_LANES, -1)
        self.given = None
        if form.kind == "given":
            # Of a group nothing, that it is none, or what an earlier read has found.
            known = np.repeat(random.integers(0, 3, firsts.shape), form.width, 1)
            earlier = self.memory(0, self.addresses)
            self.given = np.choose(known, [np.uint32(NOT_WRITTEN), np.uint32(0), earlier])

    def operands(self) -> list[Values | None]:
        """Return the operands of the loop, of which the first ones are its results."""
        found = [None] * self.addresses.shape[1] + list(self.addresses.T)
        return found if self.given is None else found + list(self.given.T)


def loop(await7: ModuleType, form: Form) -> str:
    live = 1 if form.kind == "live" else NUM_GROUPS
    firsts = await7._firsts(NUM_TENSORS, NUM_GROUPS * form.width, form.width, live)
    given = form.kind == "given"
    return await7._loop(form.num_words, form.width, firsts, form.positive, given, form.sampled)


def lacks(words: Values, form: Form) -> Values:
    """Return which of groups [..., width] have a word that is not there."""
    return ((words & 0x80008000 != 0) if form.positive else (words == NOT_WRITTEN)).any(-1)


def expect_results(warp: Warp, waited: Awaited, form: Form) -> None:
    """Check that words are those of memory, what was given if it was there, or 0 if not live."""
    results = np.stack([warp.registers[f"${i}"] for i in range(form.num_words)], 1)
    expected = waited.memory.values[waited.addresses].reshape(NUM_LANES, -1, form.width)
    if waited.given is not None:
        known = waited.given.reshape(expected.shape)
        expected = np.where(lacks(known, form)[..., None], expected, known)
    if form.kind == "live":
        expected[:, [i for i in range(expected.shape[1]) if i % NUM_GROUPS]] = 0
    assert (results.reshape(expected.shape) == expected).all()


def expect_reads(warp: Warp, waited: Awaited, form: Form) -> None:
    """Check that each read is of a whole group that was not there, as far as its thread knew.

    If sampled, others than the first one's are a thread's first reads, or behind the first group.
    """
    shape = (NUM_LANES, -1, form.width)
    addresses = waited.addresses.reshape(shape)
    seen = np.full_like(addresses, NOT_WRITTEN, np.uint32)
    if waited.given is not None:
        seen = waited.given.reshape(shape).copy()
    is_read = np.full(seen.shape[:2], waited.given is not None)
    for load in warp.loads:
        group, lanes = load.operands[0] // form.width, load.lanes
        assert load.operands == [*range(group * form.width, (group + 1) * form.width)]
        assert (load.addresses == addresses[:, group, 0]).all()
        assert lacks(seen[lanes, group], form).all()
        if form.sampled and group:
            assert not (lacks(seen[:, 0], form) & is_read[:, group] & lanes).any()
        seen[lanes, group] = waited.memory(load.time, addresses[lanes, group])
        is_read[lanes, group] = True


def expect_waits(text: str, form: Form) -> None:
    """Run a loop and check its results and its reads."""
    waited = Awaited(form)
    warp = Warp(text, waited.operands(), waited.memory)
    warp.run()
    expect_results(warp, waited, form)
    expect_reads(warp, waited, form)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_words_are_waited_for_and_what_is_there_is_not_read_again(
    await7: ModuleType, form: Form
) -> None:
    expect_waits(loop(await7, form), form)


def test_a_number_that_never_comes_traps_after_so_many_reads(await7: ModuleType) -> None:
    form = Form(4)
    waited = Awaited(form)
    waited.memory.times[waited.addresses[5, 4]] = 1 << 30
    warp = Warp(loop(await7, form), waited.operands(), waited.memory)
    with pytest.raises(Trapped):
        warp.run()
    assert sum(load.lanes[5] for load in warp.loads if load.operands[0] == 4) == MAX_POLLS


def without_sample(await7: ModuleType, form: Form) -> str:
    return loop(await7, form._replace(sampled=False))


def edited(pattern: str, replacement: str) -> Callable[[ModuleType, Form], str]:
    def edit(await7: ModuleType, form: Form) -> str:
        text, count = re.subn(pattern, replacement, loop(await7, form))
        assert count
        return text

    return edit


@pytest.mark.parametrize(
    ("mutant", "form"),
    [
        (edited(r"@\w+ ld\..*", ""), Form(4)),
        (edited(r"@\w+ ld\.", "ld."), Form(4)),
        (edited(r"max\.u32", "or.b32"), Form(4)),
        (edited(r"or\.b32", "max.u32"), Form(2, positive=True)),
        (edited(r"vote\.sync.*", ""), Form(1)),
        (edited("0x80008000", "0x80000000"), Form(2, positive=True)),
        (without_sample, Form(4, sampled=True)),
    ],
    ids=[
        "no second read",
        "all read again",
        "or for max",
        "max for or",
        "no vote",
        "one half looked at",
        "no sample",
    ],
)
def test_a_loop_that_waits_wrongly_is_found(
    await7: ModuleType, mutant: Callable[[ModuleType, Form], str], form: Form
) -> None:
    with pytest.raises((AssertionError, Trapped)):
        expect_waits(mutant(await7, form), form)
