"""Tuned states: read from and written to files, averaged, and checked for their orientation.

Read are RWKV-PEFT's `.pth`, our safetensors form and web-rwkv's `.st`. In files a state is
[H, V, K] ("vk") unless said otherwise ("kv", the transpose); in memory it is as the model's pool.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from mrss_provider.errors import InvalidRequestError, StateFileError
from mrss_provider.mixture import check_weight
from mrss_provider.model.checkpoint import Tensors, read_tensors
from mrss_provider.model.config import ModelConfig
from mrss_provider.model.model import Model
from mrss_provider.model.state_metadata import ORIENTATIONS, Orientation, StateMetadata
from mrss_provider.replacing import replace_file

log = logging.getLogger(__name__)

SAMPLE_TOKENS = 4096
"""Tokens of a text that `check_orientation` reads at most."""

_SLICE = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LAYER_TENSOR = re.compile(r"blocks\.(\d{1,4})\.att\.(time_state|time_offset)")


@dataclass(frozen=True, eq=False)
class TunedState:
    """What a row starts from instead of zeros.

    Attributes:
        name: what requests call it.
        wkv: [L, H, N, N] fp32 in the model's orientation, [V, K] for RWKV-7, [K, V] for RWKV-6.
        time_offset: [L, C] fp32: `y * (1 + time_offset)` after wkv, at every token; or None.
        shift_att: [L, C] fp32, or None for zeros.
        shift_ffn: [L, C] fp32, or None for zeros.
        metadata: what the file says of itself.
        sha256: of the tensors (hex): equal for equal content, whatever file it came from.
    """

    name: str
    wkv: Tensor
    time_offset: Tensor | None = None
    shift_att: Tensor | None = None
    shift_ffn: Tensor | None = None
    metadata: StateMetadata = field(default_factory=StateMetadata)
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for tensor in (self.wkv, self.time_offset, self.shift_att, self.shift_ffn):
            digest.update(b"none" if tensor is None else str(tuple(tensor.shape)).encode())
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().data)
        object.__setattr__(self, "sha256", digest.hexdigest())

    @property
    def layer_norms(self) -> tuple[float, ...]:
        """Frobenius norm of each layer's wkv: trainings differ by orders of magnitude."""
        return tuple(float(norm) for norm in self.wkv.flatten(1).norm(dim=1))


@dataclass(frozen=True)
class OrientationCheck:
    """How well a sample of text is predicted, in nats a token: lower is better.

    Attributes:
        assumed: how the file is read without an override.
        nll_vk: with the file read as [H, V, K].
        nll_kv: with the file read as [H, K, V].
        nll_base: without the state.
    """

    assumed: Orientation
    nll_vk: float
    nll_kv: float
    nll_base: float

    @property
    def better(self) -> Orientation:
        """The orientation that predicts the sample better."""
        return "vk" if self.nll_vk <= self.nll_kv else "kv"


def load_tuned_state(
    path: Path,
    config: ModelConfig,
    *,
    name: str,
    orientation: Orientation | None = None,
    strict: bool = False,
) -> TunedState:
    """Read a state file for a model.

    Args:
        path: `.pth`, `.safetensors` or `.st`.
        config: of the loaded model.
        name: what requests will call it.
        orientation: overrides the file's: by its metadata, else "kv" for `.st`, else "vk".
        strict: refuse, instead of warning, if it was tuned on other weights of this shape.

    Raises:
        StateFileError: not a state, one for another shape (both are named), not finite, or with
            `strict` one for other weights.
    """
    if orientation is not None and orientation not in ORIENTATIONS:
        raise StateFileError(f"orientation must be vk or kv, got {orientation!r}")
    if not path.is_file():
        raise StateFileError(f"{path} does not exist or is no file; give a .pth or .safetensors")
    tensors, strings = read_tensors(path, StateFileError)
    metadata = StateMetadata.from_strings(strings, path)
    if metadata.orientation is None:
        metadata = replace(metadata, orientation="kv" if path.suffix == ".st" else "vk")
    if orientation is not None:
        metadata = replace(metadata, orientation=orientation)
    _check_base(metadata, config, path, strict=strict)
    parts = _collect(tensors, config, path)
    wkv = parts["wkv"]
    # As in the file, states are [H, V, K]; RWKV-6 computes with [K, V].
    if (metadata.orientation == "kv") == (config.version == 7):
        wkv = wkv.mT
    return TunedState(
        name,
        wkv.contiguous(),
        parts.get("time_offset"),
        parts.get("shift_att"),
        parts.get("shift_ffn"),
        metadata,
    )


def save_tuned_state(path: Path, state: TunedState, config: ModelConfig) -> None:
    """Write a state for `config`'s model: ours as `.safetensors`, RWKV-PEFT's as `.pth`.

    The file is complete or not there at all. A `.pth` holds neither metadata nor shift states.

    Raises:
        StateFileError: another suffix, a state of another shape, or shift states in a `.pth`.
    """
    if tuple(state.wkv.shape) != config.state_shape:
        raise StateFileError(
            f"{state.name} has shape {list(state.wkv.shape)}; the model ({config.shape_text()}) "
            f"needs {list(config.state_shape)}"
        )
    if path.suffix not in (".safetensors", ".pth"):
        raise StateFileError(f"a state is saved as .safetensors or .pth, got {path.name!r}")
    shifts = {"shift_att": state.shift_att, "shift_ffn": state.shift_ffn}
    has_shifts = any(shift is not None for shift in shifts.values())
    if path.suffix == ".pth" and has_shifts:
        raise StateFileError(
            f"{state.name} has shift states, which a .pth cannot hold; save it as .safetensors"
        )
    tensors: Tensors = {}
    for i, wkv in enumerate(state.wkv if config.version == 7 else state.wkv.mT):
        tensors[f"blocks.{i}.att.time_state"] = wkv.contiguous().clone()
        if state.time_offset is not None:
            tensors[f"blocks.{i}.att.time_offset"] = state.time_offset[i].clone()
    tensors |= {key: shift.contiguous() for key, shift in shifts.items() if shift is not None}
    data = io.BytesIO()
    if path.suffix == ".pth":
        torch.save(tensors, data)
    else:
        metadata = replace(state.metadata, orientation="vk")
        data.write(save(tensors, metadata=metadata.to_strings(config)))
    try:
        replace_file(path, data.getbuffer())
    except OSError as exc:
        raise StateFileError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def average_states(
    states: Sequence[TunedState], weights: Sequence[float], *, name: str
) -> TunedState:
    """Make one state, sum of weight * state with weights scaled to sum 1: one row's cost.

    An offset or shift that some states lack counts as zeros there.

    Raises:
        InvalidRequestError: no states, other counts, bad weights, or states of different shapes or
            for different base models.
    """
    if not states or len(states) != len(weights):
        raise InvalidRequestError(
            f"an average needs one weight a state, got {len(states)} states, {len(weights)} weights"
        )
    largest = max(check_weight(weight, "weights") for weight in weights)
    if min(weights) < 0:
        raise InvalidRequestError(f"a weight must be finite and >= 0, got {min(weights):g}")
    if largest == 0:
        raise InvalidRequestError("an average needs at least one weight above 0")
    if len({state.wkv.shape for state in states}) > 1:
        raise InvalidRequestError("states of different shapes cannot be averaged")
    bases = {s.metadata.base_sha256 for s in states} - {None}
    if len(bases) > 1:
        raise InvalidRequestError("states tuned on different base weights cannot be averaged")
    # Divided by the largest first, the sum is finite whatever the weights.
    ratios = [weight / largest for weight in weights]
    shares = [ratio / sum(ratios) for ratio in ratios]

    def mean(tensors: Sequence[Tensor | None]) -> Tensor | None:
        found = [(t, share) for t, share in zip(tensors, shares, strict=True) if t is not None]
        if not found:
            return None
        return torch.stack([tensor * share for tensor, share in found]).sum(0)

    wkv = mean([s.wkv for s in states])
    assert wkv is not None
    return TunedState(
        name,
        wkv,
        mean([s.time_offset for s in states]),
        mean([s.shift_att for s in states]),
        mean([s.shift_ffn for s in states]),
        _average_metadata(states, shares),
    )


def check_orientation(model: Model, path: Path, token_ids: Sequence[int]) -> OrientationCheck:
    """Score a sample of tokens with a state file read both ways; change and decide nothing.

    Args:
        model: whose state it is.
        path: the state file.
        token_ids: at least two tokens of text that the state should predict well; those after
            the first `SAMPLE_TOKENS` are not read. A state tuned with a leading token 0 reads
            one first, as it does in an engine.

    Raises:
        StateFileError: as `load_tuned_state`.
        InvalidRequestError: fewer than two tokens.
    """
    if len(token_ids) < 2:
        raise InvalidRequestError(f"a sample has at least 2 tokens, got {len(token_ids)}")
    assumed = load_tuned_state(path, model.config, name="sample").metadata.orientation
    states = [
        load_tuned_state(path, model.config, name="sample", orientation=way) for way in ORIENTATIONS
    ]
    vk, kv, base = _score(model, [*states, None], token_ids[:SAMPLE_TOKENS])
    return OrientationCheck(assumed or "vk", vk, kv, base)


def _score(
    model: Model, states: Sequence[TunedState | None], token_ids: Sequence[int]
) -> list[float]:
    """Return nats a token of `token_ids` after the first, from each of the states [R]."""
    rows = len(states)
    ids = torch.tensor(token_ids, device=model.device)
    slots = torch.arange(rows, device=model.device)
    pool = model.new_pool(rows)
    for slot, state in enumerate(states):
        pool.write(slot, state)
        if state is not None and state.metadata.bos and token_ids[0] != 0:
            model.decode(torch.zeros_like(ids[:1]), slots[slot : slot + 1], pool)
    nll = torch.zeros(rows, dtype=torch.float64, device=model.device)
    last = len(token_ids) - 1
    # In slices: logits of a whole text are gigabytes.
    for start in range(0, last, _SLICE):
        count = min(_SLICE, last - start)
        read, following = ids[start : start + count], ids[start + 1 : start + 1 + count]
        offsets = [row * count for row in range(rows + 1)]
        hidden = model.prefill(read.repeat(rows), offsets, slots, pool, all_positions=True)
        logits = model.head(hidden)
        chosen = logits.gather(-1, following.repeat(rows)[:, None])[:, 0]
        nll += (logits.logsumexp(-1) - chosen).view(rows, count).sum(1)
    return [float(value) / last for value in nll]


def _check_base(metadata: StateMetadata, config: ModelConfig, path: Path, *, strict: bool) -> None:
    if metadata.base_shape is not None and metadata.base_shape != config.shape_text():
        raise StateFileError(
            f"{path.name} is for {metadata.base_shape}; the loaded model is {config.shape_text()}"
        )
    if metadata.base_sha256 in (None, config.fingerprint):
        return
    text = (
        f"{path.name} was tuned on other weights ({metadata.base_name or 'unnamed'}) than the "
        f"loaded ones ({config.name})"
    )
    if strict:
        raise StateFileError(f"{text}, which strict refuses; take the model it was tuned on")
    log.warning("%s; it may do little or harm", text)


def _collect(tensors: Tensors, config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Sort a file's tensors into wkv [L, H, N, N], time_offset, shift_att and shift_ffn [L, C]."""
    by_layer: dict[str, dict[int, Tensor]] = {"time_state": {}, "time_offset": {}}
    parts: dict[str, Tensor] = {}
    for raw_name, tensor in tensors.items():
        tensor_name = re.sub(r"^(?:_orig_mod\.|model\.)*", "", raw_name)
        layer = _LAYER_TENSOR.fullmatch(tensor_name)
        if layer is not None:
            by_layer[layer[2]][int(layer[1])] = tensor
        elif tensor_name in ("shift_att", "shift_ffn"):
            parts[tensor_name] = tensor
        elif "emb.weight" in tensors or "model.embeddings.weight" in tensors:
            raise StateFileError(f"{path.name} is a model, not a tuned state")
        else:
            raise StateFileError(
                f"{path.name} is not a tuned state: it holds {raw_name}; needed are "
                f"blocks.0.att.time_state and the other layers'"
            )
        if tensor.dtype not in _DTYPES:
            raise StateFileError(
                f"{path.name}: {raw_name} has dtype {tensor.dtype}; needed are fp32, bf16, fp16 "
                f"or fp64 values"
            )
    layers, heads, size, _ = config.state_shape
    width = (config.hidden_size,)
    if not by_layer["time_state"]:
        raise StateFileError(f"{path.name} holds no blocks.0.att.time_state, so it is no state")
    parts["wkv"] = _stack(by_layer["time_state"], (heads, size, size), config, path, "time_state")
    if by_layer["time_offset"]:
        # A tensor may be spelled far larger than its file; one of another size is refused below.
        offsets = {
            i: offset.flatten() if offset.numel() == config.hidden_size else offset
            for i, offset in by_layer["time_offset"].items()
        }
        parts["time_offset"] = _stack(offsets, width, config, path, "time_offset")
    for key, tensor in parts.items():
        if key.startswith("shift") and tuple(tensor.shape) != (layers, *width):
            raise StateFileError(
                f"{path.name}: {key} has shape {list(tensor.shape)}; the loaded model "
                f"({config.shape_text()}) needs {[layers, *width]}"
            )
        # After the shape: a file may spell a tensor that is far larger than the file. A copy: the
        # file may change under a mapped one.
        parts[key] = tensor.to(torch.float32, copy=True).contiguous()
        if not torch.isfinite(parts[key]).all():
            raise StateFileError(f"{path.name}: {key} holds NaN or infinite values")
    return parts


def _stack(
    by_layer: Mapping[int, Tensor],
    shape: tuple[int, ...],
    config: ModelConfig,
    path: Path,
    kind: str,
) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in by_layer.values()}
    if shapes != {shape} or set(by_layer) != set(range(config.num_layers)):
        found = " and ".join(str(list(found)) for found in sorted(shapes))
        raise StateFileError(
            f"{path.name} holds {kind} for {len(by_layer)} layers of shape {found}; the loaded "
            f"model ({config.shape_text()}) needs {config.num_layers} of {list(shape)}"
        )
    return torch.stack([by_layer[i].float() for i in range(config.num_layers)])


def _average_metadata(states: Sequence[TunedState], shares: Sequence[float]) -> StateMetadata:
    first = states[0].metadata
    groups = {state.metadata.group for state in states}
    losses = {state.metadata.loss_on for state in states}
    licences = {state.metadata.licence for state in states}
    parts = [
        {"name": state.name, "sha256": state.sha256, "share": round(share, 6)}
        for state, share in zip(states, shares, strict=True)
    ]
    base = next((s.metadata for s in states if s.metadata.base_sha256), first)
    assert math.isclose(sum(shares), 1.0)
    return StateMetadata(
        group=first.group if len(groups) == 1 else None,
        loss_on=first.loss_on if len(losses) == 1 else None,
        local=all(state.metadata.local for state in states),
        bos=any(state.metadata.bos for state in states),
        orientation="vk",
        base_name=base.base_name,
        base_shape=base.base_shape,
        base_sha256=base.base_sha256,
        licence=first.licence if len(licences) == 1 else None,
        training={"average_of": parts},
        template=first.template if len({s.metadata.template for s in states}) == 1 else None,
    )
