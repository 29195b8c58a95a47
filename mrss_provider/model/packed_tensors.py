"""Tensors as safetensors in memory, copied while Python's other threads run.

The library's own functions keep the interpreter to themselves meanwhile: 8 ms for a row of a 1.5B
model, in which no step begins and no event is sent.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.errors import StateFileError

Buffer = bytes | memoryview

LENGTH_BYTES = 8
"""What a file begins with: the length of its header."""

_METADATA = "__metadata__"
_MOST_DIMENSIONS = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> memoryview:
    """Return tensors on the CPU, of any strides, and strings as a safetensors file."""
    # The widest numbers first: all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {_METADATA: dict(metadata)}
    places: dict[str, slice] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        places[name] = slice(start, end)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    head = len(text).to_bytes(LENGTH_BYTES, "little") + text
    whole = np.empty(len(head) + end, dtype=np.uint8)
    whole[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    body = torch.from_numpy(whole[len(head) :])
    for name, place in places.items():
        body[place].copy_(tensors[name].contiguous().view(-1).view(torch.uint8))
    return whole.data


def unpack(data: Buffer) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; they share memory, perhaps that of `data`.

    Raises:
        StateFileError: not such a file, or damaged.
    """
    whole = np.frombuffer(data, dtype=np.uint8)
    if not whole.flags.writeable:
        whole = whole.copy()
    try:
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        first = LENGTH_BYTES + length
        header = json.loads(bytes(data[LENGTH_BYTES:first]))
        entries = {name: entry for name, entry in header.items() if name != _METADATA}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        if first + max(ends, default=0) != len(whole):
            raise ValueError("its length is not what its header says")
        return {name: _tensor(whole, first, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as exc:
        raise StateFileError(f"the snapshot is damaged: {exc!r}") from exc


def read_file(path: Path) -> memoryview:
    """Return what is in a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        # Of the file that is open: another one may have its name by now.
        whole = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8).data
        return whole[: file.readinto(whole)]


def _tensor(whole: NDArray[np.uint8], first: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    numbers = [start, end, *shape]
    are_counts = all(type(number) is int and number >= 0 for number in numbers)
    if not are_counts or len(shape) > _MOST_DIMENSIONS:
        raise ValueError("a shape or place that is none")
    if first + end > len(whole) or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor that is not where its header says")
    if (first + start) % dtype.itemsize:
        raise ValueError("a tensor that is not aligned")
    part = torch.from_numpy(whole[first + start : first + end])
    return part.view(dtype).view(shape)
