"""Files of tensors, read safely: `.pth` (never running its code), safetensors, sharded or not.

Says what a file is not, in one sentence; which tensors a model or a state needs is not known here.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mrss_provider.errors import FileFormatError

Tensors = dict[str, Tensor]
Fail = type[FileFormatError]

INDEX_NAME = "model.safetensors.index.json"
_NEEDED = "a .pth or .safetensors checkpoint"
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OTHER_FILES = {
    b"GGUF": ", it is a GGUF file",
    b"version https://git-lfs": ", it is a git-lfs pointer: run `git lfs pull`",
}


def find_checkpoint(path: Path, fail: Fail) -> Path:
    """Return the checkpoint file that `path` means: itself, or the one inside a folder.

    In a folder, in this order: `model.safetensors`, the index of a sharded one, the only
    `*.safetensors`, the only `*.pth`.

    Raises:
        fail: nothing there, or several files and no way to tell which.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise fail(f"{path} does not exist; give {_NEEDED}, or a folder that holds one")
    for name in ("model.safetensors", INDEX_NAME):
        if (path / name).is_file():
            return path / name
    for pattern in ("*.safetensors", "*.pth"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:4])
            raise fail(f"the folder {path} holds several checkpoints ({names}); name one of them")
    raise fail(f"the folder {path} holds no .safetensors and no .pth file; give {_NEEDED}")


def read_tensors(path: Path, fail: Fail) -> tuple[Tensors, dict[str, str]]:
    """Read all tensors of a file, memory-mapped where its format allows it.

    Args:
        path: `.safetensors`, `.st`, a safetensors index, or what `torch.save` wrote.
        fail: the error class to raise.

    Returns:
        name -> tensor, and the metadata strings (empty for a `.pth`).

    Raises:
        fail: not such a file, damaged, or one that holds anything but named tensors.
    """
    try:
        if path.name.endswith(".index.json"):
            return _read_shards(path, fail), {}
        if path.suffix in (".safetensors", ".st"):
            return _read_safetensors(path, fail)
        return _read_pth(path, fail), {}
    except OSError as exc:
        raise fail(f"{path} cannot be read: {exc.strerror or exc}") from exc


def _read_safetensors(path: Path, fail: Fail) -> tuple[Tensors, dict[str, str]]:
    # Of any file that it cannot open, safetensors says that it is not there.
    path.open("rb").close()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as exc:
        raise fail(f"{path} is truncated or not a safetensors file ({exc}); get it again") from exc


def _read_shards(path: Path, fail: Fail) -> Tensors:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise fail(f"{path} is not a safetensors index: it needs a `weight_map` object") from exc
    tensors: Tensors = {}
    for name in files:
        if Path(str(name)).name != name:
            raise fail(f"{path.name} names the shard {name!r:.100}, which is not a file beside it")
        shard = path.parent / name
        if not shard.is_file():
            raise fail(f"{path.name} names the shard {name}, which is not in {path.parent}")
        tensors.update(_read_safetensors(shard, fail)[0])
    return tensors


def _read_pth(path: Path, fail: Fail) -> Tensors:
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_zip(path, fail)
        else:
            _check_legacy(path, fail)
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, FileFormatError):
        raise
    except pickle.UnpicklingError as exc:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(exc))
        what = f"wants to run Python code ({wanted[1]})" if wanted else "holds Python objects"
        raise fail(
            f"{path} {what}, which is refused; needed is a flat dictionary of named tensors"
        ) from exc
    except Exception as exc:
        # Damaged bytes raise anything here: BadZipFile, struct.error, IndexError, TypeError, ...
        raise fail(
            f"{path} is damaged or not a checkpoint; get it again, or give {_NEEDED}"
        ) from exc
    if not isinstance(data, dict):
        raise fail(f"{path} holds a {type(data).__name__}; needed is a dictionary of named tensors")
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise fail(
                f"{path} holds a {kind} under {name!r}; needed is a flat dict of named tensors"
            )
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise fail(f"{path} holds no plain values under {name!r}; needed are dense tensors")
    # An optimiser's parameters record gradients, and those have no bytes to hash.
    return {name: tensor.detach() for name, tensor in data.items()}


def _check_zip(path: Path, fail: Fail) -> None:
    """Refuse a zip that grows when it is read: `torch.save` stores, it does not compress."""
    with zipfile.ZipFile(path) as file:
        size = sum(entry.file_size for entry in file.infolist())
    if size > path.stat().st_size:
        raise fail(f"{path} is compressed, which torch.save does not do; get it again")


def _check_legacy(path: Path, fail: Fail) -> None:
    """Refuse what is neither a zip nor what `torch.save` wrote before it wrote zips."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(_LEGACY_MAGIC):
        return
    if head.startswith(b"PK"):
        raise fail(f"{path} is truncated: its end is missing; get it again")
    kind = next((kind for magic, kind in _OTHER_FILES.items() if head.startswith(magic)), "")
    raise fail(f"{path} is not a checkpoint{kind}; give {_NEEDED}")
