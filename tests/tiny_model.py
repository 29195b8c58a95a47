"""Seeded RWKV-6 and RWKV-7 checkpoints in the official naming, of any shape: no download, no luck.

Random weights say nothing about quality, but every formula shows: decays, gates and learning
rates are spread over their whole range, so a wrong sign, order or orientation moves the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The shape of a tiny model. Ranks are those of the LoRA pairs."""

    num_layers: int = 2
    hidden_size: int = 128
    vocab_size: int = 320
    head_size: int = 64
    ffn_size: int = 256
    ranks: tuple[int, int, int, int] = (16, 16, 8, 24)

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_size


TINY = Shape()


class _Random:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale + mean

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)


def checkpoint(
    version: int = 7, shape: Shape = TINY, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the tensors of a model, named and laid out as an official `.pth`."""
    random = _Random(seed)
    c = shape.hidden_size
    tensors = {"emb.weight": random.normal(shape.vocab_size, c, scale=0.5)}
    for i in range(shape.num_layers):
        prefix = f"blocks.{i}."
        for norm in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            _norm(tensors, prefix + norm, c, random)
        if version == 7:
            _att7(tensors, prefix + "att.", shape, random)
        else:
            _att6(tensors, prefix + "att.", shape, random)
        _ffn(tensors, prefix + "ffn.", version, shape, random)
    _norm(tensors, "ln_out", c, random)
    tensors["head.weight"] = random.normal(shape.vocab_size, c, scale=2 * c**-0.5)
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def tuned_state(
    shape: Shape = TINY,
    *,
    seed: int = 0,
    scale: float = 0.3,
    offset: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return a random tuned state as RWKV-PEFT writes it: `[H, V, K]` a layer."""
    random = _Random(seed + 1000)
    heads, size = shape.num_heads, shape.head_size
    tensors = {}
    for i in range(shape.num_layers):
        name = f"blocks.{i}.att.time_"
        tensors[name + "state"] = random.normal(heads, size, size, scale=scale).to(dtype)
        if offset:
            tensors[name + "offset"] = random.normal(shape.hidden_size, scale=0.2).to(dtype)
    return tensors


def vocabulary(size: int = TINY.vocab_size) -> dict[int, bytes]:
    """Return ids 1.. -> bytes: all single bytes, then pieces of text and of characters.

    The last ids below `size` have no entry, as in the World vocabulary.
    """
    pieces = [b"\n\n", b"User:", b"Assistant:", b"System:", b" the", b" a", b"hello", b" world"]
    pieces += ["é".encode(), "今".encode(), "天".encode(), "😀".encode(), b"\xe4\xbb", b"\xf0\x9f"]
    pieces += [b"'", b'"', b"\\", b"\r\n", b"'\"", b"b'x'"]
    pieces += [f" {word}".encode() for word in ("red", "blue", "cat", "dog", "yes", "no", "is")]
    entries = [bytes([i]) for i in range(256)] + [p for p in pieces if len(p) > 1]
    return {i + 1: entry for i, entry in enumerate(entries[: size - 3])}


def write_vocabulary(path: Path, entries: dict[int, bytes]) -> Path:
    """Write `entries` in the World text format: id, Python literal, number of bytes."""
    with path.open("w", encoding="utf-8") as file:
        for token_id, token in entries.items():
            try:
                literal = repr(token.decode("utf-8"))
            except UnicodeDecodeError:
                literal = repr(token)
            file.write(f"{token_id} {literal} {len(token)}\n")
    return path


def write_checkpoint(path: Path, version: int = 7, shape: Shape = TINY, *, seed: int = 0) -> Path:
    """Write `checkpoint(...)` in fp32 as `.pth` or `.safetensors`, by the path's suffix."""
    tensors = checkpoint(version, shape, seed=seed)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def write_model_folder(
    folder: Path, version: int = 7, shape: Shape = TINY, *, seed: int = 0
) -> Path:
    """Write a folder like `models/demo`: `model.safetensors`, `vocab.txt`, `card.toml`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder / "model.safetensors", version, shape, seed=seed)
    write_vocabulary(folder / "vocab.txt", vocabulary(shape.vocab_size))
    card = 'template = "world"\ntemperature = 1.0\ntop_p = 0.7\nstop = ["\\n\\n"]\n'
    (folder / "card.toml").write_text(card + 'description = "a tiny random model"\n')
    return folder


def write_state(path: Path, shape: Shape = TINY, *, seed: int = 0, offset: bool = False) -> Path:
    """Write `tuned_state(...)` as an RWKV-PEFT `.pth`."""
    torch.save(tuned_state(shape, seed=seed, offset=offset), path)
    return path


def _norm(tensors: dict[str, Tensor], name: str, size: int, random: _Random) -> None:
    tensors[name + ".weight"] = random.normal(size, scale=0.1, mean=1.0)
    tensors[name + ".bias"] = random.normal(size, scale=0.1)


def _att7(tensors: dict[str, Tensor], prefix: str, shape: Shape, random: _Random) -> None:
    c = shape.hidden_size
    for name in "rwkvag":
        tensors[prefix + "x_" + name] = random.uniform(1, 1, c)
    for name, rank, scale in zip("wavg", shape.ranks, (0.5, 1.0, 1.0, 2.0), strict=True):
        if name == "v" and prefix.startswith("blocks.0."):
            continue
        if name != "g":
            tensors[f"{prefix}{name}0"] = random.normal(1, 1, c)
        tensors[f"{prefix}{name}1"] = random.normal(c, rank, scale=c**-0.5)
        tensors[f"{prefix}{name}2"] = random.normal(rank, c, scale=scale * rank**-0.5)
    tensors[prefix + "k_k"] = random.normal(1, 1, c, scale=0.1, mean=0.85)
    tensors[prefix + "k_a"] = random.normal(1, 1, c, scale=0.1, mean=1.0)
    tensors[prefix + "r_k"] = random.normal(shape.num_heads, shape.head_size, scale=0.1)
    for name in ("receptance", "key", "value", "output"):
        tensors[f"{prefix}{name}.weight"] = random.normal(c, c, scale=c**-0.5)
    _norm(tensors, prefix + "ln_x", c, random)


def _att6(tensors: dict[str, Tensor], prefix: str, shape: Shape, random: _Random) -> None:
    c = shape.hidden_size
    mix_rank, decay_rank = shape.ranks[:2]
    for name in "xwkvrg":
        tensors[prefix + "time_maa_" + name] = random.uniform(1, 1, c)
    tensors[prefix + "time_maa_w1"] = random.normal(c, 5 * mix_rank, scale=c**-0.5)
    tensors[prefix + "time_maa_w2"] = random.normal(5, mix_rank, c, scale=0.3 * mix_rank**-0.5)
    tensors[prefix + "time_decay"] = random.normal(1, 1, c, scale=1.5, mean=-2.0)
    tensors[prefix + "time_decay_w1"] = random.normal(c, decay_rank, scale=c**-0.5)
    tensors[prefix + "time_decay_w2"] = random.normal(decay_rank, c, scale=0.3 * decay_rank**-0.5)
    tensors[prefix + "time_faaaa"] = random.normal(shape.num_heads, shape.head_size, scale=0.5)
    for name in ("receptance", "key", "value", "output", "gate"):
        tensors[f"{prefix}{name}.weight"] = random.normal(c, c, scale=c**-0.5)
    _norm(tensors, prefix + "ln_x", c, random)


def _ffn(
    tensors: dict[str, Tensor], prefix: str, version: int, shape: Shape, random: _Random
) -> None:
    c, f = shape.hidden_size, shape.ffn_size
    if version == 7:
        tensors[prefix + "x_k"] = random.uniform(1, 1, c)
    else:
        tensors[prefix + "time_maa_k"] = random.uniform(1, 1, c)
        tensors[prefix + "time_maa_r"] = random.uniform(1, 1, c)
        tensors[prefix + "receptance.weight"] = random.normal(c, c, scale=c**-0.5)
    tensors[prefix + "key.weight"] = random.normal(f, c, scale=c**-0.5)
    tensors[prefix + "value.weight"] = random.normal(c, f, scale=f**-0.5)
