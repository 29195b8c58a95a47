"""The state pool against a dict of what each slot should hold."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from tiny_model import TINY

from mrss_provider.model import ModelConfig, StatePool, StateSnapshot

CONFIG = ModelConfig(
    version=7,
    num_layers=2,
    hidden_size=8,
    num_heads=2,
    head_size=4,
    vocab_size=10,
    ffn_size=16,
    dtype="fp32",
    fingerprint="",
)
SLOTS = st.integers(0, 3)


def zero_row(generator=None):
    def values(*shape):
        return torch.randn(shape, generator=generator) if generator else torch.zeros(shape)

    return StateSnapshot(values(2, 2, 4, 4), values(2, 8), values(2, 8))


def new_pool(base=None, **options):
    return StatePool(CONFIG, 4, device=torch.device("cpu"), base=base, **options)


def rows_equal(got, wanted):
    pairs = [
        (got.wkv, wanted.wkv),
        (got.shift_att, wanted.shift_att),
        (got.shift_ffn, wanted.shift_ffn),
    ]
    if (got.time_offset is None) != (wanted.time_offset is None):
        return False
    if wanted.time_offset is not None:
        pairs.append((got.time_offset, wanted.time_offset))
    return all(torch.equal(a, b) for a, b in pairs)


class PoolMachine(RuleBasedStateMachine):
    """write, copy and snapshot in any order; each slot holds what the dict says."""

    snapshots = Bundle("snapshots")

    def __init__(self):
        super().__init__()
        self.base = zero_row(torch.Generator().manual_seed(1))
        self.pool = new_pool(self.base)
        self.rows = dict.fromkeys(range(4), self.base)

    @rule(slot=SLOTS, seed=st.integers(0, 99), has_offset=st.booleans())
    def write(self, slot, seed, has_offset):
        generator = torch.Generator().manual_seed(seed)
        row = zero_row(generator)
        if has_offset:
            offset = torch.randn(2, 8, generator=generator)
            row = StateSnapshot(row.wkv, row.shift_att, row.shift_ffn, offset)
        self.pool.write(slot, row)
        self.rows[slot] = row

    @rule(slot=SLOTS)
    def reset(self, slot):
        self.pool.write(slot, None)
        self.rows[slot] = self.base

    @rule(src=SLOTS, dst=st.lists(SLOTS, max_size=3, unique=True))
    def copy(self, src, dst):
        dst = [slot for slot in dst if slot != src]
        self.pool.copy(src, dst)
        self.rows |= dict.fromkeys(dst, self.rows[src])

    @rule(target=snapshots, slot=SLOTS)
    def snapshot(self, slot):
        return self.pool.snapshot(slot), self.rows[slot]

    @rule(pair=snapshots, slot=SLOTS)
    def restore(self, pair, slot):
        taken, wanted = pair
        # Writing to the pool since then must not have reached the snapshot.
        assert rows_equal(taken, wanted)
        self.pool.write(slot, taken)
        self.rows[slot] = wanted

    @invariant()
    def every_slot_holds_its_row(self):
        for slot, wanted in self.rows.items():
            assert rows_equal(self.pool.snapshot(slot), wanted)
        assert self.pool.has_offsets == any(r.time_offset is not None for r in self.rows.values())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)


def test_a_new_pool_holds_zeros_or_the_base_everywhere():
    assert not new_pool().wkv.any()
    base = zero_row(torch.Generator().manual_seed(2))
    for slot in range(4):
        assert rows_equal(new_pool(base).snapshot(slot), base)


def test_an_offset_slot_is_zero_again_once_it_holds_a_state_without():
    pool = new_pool()
    row = zero_row()
    pool.write(2, StateSnapshot(row.wkv, row.shift_att, row.shift_ffn, torch.ones(2, 8)))
    assert pool.time_offset is not None
    pool.write(2, None)
    assert not pool.time_offset.any()
    assert not pool.has_offsets


def test_a_snapshots_size_is_that_of_its_tensors():
    snapshot = new_pool(state_dtype="fp16").snapshot(0)
    assert snapshot.wkv.dtype == torch.float16
    assert snapshot.num_bytes == 2 * 2 * 4 * 4 * 2 + 2 * (2 * 8 * 4)


def test_a_0_1b_row_takes_the_memory_that_the_shape_says():
    shape = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "head_size": 64}
    config = ModelConfig(
        version=7, vocab_size=65536, ffn_size=3072, dtype="fp32", fingerprint="", **shape
    )
    pool = StatePool(config, 1, device=torch.device("cpu"))
    assert pool.snapshot(0).num_bytes == pytest.approx(2.4e6, rel=0.02)


def test_the_tiny_models_pool_has_its_shape(model):
    pool = model.new_pool(5)
    assert pool.wkv.shape == (TINY.num_layers, 5, TINY.num_heads, 64, 64)
    assert pool.shift_att.shape == (TINY.num_layers, 6, TINY.hidden_size)
