"""Our reading and writing of safetensors against the library's, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from mrss_provider.errors import StateFileError
from mrss_provider.model.packed_tensors import pack, read_file, unpack
from mrss_provider.model.snapshot_file import read_metadata

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.int64]
STRINGS = {"who": "me", "what": 'a "quoted"\n今日'}


def tensors_of(shapes: list[tuple[torch.dtype, list[int]]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"t{i}": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for i, (dtype, shape) in enumerate(shapes)
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        assert torch.equal(tensor, other[name])


SHAPES = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)), max_size=6
)


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_the_library_reads_what_is_written_and_the_other_way_around(
    shapes: list[tuple[torch.dtype, list[int]]],
) -> None:
    tensors = tensors_of(shapes)
    data = pack(tensors, STRINGS)
    assert read_metadata(data) == STRINGS
    assert_same(load(bytes(data)), tensors)
    assert_same(unpack(data), tensors)
    assert_same(unpack(save(tensors, metadata=STRINGS)), tensors)


def test_strides_do_not_matter_and_bytes_that_cannot_be_written_to_are_left_alone() -> None:
    tensor = torch.arange(24.0).view(4, 6)
    data = bytes(pack({"t": tensor.t()[1:]}, {}))
    read = unpack(data)["t"]
    assert torch.equal(read, tensor.t()[1:])
    read.zero_()
    assert torch.equal(unpack(data)["t"], tensor.t()[1:])


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"t": torch.arange(9)}, STRINGS))
    assert_same(unpack(read_file(path)), {"t": torch.arange(9)})
    path.write_bytes(b"")
    assert len(read_file(path)) == 0


def file_of(header: object, body: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def entry(**changed: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed


GOOD = entry()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 7 + b"\x7f" + b"{}",
        file_of([]),
        file_of("{}"),
        file_of({"t": GOOD}, b"\0" * 9),
        file_of({"t": GOOD}, b"\0" * 7),
        file_of({"t": None}),
        file_of({"t": entry(dtype="F33")}),
        file_of({"t": entry(dtype=["F32"])}),
        file_of({"t": entry(shape=[-2])}),
        file_of({"t": entry(shape=[-1, -2])}),
        file_of({"t": entry(shape=[True, 2])}),
        file_of({"t": entry(shape=[2.0])}),
        file_of({"t": entry(shape=3)}),
        file_of({"t": entry(shape=[1] * 70 + [2])}),
        file_of({"t": entry(shape=[1 << 62, 4])}),
        file_of({"t": entry(data_offsets=[0])}),
        file_of({"t": entry(data_offsets=[0, 8, 8])}),
        file_of({"t": entry(data_offsets=[-8, 0]), "u": GOOD}),
        file_of({"t": entry(data_offsets=[8, 0]), "u": GOOD}),
        file_of({"t": entry(data_offsets=["0", "8"])}),
        file_of({"t": entry(shape=[1], data_offsets=[2, 6]), "u": GOOD}),
        file_of({"t": entry(data_offsets=[0, 1 << 70])}),
        (99).to_bytes(8, "little") + b"[" * 99,
    ],
)
def test_what_is_no_such_file_is_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(StateFileError, match="damaged"):
        unpack(data)
    assert torch.equal(unpack(file_of({"t": GOOD}))["t"], torch.zeros(2))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_file_is_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(pack(tensors_of([(torch.float32, [3, 2]), (torch.int32, [5])]), STRINGS))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    try:
        read = unpack(bytes(whole))
    except StateFileError:
        return
    assert sum(tensor.numel() * tensor.element_size() for tensor in read.values()) <= len(whole)


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, following = tmp_path / "file", tmp_path / "following"
    path.write_bytes(b"the first, which is longer")
    following.write_bytes(b"the next")
    open_file = Path.open

    def replaced(self: Path, mode: str) -> object:
        file = open_file(self, mode)
        following.replace(path)
        return file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", replaced)
        assert bytes(read_file(path)) == b"the first, which is longer"
    assert bytes(read_file(path)) == b"the next"
