"""A checkpoint file -> the tensors of an RWKV-6 or RWKV-7, in one layout. All transposes are here.

Layouts understood: the official names (with or without a `model.` prefix, vectors as [1,1,C] or
[C]) and fla's. Shapes, LoRA ranks and the number of layers come from the tensors. Out come the
official names, vectors as [C], and every matrix as [out, in], ready for `F.linear`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mrss_provider.errors import ModelFileError
from mrss_provider.model.checkpoint import Tensors, find_checkpoint, read_tensors

_LAYER = re.compile(r"blocks\.(\d{1,4})\.")

KEY_WEIGHT = "blocks.0.att.key.weight"
"""The tensor whose hash is a model's fingerprint."""

# Of a matrix, for the hash of its content.
_NUM_ROWS_READ = 64

_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Shapes in the official layout, [1, 1, C] written as C. Letters: C width, H heads, N head size,
# V vocabulary, F of the ffn; W, A, U, G, M, D ranks. A letter has one size in all layers.
_COMMON = {
    "ln1.weight": "C", "ln1.bias": "C", "ln2.weight": "C", "ln2.bias": "C",
    "att.receptance.weight": "CC", "att.key.weight": "CC", "att.value.weight": "CC",
    "att.output.weight": "CC", "att.ln_x.weight": "C", "att.ln_x.bias": "C",
    "ffn.key.weight": "FC", "ffn.value.weight": "CF",
}  # fmt: skip
_LAYER7 = _COMMON | {
    "att.x_r": "C", "att.x_w": "C", "att.x_k": "C", "att.x_v": "C", "att.x_a": "C",
    "att.x_g": "C", "att.w0": "C", "att.w1": "CW", "att.w2": "WC", "att.a0": "C",
    "att.a1": "CA", "att.a2": "AC", "att.v0": "C", "att.v1": "CU", "att.v2": "UC",
    "att.g1": "CG", "att.g2": "GC", "att.k_k": "C", "att.k_a": "C", "att.r_k": "HN",
    "ffn.x_k": "C",
}  # fmt: skip
_LAYER6 = _COMMON | {
    "att.time_maa_x": "C", "att.time_maa_w": "C", "att.time_maa_k": "C", "att.time_maa_v": "C",
    "att.time_maa_r": "C", "att.time_maa_g": "C", "att.time_maa_w1": "CM",
    "att.time_maa_w2": "5DC", "att.time_decay": "C", "att.time_decay_w1": "CW",
    "att.time_decay_w2": "WC", "att.time_faaaa": "HN", "att.gate.weight": "CC",
    "ffn.time_maa_k": "C", "ffn.time_maa_r": "C", "ffn.receptance.weight": "CC",
}  # fmt: skip
_TOP = {
    "emb.weight": "VC", "blocks.0.ln0.weight": "C", "blocks.0.ln0.bias": "C",
    "ln_out.weight": "C", "ln_out.bias": "C", "head.weight": "VC",
}  # fmt: skip
_LORA = re.compile(r"att\.([wavg][12]|time_maa_w[12]|time_decay_w[12])$")

_FLA_LAYER = {
    "pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2", "attn.g_norm": "att.ln_x",
    "attn.r_proj": "att.receptance", "attn.k_proj": "att.key", "attn.v_proj": "att.value",
    "attn.o_proj": "att.output",
}  # fmt: skip
_FLA_TOP = {"embeddings.": "emb.", "norm.": "ln_out.", "lm_head.": "head."}
_FLA_LORA = {"lora.2.bias": "0", "lora.0.weight": "1", "lora.2.weight": "2"}


@dataclass(frozen=True)
class Weights:
    """The tensors of one model, in the layout of this module, in the file's dtype.

    Attributes:
        tensors: name -> tensor; matrices [out, in], `att.time_maa_w2` [5, C, D], vectors [C].
        time_state: [L, H, V, K] as tuned state files have it, if the checkpoint brings one.
    """

    version: int
    num_layers: int
    hidden_size: int
    num_heads: int
    head_size: int
    vocab_size: int
    ffn_size: int
    dtype: torch.dtype
    fingerprint: str
    name: str
    tensors: Mapping[str, Tensor]
    time_state: Tensor | None

    @functools.cached_property
    def content(self) -> str:
        """A hash (hex) that every number has a part in, of all tensors; reads them once.

        Checkpoints that were trained further may share layer 0's key weight, and no state.
        """
        digest = hashlib.sha256()
        states = {} if self.time_state is None else {"time_state": self.time_state}
        for name, tensor in sorted((dict(self.tensors) | states).items()):
            digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
            data = tensor.contiguous()
            # All of a large one would take as long as loading it.
            digest.update(str(_sum_of_bits(data)).encode())
            some = data[:: max(1, len(data) // _NUM_ROWS_READ)] if data.ndim > 1 else data
            digest.update(some.contiguous().view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()


def load_weights(path: Path) -> Weights:
    """Read a checkpoint file or folder and check it whole.

    Raises:
        ModelFileError: not an RWKV-6 or RWKV-7, or with tensors missing, unknown or of a wrong
            shape; one sentence says what was found and what is needed.
    """
    file = find_checkpoint(path, ModelFileError)
    raw, _ = read_tensors(file, ModelFileError)
    tensors = _official_names(raw, file)
    version = _version(tensors, file)
    num_layers = 1 + max(int(layer[1]) for layer in map(_LAYER.match, tensors) if layer)
    states = [tensors.pop(f"blocks.{i}.att.time_state", None) for i in range(num_layers)]
    for name in ("att.v0", "att.v1", "att.v2"):
        tensors.pop("blocks.0." + name, None)
    sizes = _check_shapes(tensors, version, num_layers, file)
    key_weight = tensors[KEY_WEIGHT]
    return Weights(
        version=version,
        num_layers=num_layers,
        hidden_size=sizes["C"],
        num_heads=sizes["H"],
        head_size=sizes["N"],
        vocab_size=sizes["V"],
        ffn_size=sizes["F"],
        dtype=key_weight.dtype,
        fingerprint=tensor_hash(key_weight),
        name=path.resolve().name if path.is_dir() else file.stem,
        tensors={name: _canonical(name, tensor) for name, tensor in tensors.items()},
        time_state=_stack_states(states, sizes, file),
    )


def tensor_hash(tensor: Tensor) -> str:
    """Return the sha256 (hex) of a tensor's bytes, row after row, as stored."""
    data = tensor.contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()


def _sum_of_bits(tensor: Tensor) -> int:
    """Return the sum of a contiguous tensor's memory, as integers that wrap around."""
    memory = tensor.view(-1).view(torch.uint8)
    is_even = len(memory) % 8 == 0 and memory.storage_offset() % 8 == 0
    return int(memory.view(torch.int64).sum() if is_even else memory.sum(dtype=torch.int64))


def _official_names(raw: Tensors, file: Path) -> Tensors:
    """Rename to the official names and layout; vectors become [C]."""
    named = {re.sub(r"^(?:_orig_mod\.|model\.)*", "", name): t for name, t in raw.items()}
    if any(".attn.r_proj." in name for name in named):
        named = _from_fla(named, file)
    for name, tensor in named.items():
        if tensor.dtype not in _STORED_DTYPES:
            raise ModelFileError(
                f"{file}: {name} has dtype {tensor.dtype}; needed are fp32, bf16 or fp16 weights"
            )
    return {
        name: t.flatten() if t.ndim == 3 and t.shape[:2] == (1, 1) else t
        for name, t in named.items()
    }


def _from_fla(named: Tensors, file: Path) -> Tensors:
    """Map fla's names and layout to the official ones; without a pre_norm there is no ln0."""
    if not any(".attn.w_lora." in name for name in named):
        raise ModelFileError(
            f"{file} has fla's layout but is no RWKV-7; RWKV-6 is read in the official layout only"
        )
    tensors: Tensors = {}
    for name, tensor in named.items():
        layer = re.match(r"layers\.(\d+)\.(.+)", name)
        if layer is None:
            prefix = next((old for old in _FLA_TOP if name.startswith(old)), "")
            tensors[_FLA_TOP.get(prefix, "") + name.removeprefix(prefix)] = tensor
            continue
        block, rest = f"blocks.{layer[1]}.", layer[2]
        module, _, kind = rest.rpartition(".")
        lora = re.match(r"attn\.([wavg])_lora\.(.+)", rest)
        if lora is not None and lora[2] in _FLA_LORA:
            part = _FLA_LORA[lora[2]]
            tensors[f"{block}att.{lora[1]}{part}"] = tensor if part == "0" else tensor.t()
        elif rest == "attn.x_x":
            for mixed, row in zip("rwkvag", tensor.reshape(6, -1), strict=True):
                tensors[f"{block}att.x_{mixed}"] = row
        elif module in _FLA_LAYER:
            tensors[f"{block}{_FLA_LAYER[module]}.{kind}"] = tensor
        else:
            tensors[block + re.sub(r"^attn\.", "att.", rest)] = tensor
    return tensors


def _version(tensors: Tensors, file: Path) -> int:
    """Return 6 or 7, by the names in the file.

    Raises:
        ModelFileError: another version, another architecture, or a tuned state.
    """
    layer = {name.removeprefix("blocks.0.") for name in tensors if name.startswith("blocks.0.")}
    needed = "needed are RWKV-6 (x060) or RWKV-7 (x070) weights"
    found = ""
    if any(name.startswith("qkv.") for name in layer):
        found = "an RWKV-7b (x070b, with deep-embedding attention)"
    elif any(name.startswith("ffn.s_emb") for name in layer):
        found = "an RWKV-7a (x070a, with deep embeddings)"
    elif "att.r_k" in layer:
        return 7
    elif "att.time_maa_x" in layer:
        return 6
    elif "att.time_decay" in layer:
        found = "an RWKV-5 (x05x)" if "att.ln_x.weight" in layer else "an RWKV-4"
    elif any(name.endswith("att.time_state") for name in layer):
        found = "a tuned state, not a model"
    if found:
        raise ModelFileError(f"{file} is {found}; {needed}")
    some = ", ".join(sorted(tensors)[:3]) or "none"
    raise ModelFileError(
        f"{file} is not an RWKV model: it holds {len(tensors)} tensors ({some}, ...); {needed}"
    )


def _check_shapes(tensors: Tensors, version: int, num_layers: int, file: Path) -> dict[str, int]:
    """Return the size that each letter has.

    Raises:
        ModelFileError: a tensor that is missing, unknown, or whose shape fits no size.
    """
    layer = _LAYER7 if version == 7 else _LAYER6
    expected = dict(_TOP)
    for i in range(num_layers):
        expected.update({f"blocks.{i}.{name}": shape for name, shape in layer.items()})
    optional = {f"blocks.0.att.v{n}" for n in "012"}
    if "blocks.0.ln0.weight" not in tensors and "blocks.0.ln0.bias" not in tensors:
        optional |= {"blocks.0.ln0.weight", "blocks.0.ln0.bias"}
    kind = f"an RWKV-{version} of {num_layers} layers"
    missing = sorted(expected.keys() - tensors.keys() - optional)
    unknown = sorted(tensors.keys() - expected.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelFileError(f"{file} lacks {missing[0]}{more}, which {kind} needs")
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ModelFileError(f"{file} holds {unknown[0]}{more}, which {kind} does not have")
    sizes: dict[str, int] = {"5": 5}
    for name in ("att.r_k", "att.time_faaaa"):
        if "blocks.0." + name in tensors:
            sizes |= zip("HN", tensors["blocks.0." + name].shape, strict=False)
    for name, letters in expected.items():
        if name in tensors:
            _bind(name, tensors[name], letters, sizes, file)
    if sizes["H"] * sizes["N"] != sizes["C"]:
        raise ModelFileError(
            f"{file}: {sizes['H']} heads of {sizes['N']} do not make the width {sizes['C']}"
        )
    if version == 6 and sizes["M"] != 5 * sizes["D"]:
        raise ModelFileError(
            f"{file}: blocks.0.att.time_maa_w1 has {sizes['M']} columns, needed are "
            f"5 x {sizes['D']} for time_maa_w2"
        )
    return sizes


def _bind(name: str, tensor: Tensor, letters: str, sizes: dict[str, int], file: Path) -> None:
    shape = tuple(tensor.shape)
    if len(shape) == len(letters):
        bound = [
            sizes.setdefault(letter, size) for letter, size in zip(letters, shape, strict=True)
        ]
        if tuple(bound) == shape:
            return
    needed = ", ".join(str(sizes.get(letter, "any")) for letter in letters)
    raise ModelFileError(f"{file}: {name} has shape {list(shape)}, needed is [{needed}]")


def _canonical(name: str, tensor: Tensor) -> Tensor:
    """Matrices that the file keeps as [in, out] become [out, in]."""
    return tensor.mT if _LORA.search(name) else tensor


def _stack_states(states: list[Tensor | None], sizes: dict[str, int], file: Path) -> Tensor | None:
    found = [state for state in states if state is not None]
    if not found:
        return None
    shape = (sizes["H"], sizes["N"], sizes["N"])
    if len(found) != len(states):
        raise ModelFileError(
            f"{file} holds a time_state for {len(found)} of its {len(states)} layers; needed is "
            f"one for each, or none"
        )
    for i, state in enumerate(found):
        if tuple(state.shape) != shape:
            raise ModelFileError(
                f"{file}: blocks.{i}.att.time_state has shape {list(state.shape)}, needed is "
                f"{list(shape)}"
            )
    return torch.stack([state.float() for state in found])
