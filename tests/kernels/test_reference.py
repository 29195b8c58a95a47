"""`mrss_kernels.reference` against the recurrences written out token by token in fp64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mrss_kernels import reference
from torch.nn import functional as F

HEADS, SIZE = 2, 64
LENGTHS = [1, 2, 15, 16, 17, 63, 100, 257]


def relative_rms(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


def inputs7(num_tokens, *, seed=0, heads=HEADS, size=SIZE):
    """Random r, w, k, v, kk, a [T, H, N] fp64; decays spread over their whole range."""
    g = torch.Generator().manual_seed(seed)
    shape = (num_tokens, heads, size)
    r, k, v, raw, lr, decay = (
        torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(6)
    )
    w = -0.6065306597 * torch.sigmoid(4 * decay)
    return [r, w, k, v, F.normalize(raw, dim=-1), torch.sigmoid(2 * lr + 1)]


def inputs6(num_tokens, *, seed=0):
    """Random r, w, k, v [T, H, N] fp64; log decays from -1e-4 down to -inf."""
    g = torch.Generator().manual_seed(seed)
    r, k, v, decay = (
        torch.randn(num_tokens, HEADS, SIZE, generator=g, dtype=torch.float64) for _ in range(4)
    )
    w = -torch.exp(4 * decay)
    return [r, torch.where(decay > 2.0, -torch.inf, w), k, v]


def bonus():
    return torch.randn(HEADS, SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def stepwise7(inputs, state):
    """S = S diag(exp w) - (S kk)(kk a)^T + v k^T; y = S r. State [H, V, K]."""
    ys = []
    for r, w, k, v, kk, a in zip(*inputs, strict=True):
        removed = torch.einsum("hvk,hk->hv", state, kk)
        state = (
            state * w.exp()[:, None, :]
            - torch.einsum("hv,hk->hvk", removed, kk * a)
            + torch.einsum("hv,hk->hvk", v, k)
        )
        ys.append(torch.einsum("hvk,hk->hv", state, r))
    return torch.stack(ys), state


def stepwise6(inputs, u, state):
    """y = r (S + diag(u) k v^T); S = diag(exp w) S + k v^T. State [H, K, V]."""
    ys = []
    for r, w, k, v in zip(*inputs, strict=True):
        added = torch.einsum("hk,hv->hkv", k, v)
        ys.append(torch.einsum("hk,hkv->hv", r, state + u[..., None] * added))
        state = w.exp()[..., None] * state + added
    return torch.stack(ys), state


def new_pool(num_slots, *, dtype=torch.float64, heads=HEADS, size=SIZE):
    g = torch.Generator().manual_seed(5)
    return torch.randn(num_slots, heads, size, size, generator=g, dtype=torch.float64).to(dtype)


def run_decode(version, inputs, pool, slot):
    """Feed tokens one by one into `slot`; return y [T, H, N]."""
    slots = torch.tensor([slot])
    ys = []
    for token in zip(*(x.split(1) for x in inputs), strict=True):
        if version == 7:
            ys.append(reference.wkv7_decode(*token, pool, slots))
        else:
            ys.append(reference.wkv6_decode(*token, bonus(), pool, slots))
    return torch.cat(ys)


def run_prefill(version, inputs, pool, slots, lengths):
    offsets = [0, *itertools.accumulate(lengths)]
    slots = torch.tensor(slots)
    if version == 7:
        return reference.wkv7_prefill(*inputs, pool, slots, offsets)
    return reference.wkv6_prefill(*inputs, bonus(), pool, slots, offsets)


def make_inputs(version, num_tokens, seed=0):
    return (inputs7 if version == 7 else inputs6)(num_tokens, seed=seed)


def stepwise(version, inputs, state):
    if version == 7:
        return stepwise7(inputs, state)
    return stepwise6(inputs, bonus(), state)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_decode_follows_the_recurrence(version, dtype, bound):
    inputs = make_inputs(version, 40)
    pool = new_pool(3)
    wanted_y, wanted_state = stepwise(version, inputs, pool[1])
    pool = pool.to(dtype)
    y = run_decode(version, [x.to(dtype) for x in inputs], pool, 1)
    assert y.dtype == dtype
    assert relative_rms(y, wanted_y) < bound
    assert relative_rms(pool[1], wanted_state) < bound


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_prefill_follows_the_recurrence(version, num_tokens):
    inputs = make_inputs(version, num_tokens)
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 2e-6)):
        pool = new_pool(3)
        wanted_y, wanted_state = stepwise(version, inputs, pool[2])
        pool = pool.to(dtype)
        y = run_prefill(version, [x.to(dtype) for x in inputs], pool, [2], [num_tokens])
        assert relative_rms(y, wanted_y) < bound
        assert relative_rms(pool[2], wanted_state) < bound


def test_prefill_of_rwkv7_is_stable_when_one_key_repeats():
    # The triangular system is at its worst: each token removes what the one before it wrote.
    r, w, _, v, kk, a = inputs7(64)
    kk = kk[:1].expand_as(kk)
    inputs = [r, torch.zeros_like(w), kk, v, kk, torch.ones_like(a)]
    wanted_y, wanted_state = stepwise7(inputs, new_pool(1)[0])
    pool = new_pool(1, dtype=torch.float32)
    y = run_prefill(7, [x.float() for x in inputs], pool, [0], [64])
    assert relative_rms(y, wanted_y) < 1e-5
    assert relative_rms(pool[0], wanted_state) < 1e-5


def test_prefill_of_rwkv7_holds_at_the_strongest_decay():
    r, w, k, v, kk, a = inputs7(80)
    inputs = [r, torch.full_like(w, -0.6065306597), k, v, kk, a]
    wanted_y, wanted_state = stepwise7(inputs, new_pool(1)[0])
    pool = new_pool(1, dtype=torch.float32)
    y = run_prefill(7, [x.float() for x in inputs], pool, [0], [80])
    assert relative_rms(y, wanted_y) < 1e-5
    assert relative_rms(pool[0], wanted_state) < 1e-5


@pytest.mark.parametrize("log_decay", [-torch.inf, -1e30, -200.0, -30.0, -1e-6, 0.0])
def test_prefill_of_rwkv6_is_exact_at_any_decay(log_decay):
    r, w, k, v = inputs6(50)
    w = torch.where(torch.arange(50)[:, None, None] % 3 == 1, log_decay, w)
    wanted_y, wanted_state = stepwise6([r, w, k, v], bonus(), new_pool(1)[0])
    pool = new_pool(1, dtype=torch.float32)
    y = run_prefill(6, [x.float() for x in (r, w, k, v)], pool, [0], [50])
    assert relative_rms(y, wanted_y) < 2e-6
    assert relative_rms(pool[0], wanted_state) < 2e-6


@pytest.mark.parametrize("version", [6, 7])
@given(cuts=st.lists(st.integers(1, 69), max_size=4, unique=True), data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_split_of_a_prompt_gives_the_same_state(version, cuts, data):
    inputs = [x.float() for x in make_inputs(version, 70)]
    whole = new_pool(1, dtype=torch.float32)
    y_whole = run_prefill(version, inputs, whole, [0], [70])
    parts = new_pool(1, dtype=torch.float32)
    ys = []
    for begin, end in itertools.pairwise([0, *sorted(cuts), 70]):
        part = [x[begin:end] for x in inputs]
        if end - begin < 5 and data.draw(st.booleans()):
            ys.append(run_decode(version, part, parts, 0))
        else:
            ys.append(run_prefill(version, part, parts, [0], [end - begin]))
    assert relative_rms(torch.cat(ys), y_whole.double()) < 2e-6
    assert relative_rms(parts, whole.double()) < 2e-6


@pytest.mark.parametrize("version", [6, 7])
def test_a_split_at_a_chunk_changes_no_bit(version):
    inputs = [x.float() for x in make_inputs(version, 70)]
    whole, parts = new_pool(1, dtype=torch.float32), new_pool(1, dtype=torch.float32)
    y_whole = run_prefill(version, inputs, whole, [0], [70])
    cut = 3 * reference.CHUNK_LEN
    first = run_prefill(version, [x[:cut] for x in inputs], parts, [0], [cut])
    second = run_prefill(version, [x[cut:] for x in inputs], parts, [0], [70 - cut])
    assert torch.equal(torch.cat((first, second)), y_whole)
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("version", [6, 7])
def test_packed_sequences_equal_each_one_alone_and_touch_no_other_slot(version):
    lengths, slots = [5, 33, 1, 33, 16], [6, 2, 0, 5, 3]
    inputs = [x.float() for x in make_inputs(version, sum(lengths))]
    pool = new_pool(7, dtype=torch.float32)
    pool[[1, 4]] = torch.nan
    before = pool.clone()
    y = run_prefill(version, inputs, pool, slots, lengths)
    begin = 0
    for length, slot in zip(lengths, slots, strict=True):
        alone = before[slot : slot + 1].clone()
        part = [x[begin : begin + length] for x in inputs]
        y_alone = run_prefill(version, part, alone, [0], [length])
        assert torch.equal(y[begin : begin + length], y_alone)
        assert torch.equal(pool[slot], alone[0])
        begin += length
    assert pool[[1, 4]].isnan().all()


@pytest.mark.parametrize("version", [6, 7])
@given(slots=st.lists(st.integers(-1, 8), min_size=1, max_size=9))
@settings(max_examples=25, deadline=None)
def test_decode_touches_its_slots_only_and_rows_do_not_see_each_other(version, slots):
    taken = set()
    slots = [-1 if s in taken or taken.add(s) else s for s in slots]
    inputs = [x.float() for x in make_inputs(version, len(slots))]
    pool = new_pool(9, dtype=torch.float32)
    before = pool.clone()
    extra = [] if version == 7 else [bonus()]
    op = reference.wkv7_decode if version == 7 else reference.wkv6_decode
    y = op(*inputs, *extra, pool, torch.tensor(slots))
    for row, slot in enumerate(slots):
        if slot < 0:
            assert (y[row] == 0).all()
            continue
        alone = before[slot : slot + 1].clone()
        y_alone = op(*(x[row : row + 1] for x in inputs), *extra, alone, torch.tensor([0]))
        assert torch.equal(y[row], y_alone[0])
        assert torch.equal(pool[slot], alone[0])
    untouched = [slot for slot in range(9) if slot not in slots]
    assert torch.equal(pool[untouched], before[untouched])


@pytest.mark.parametrize("version", [6, 7])
def test_a_pool_in_fp16_computes_in_fp32(version):
    inputs = make_inputs(version, 20)
    if version == 6:
        inputs[1] = inputs[1].clamp_min(-1.0) - 0.05
    pool = new_pool(1)
    wanted, _ = stepwise(version, inputs, pool[0])
    half = pool.half()
    y = run_decode(version, [x.float() for x in inputs], half, 0)
    assert half.dtype == torch.float16
    assert y.dtype == torch.float32
    # Storing the state rounds it by 2^-11 at every token; nothing else is in half precision.
    assert relative_rms(y, wanted) < 20 * 2**-11
    half = pool.half()
    y = run_prefill(version, [x.float() for x in inputs], half, [0], [20])
    assert relative_rms(y, wanted) < 2 * 2**-11


def test_inputs_may_be_in_half_precision():
    inputs = [x.bfloat16() for x in inputs7(20)]
    inputs[1] = inputs7(20)[1].float()
    wanted, _ = stepwise7([x.double() for x in inputs], new_pool(1)[0])
    assert relative_rms(run_decode(7, inputs, new_pool(1).float(), 0), wanted) < 2e-6
    assert relative_rms(run_prefill(7, inputs, new_pool(1).float(), [0], [20]), wanted) < 2e-6


def test_chunked_forms_have_the_right_gradients():
    inputs = [x[None] for x in inputs7(18, heads=1, size=3)]
    state = new_pool(1, heads=1, size=3)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    assert torch.autograd.gradcheck(reference.wkv7_chunked, leaves)
    r, w, k, v, *_ = (x.detach() for x in inputs)
    u = torch.randn(1, 3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (r, 3 * w, k, v, u, state.detach())]
    assert torch.autograd.gradcheck(reference.wkv6_chunked, leaves)


def test_chunked_modifies_nothing():
    inputs = [x[None].float() for x in inputs7(20)]
    state = new_pool(1, dtype=torch.float32)
    copies = [x.clone() for x in (*inputs, state)]
    reference.wkv7_chunked(*inputs, state)
    assert all(map(torch.equal, (*inputs, state), copies))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 32)}, r"k must have shape \[2, 2, 64\], got \[2, 2, 32\]"),
        ({"r": torch.zeros(2, 128)}, r"r must have 3 dimensions, got shape \[2, 128\]"),
        ({"pool": torch.zeros(3, 2, 64, 32)}, r"pool must have shape \[3, 2, 64, 64\]"),
        ({"slots": torch.tensor([0])}, r"slots must have shape \[2\], got \[1\]"),
        ({"slots": torch.tensor([0, 1], dtype=torch.int32)}, "slots must have dtype torch.int64"),
        ({"pool": torch.zeros(3, 2, 64, 64).bfloat16()}, "pool must have dtype torch.float32"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(change, message):
    names = ["r", "w", "k", "v", "kk", "a"]
    given_args = {name: torch.zeros(2, 2, 64) for name in names}
    given_args |= {"pool": torch.zeros(3, 2, 64, 64), "slots": torch.tensor([0, 1])}
    with pytest.raises((ValueError, TypeError), match=message):
        reference.wkv7_decode(**(given_args | change))


@pytest.mark.parametrize("offsets", [[0, 4], [0, 2, 2, 4], [1, 2, 4], [0, 2, 5], [0, 3, 2, 4]])
def test_wrong_offsets_are_refused(offsets):
    inputs = [x.float() for x in inputs7(4)]
    pool = new_pool(3, dtype=torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens must grow from 0 to 4 with"):
        reference.wkv7_prefill(*inputs, pool, torch.tensor([0, 1]), offsets)
