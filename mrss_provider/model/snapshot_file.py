"""Snapshots of rows as bytes: safetensors with a checksum over all that they hold.

One blob holds the rows of one moment, the tokens that they have read, and strings of whoever wrote
it. Nothing is taken from a blob that is damaged, made for another model, or not finite.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mrss_provider.errors import StateFileError
from mrss_provider.model.config import ModelConfig
from mrss_provider.model.packed_tensors import LENGTH_BYTES, Buffer, pack, unpack
from mrss_provider.model.state import StateSnapshot

FORMAT = "mrss-snapshot"
VERSION = "1"
_PARTS = ("wkv", "shift_att", "shift_ffn", "time_offset")
_TOKENS = "tokens"


@dataclass(frozen=True, eq=False)
class SnapshotBlob:
    """What a blob holds.

    Attributes:
        rows: one snapshot a row, on the CPU.
        tokens: int32 [T], what whoever wrote it says that they belong to.
        strings: of whoever wrote it.
        extra: further tensors by name.
    """

    rows: tuple[StateSnapshot, ...]
    tokens: Tensor
    strings: Mapping[str, str]
    extra: Mapping[str, Tensor] = field(default_factory=dict)


def dump_snapshots(blob: SnapshotBlob, config: ModelConfig) -> bytes:
    """Return `blob` as bytes, for `config`'s model."""
    return bytes(pack_snapshots(blob, config))


def pack_snapshots(blob: SnapshotBlob, config: ModelConfig) -> memoryview:
    """Do as `dump_snapshots`; other threads of Python run meanwhile."""
    tensors = {f"extra.{name}": tensor.contiguous() for name, tensor in blob.extra.items()}
    tensors[_TOKENS] = blob.tokens.to(torch.int32).contiguous()
    for k, row in enumerate(blob.rows):
        for part in _PARTS:
            tensor: Tensor | None = getattr(row, part)
            if tensor is not None:
                tensors[f"rows.{k}.{part}"] = tensor.contiguous()
    metadata = {f"x.{key}": value for key, value in blob.strings.items()}
    metadata |= {
        "format": FORMAT,
        "version": VERSION,
        "model": config.fingerprint,
        "content": config.content,
        "dtype": config.precision,
        "num_rows": str(len(blob.rows)),
    }
    metadata["sha256"] = _digest(tensors, metadata)
    return pack(tensors, metadata)


def read_metadata(data: Buffer) -> dict[str, str]:
    """Return the strings in the header of a blob, of which the first bytes are enough.

    Raises:
        StateFileError: not a safetensors header.
    """
    try:
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        header = json.loads(bytes(data[LENGTH_BYTES : LENGTH_BYTES + length]))
        metadata = header.get("__metadata__", {})
        return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, AttributeError, RecursionError) as exc:
        raise StateFileError("not a snapshot: it has no safetensors header") from exc


def read_header(path: Path) -> tuple[dict[str, str], Tensor]:
    """Return the strings of a file's writer and its tokens, without reading its rows.

    Raises:
        StateFileError: not a snapshot, or damaged where it was read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tokens: Tensor = file.get_tensor(_TOKENS)
    except SafetensorError as exc:
        raise StateFileError(f"{path.name} is damaged or not a snapshot: {exc}") from exc
    if metadata.get("format") != FORMAT or tokens.dtype != torch.int32 or tokens.ndim != 1:
        raise StateFileError(f"{path.name} is not a snapshot")
    return _own_strings(metadata), tokens


def load_snapshots(data: Buffer, config: ModelConfig, state_dtype: torch.dtype) -> SnapshotBlob:
    """Read a blob for `config`'s model, and check all of it.

    Args:
        data: as `dump_snapshots` or `pack_snapshots` returned it; what comes back may share it.
        config: of the loaded model.
        state_dtype: of its pool's wkv.

    Raises:
        StateFileError: damaged, no snapshot, made for another model, dtype or quantisation, or not
            finite.
    """
    metadata = read_metadata(data)
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise StateFileError(f"not a snapshot: its format must be {FORMAT} {VERSION}")
    if "content" not in metadata:
        raise StateFileError(
            "the snapshot does not tell all of the model that it belongs to: an older version of "
            "mrss wrote it, and what it is of has to be made anew"
        )
    told = tuple(metadata.get(key) for key in ("model", "content", "dtype"))
    if told != (config.fingerprint, config.content, config.precision):
        raise StateFileError(
            f"the snapshot belongs to another model, dtype or quantisation than the loaded one "
            f"({config.name}, {config.precision})"
        )
    tensors = unpack(data)
    claimed = metadata.pop("sha256", "")
    if _digest(tensors, metadata) != claimed:
        raise StateFileError("the snapshot is damaged: its checksum does not match")
    count = metadata.get("num_rows", "")
    if not (count.isascii() and count.isdigit() and len(count) < 6):
        raise StateFileError("the snapshot is damaged: num_rows is no number")
    rows = tuple(_row(tensors, k, config, state_dtype) for k in range(int(count)))
    tokens = tensors.get(_TOKENS)
    if tokens is None or tokens.dtype != torch.int32 or tokens.ndim != 1:
        raise StateFileError("the snapshot is damaged: it has no tokens")
    if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < config.vocab_size):
        raise StateFileError("the snapshot has tokens that the loaded model does not know")
    extra = {key[6:]: value for key, value in tensors.items() if key.startswith("extra.")}
    return SnapshotBlob(rows, tokens, _own_strings(metadata), extra)


def _own_strings(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key[2:]: value for key, value in metadata.items() if key.startswith("x.")}


def _row(
    tensors: Mapping[str, Tensor], k: int, config: ModelConfig, state_dtype: torch.dtype
) -> StateSnapshot:
    """Return row `k`, whose tensors must have the model's shapes and finite values."""
    shift = (config.num_layers, config.hidden_size)
    wanted: Sequence[tuple[str, tuple[int, ...], torch.dtype]] = (
        ("wkv", config.state_shape, state_dtype),
        *((part, shift, torch.float32) for part in _PARTS[1:]),
    )
    found: list[Tensor | None] = []
    for part, shape, dtype in wanted:
        tensor = tensors.get(f"rows.{k}.{part}")
        if tensor is None and part == "time_offset":
            found.append(None)
            continue
        if tensor is None or tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            what = "nothing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
            raise StateFileError(
                f"row {k} of the snapshot needs {part} {list(shape)} {dtype}, got {what}"
            )
        if not torch.isfinite(tensor).all():
            raise StateFileError(f"row {k} of the snapshot has {part} that is not finite")
        found.append(tensor)
    wkv, shift_att, shift_ffn, offset = found
    assert wkv is not None
    assert shift_att is not None
    assert shift_ffn is not None
    return StateSnapshot(wkv, shift_att, shift_ffn, offset)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the sha256 of names, dtypes, shapes, bytes and strings."""
    digest = hashlib.sha256()
    for key in sorted(metadata):
        digest.update(repr((key, metadata[key])).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
