"""Snapshots as bytes: what was written comes back, and nothing else is believed."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from mrss_provider.engine.session import Session, new_info
from mrss_provider.errors import StateFileError
from mrss_provider.model import ModelConfig, StateSnapshot
from mrss_provider.model.snapshot_file import (
    SnapshotBlob,
    dump_snapshots,
    load_snapshots,
    read_header,
    read_metadata,
)

CONFIG = ModelConfig(
    version=7,
    num_layers=2,
    hidden_size=8,
    num_heads=2,
    head_size=4,
    vocab_size=50,
    ffn_size=8,
    dtype="fp32",
    fingerprint="ab" * 32,
    name="tiny",
)


def row(seed, *, offset=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    wkv = torch.randn(2, 2, 4, 4, generator=generator).to(dtype)
    shifts = torch.randn(3, 2, 8, generator=generator)
    return StateSnapshot(wkv, shifts[0], shifts[1], shifts[2] if offset else None)


def blob(**kwargs):
    rows = (row(1), row(2, offset=True))
    return SnapshotBlob(rows, torch.tensor([3, 1, 4], dtype=torch.int32), {"who": "me"}, **kwargs)


DATA = dump_snapshots(blob(), CONFIG)
SESSION = Session(
    new_info("", "a+b", 3), ("base", "a"), (3, 1, 4), 2, 1, (row(1), row(2)), 7, 1, None
).to_bytes(CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_was_written_comes_back(dtype, tmp_path):
    rows = (row(1, dtype=dtype), row(2, offset=True, dtype=dtype))
    extra = {"evidence": torch.rand(2, 2)}
    tokens = torch.tensor([3, 1, 4], dtype=torch.int32)
    data = dump_snapshots(SnapshotBlob(rows, tokens, {"who": "me"}, extra), CONFIG)
    read = load_snapshots(data, CONFIG, dtype)
    assert read.strings == {"who": "me"}
    assert torch.equal(read.tokens, tokens)
    assert torch.equal(read.extra["evidence"], extra["evidence"])
    for got, expected in zip(read.rows, rows, strict=True):
        for part in ("wkv", "shift_att", "shift_ffn", "time_offset"):
            one, other = getattr(got, part), getattr(expected, part)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    (tmp_path / "x").write_bytes(data)
    strings, ids = read_header(tmp_path / "x")
    assert (strings, ids.tolist()) == ({"who": "me"}, [3, 1, 4])


def signed(change):
    """Return the bytes of a blob that was changed, with a checksum that matches."""
    from mrss_provider.model import snapshot_file

    tensors, metadata = load(DATA), read_metadata(DATA)
    del metadata["sha256"]
    change(tensors, metadata)
    metadata["sha256"] = snapshot_file._digest(tensors, metadata)
    return save(tensors, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, m: m.update(format="other"), "not a snapshot"),
        (lambda t, m: m.update(version="2"), "not a snapshot"),
        (lambda t, m: m.update(model="cd" * 32), "another model"),
        (lambda t, m: m.pop("content"), "an older version of mrss wrote it"),
        (lambda t, m: m.update(content="ef" * 32), "another model"),
        (lambda t, m: m.update(dtype="bf16"), "another model"),
        (lambda t, m: m.update(num_rows="-1"), "num_rows"),
        (lambda t, m: m.update(num_rows="3"), "row 2"),
        (lambda t, m: t.pop("tokens"), "tokens"),
        (lambda t, m: t.update(tokens=torch.tensor([50], dtype=torch.int32)), "tokens"),
        (lambda t, m: t.update(tokens=torch.tensor([-1], dtype=torch.int32)), "tokens"),
        (lambda t, m: t["rows.0.wkv"].fill_(float("inf")), "finite"),
        (lambda t, m: t["rows.1.time_offset"].fill_(float("nan")), "finite"),
        (lambda t, m: t.update({"rows.0.wkv": t["rows.0.wkv"][:1].clone()}), "row 0"),
        (lambda t, m: t.update({"rows.0.wkv": t["rows.0.wkv"].half()}), "row 0"),
        (lambda t, m: t.pop("rows.1.shift_att"), "row 1"),
    ],
)
def test_what_does_not_fit_is_refused_whatever_its_checksum(change, says):
    with pytest.raises(StateFileError, match=says):
        load_snapshots(signed(change), CONFIG, torch.float32)
    assert load_snapshots(signed(lambda t, m: None), CONFIG, torch.float32).strings == {"who": "me"}


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_one_kind_of_error(data):
    whole = data.draw(st.sampled_from([DATA, SESSION]))
    at = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "header"]))
    if kind == "flip":
        harmed = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    elif kind == "cut":
        harmed = whole[:at]
    elif kind == "insert":
        harmed = whole[:at] + data.draw(st.binary(min_size=1, max_size=9)) + whole[at:]
    else:
        harmed = data.draw(st.binary(max_size=64))
    with pytest.raises(StateFileError):
        Session.from_bytes(harmed, CONFIG, torch.float32)


@given(
    st.dictionaries(
        st.sampled_from(["id", "created", "states", "num_prompt", "num_read", "seed", "messages"]),
        st.recursive(
            st.none() | st.floats() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=4,
        ),
    )
)
@settings(max_examples=100, deadline=None)
def test_a_session_that_says_anything_at_all_is_read_or_refused(fields):
    read = load_snapshots(SESSION, CONFIG, torch.float32)
    told = json.loads(read.strings["session"]) | fields
    changed = SnapshotBlob(read.rows, read.tokens, {"session": json.dumps(told)})
    try:
        session = Session.from_bytes(dump_snapshots(changed, CONFIG), CONFIG, torch.float32)
    except StateFileError:
        return
    assert 0 <= session.num_read < len(session.tokens)
    assert len(session.rows) in (0, len(session.states))
