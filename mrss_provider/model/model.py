"""Model: token ids and slots in, hidden states and logits out. Knows no text and no requests."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from mrss_kernels import prefill_choice
from torch import Tensor
from torch.nn import functional as F

from mrss_provider.errors import ConfigError
from mrss_provider.model.config import DTYPES, QUANTIZATIONS, ModelConfig
from mrss_provider.model.cpu import keep_freed_memory, set_threads
from mrss_provider.model.fused_support import check_quantizable, fp8_obstacle
from mrss_provider.model.int8 import Int8Form, pick_int8_form
from mrss_provider.model.linear import Backend, pick_backend, pick_dtype
from mrss_provider.model.loader import Loader
from mrss_provider.model.rwkv6 import Layer6
from mrss_provider.model.rwkv7 import NORM_EPS, Layer7
from mrss_provider.model.state import STATE_DTYPES, StatePool, StateSnapshot
from mrss_provider.model.steps import DecodeStep, PrefillStep, Step
from mrss_provider.model.weights import Weights, load_weights

if TYPE_CHECKING:
    from mrss_kernels.quantized import Format

    from mrss_provider.model.cuda_graphs import DecodeGraphs, RaggedGraphs
    from mrss_provider.model.rwkv6_cuda import FusedDecoder6
    from mrss_provider.model.rwkv6_ragged import RaggedStep6
    from mrss_provider.model.rwkv7_cuda import FusedDecoder
    from mrss_provider.model.rwkv7_ragged import RaggedStep


def load_model(
    path: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 0,
    state_dtype: str = "fp32",
    quantize: str = "none",
    packed: bool = True,
    sparse_ffn: bool = False,
) -> Model:
    """Load an RWKV-6 or RWKV-7 checkpoint.

    Args:
        path: `.pth`, `.safetensors`, an index of shards, or a folder with one of them.
        device: "cpu", "cuda", or "auto": CUDA if there is one.
        dtype: of the weights: "fp32", "bf16", "fp16"; "auto" as `pick_dtype` says.
        threads: CPU threads of this whole process; 0 is physical cores - 1, at least 1.
        state_dtype: of the recurrent states, "fp32" or "fp16".
        quantize: what holds the large matrices and the head: "int8" in 8 bits; on CUDA also "int4"
            and "fp8".
        packed: lay weights out for speed; False keeps them plain, for comparison.
        sparse_ffn: on CUDA, hold the ffns' value matrices of RWKV-7 a second time, so that decoding
            one row reads only what is not multiplied by zero; not done where memory is short, and
            not with quantised weights.

    Raises:
        ModelFileError: not such a checkpoint; says what was found and what is needed.
        ConfigError: an unknown dtype, device or quantisation, CUDA where there is none, or a
            quantisation that the device or the model's shape does not allow.
    """
    for key, value, allowed in (
        ("dtype", dtype, ["auto", *DTYPES]),
        ("state_dtype", state_dtype, list(STATE_DTYPES)),
    ):
        if value not in allowed:
            raise ConfigError(
                f"{key} must be one of {', '.join(allowed)}, got {value!r}", param=key
            )
    check_quantize(quantize, device, sparse_ffn=sparse_ffn)
    where = find_device(device)
    weights = load_weights(path)
    name = pick_dtype(where, weights.dtype) if dtype == "auto" else dtype
    if where.type == "cpu":
        set_threads(threads)
    backend = pick_backend(where, name, packed=packed)
    large = _large_form(quantize, where, packed=packed)
    model = Model(weights, where, name, state_dtype, backend, large=large, sparse_ffn=sparse_ffn)
    if where.type == "cpu":
        # Not before: the temporaries of loading are large, and no step needs as much.
        keep_freed_memory()
    return model


def check_quantize(quantize: str, device: str, *, sparse_ffn: bool = False) -> None:
    """Refuse a quantisation that `device`, by its name in `load_model`, does not have.

    Raises:
        ConfigError: an unknown one, one of CUDA on a CPU, fp8 on a card that cannot, one together
            with `sparse_ffn` on CUDA, or no such device.
    """
    if quantize not in QUANTIZATIONS:
        raise ConfigError(
            f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quantize!r:.40}",
            param="quantize",
        )
    if quantize == "none":
        return
    where = find_device(device)
    if where.type == "cpu":
        if quantize != "int8":
            raise ConfigError(
                f"{quantize} weights are offered on cuda, not on a CPU; choose quantize int8 or "
                f"none",
                param="quantize",
            )
        return
    obstacle = fp8_obstacle(where) if quantize == "fp8" else None
    if obstacle is not None:
        raise ConfigError(f"{obstacle}; choose quantize int8 or int4", param="quantize")
    if sparse_ffn:
        raise ConfigError(
            f"sparse_ffn keeps weights in 16 bits once more, and quantize {quantize} none of them; "
            f"choose one of the two",
            param="sparse_ffn",
        )


class Model:
    """A loaded checkpoint.

    On a CPU a row's hidden states, logits and states do not depend, bit for bit, on its slot nor on
    what else is in the batch of `decode` or `prefill`; see `linear` for where this was measured.

    Attributes:
        config: version, shape, dtype, fingerprint.
        device: where the weights are.
        base_state: the state that came inside the checkpoint, or None for zeros.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        dtype: str,
        state_dtype: str,
        backend: Backend,
        *,
        large: Int8Form | Format | None = None,
        sparse_ffn: bool = False,
    ) -> None:
        """Convert and lay out the weights; see `load_model`, and `Loader` for `large`.

        Raises:
            ModelFileError: values that cannot be held so.
            ConfigError: a shape or dtype that cannot be quantised so.
        """
        self._wants_sparse_ffn = sparse_ffn
        self.config = ModelConfig(
            version=weights.version,
            num_layers=weights.num_layers,
            hidden_size=weights.hidden_size,
            num_heads=weights.num_heads,
            head_size=weights.head_size,
            vocab_size=weights.vocab_size,
            ffn_size=weights.ffn_size,
            dtype=dtype,
            fingerprint=weights.fingerprint,
            name=weights.name,
            quantize="none" if large is None else "int8" if large in ("vnni", "pack") else large,
            content=weights.content,
        )
        self.device = device
        check_quantizable(self.config, device)
        self.base_state = _base_state(weights, device)
        self._state_dtype = state_dtype
        load = Loader(weights, device, DTYPES[dtype], backend, large)
        self._embedding = load.matrix("emb.weight", own=True)
        self._ln0 = load.norm("blocks.0.ln0") if "blocks.0.ln0.weight" in weights.tensors else None
        layer = Layer7 if weights.version == 7 else Layer6
        self._layers = [
            layer(i, load.vectors(f"blocks.{i}."), weights.num_heads, load.linears(f"blocks.{i}."))
            for i in range(weights.num_layers)
        ]
        self._ln_out = load.norm("ln_out")
        self._head = load.head()

    def new_pool(self, num_slots: int) -> StatePool:
        """Allocate the states of `num_slots` rows, each at the base state."""
        return StatePool(
            self.config,
            num_slots,
            device=self.device,
            state_dtype=self._state_dtype,
            base=self.base_state,
        )

    @torch.no_grad()
    def decode(self, token_ids: Tensor, slots: Tensor, pool: StatePool) -> Tensor:
        """Read one token a row.

        Args:
            token_ids: int64 [B].
            slots: int64 [B], each row's state in `pool`, no slot twice; -1 is a padding row.
            pool: *modified* at `slots`.

        Returns:
            hidden [B, C] fp32, after the last norm; undefined for padding rows.
        """
        if self._graphs is not None:
            return self._graphs.decode(token_ids, slots, pool)
        return self.decode_by_layer(token_ids, slots, pool)

    @torch.no_grad()
    def decode_by_layer(self, token_ids: Tensor, slots: Tensor, pool: StatePool) -> Tensor:
        """Read one token a row, one torch op after the other; as `decode`, on any device."""
        with torch.inference_mode():
            x = self._forward(token_ids, DecodeStep(pool, slots))
        return self._norm_out(x)

    @torch.no_grad()
    def prefill(
        self,
        token_ids: Tensor,
        cu_seqlens: Sequence[int],
        slots: Tensor,
        pool: StatePool,
        *,
        all_positions: bool = False,
    ) -> Tensor:
        """Read one or more tokens of several rows, packed one row after the other.

        A decoding row is a sequence of one token: with the fused form, prompts and decoding rows of
        one call share one pass over the weights.

        Args:
            token_ids: int64 [T].
            cu_seqlens: n + 1 offsets into T, from 0 to T, growing.
            slots: int64 [n], each row's state in `pool`, no slot twice.
            pool: *modified* at `slots`.
            all_positions: return every token's hidden state, not only each row's last.

        Returns:
            hidden [n, C], or [T, C] with `all_positions`, fp32, after the last norm.
        """
        if self._ragged is not None:
            from mrss_kernels import ragged_index

            bounds = ragged_index.upload_bounds(cu_seqlens, token_ids.shape[0], slots)
            return self._ragged.forward(token_ids, bounds, slots, pool, all_positions=all_positions)
        return self.prefill_by_layer(
            token_ids, cu_seqlens, slots, pool, all_positions=all_positions
        )

    @torch.no_grad()
    def prefill_by_layer(
        self,
        token_ids: Tensor,
        cu_seqlens: Sequence[int],
        slots: Tensor,
        pool: StatePool,
        *,
        all_positions: bool = False,
    ) -> Tensor:
        """Read packed tokens, one torch op after the other; as `prefill`, on any device."""
        with torch.inference_mode():
            step = PrefillStep(pool, slots, cu_seqlens)
            x = self._forward(token_ids, step)
        return self._norm_out(x if all_positions else x[step.lasts])

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [M, V] fp32 of hidden states [M, C]."""
        if self.fused is not None:
            return self.fused.head(hidden)
        return self._head(hidden).float()

    @functools.cached_property
    def fused(self) -> FusedDecoder | FusedDecoder6 | None:
        """The fused decode step, or None where its kernels cannot run."""
        if self.device.type != "cuda":
            return None
        # Here and not above: a machine without CUDA needs no Triton.
        from mrss_provider.model import rwkv6_cuda, rwkv7_cuda
        from mrss_provider.model.products import weight_of

        if not rwkv7_cuda.is_supported(self.config, self.device):
            return None
        head = weight_of(self._head)
        around = (self._embedding, self._ln0, self._ln_out, head)
        if self.config.version == 6:
            return rwkv6_cuda.FusedDecoder6(cast(list[Layer6], self._layers), *around)
        return rwkv7_cuda.FusedDecoder(
            cast(list[Layer7], self._layers), *around, sparse_ffn=self._has_sparse_ffn()
        )

    def _has_sparse_ffn(self) -> bool:
        """Tell whether the second copies are wanted, and leave as much memory free again."""
        shape = self.config
        size = 2 * shape.num_layers * shape.hidden_size * shape.ffn_size
        return self._wants_sparse_ffn and torch.cuda.mem_get_info(self.device)[0] >= 2 * size

    @functools.cached_property
    def _graphs(self) -> DecodeGraphs | None:
        if self.fused is None:
            return None
        from mrss_provider.model.cuda_graphs import DecodeGraphs

        return DecodeGraphs(self.fused.decode)

    @functools.cached_property
    def ragged(self) -> RaggedStep | RaggedStep6 | None:
        """The fused pass over packed tokens, or None where it cannot run or fla is chosen."""
        if self.fused is None or prefill_choice() == "fla":
            return None
        from mrss_provider.model.rwkv6_cuda import FusedDecoder6
        from mrss_provider.model.rwkv6_ragged import RaggedStep6
        from mrss_provider.model.rwkv7_ragged import RaggedStep

        around = (self._embedding, self._ln0, self._ln_out)
        if isinstance(self.fused, FusedDecoder6):
            return RaggedStep6(self.fused.layers, *around)
        return RaggedStep(self.fused.layers, *around)

    @property
    def packs_rows(self) -> bool:
        """Whether `prefill` reads the tokens of decoding rows in one pass with prompts."""
        return self.ragged is not None

    @functools.cached_property
    def _ragged(self) -> RaggedGraphs | None:
        if self.ragged is None:
            return None
        from mrss_provider.model.cuda_graphs import RaggedGraphs

        return RaggedGraphs(self.ragged.forward)

    def _forward(self, token_ids: Tensor, step: Step) -> Tensor:
        """Return the residual stream after the last layer [M, C] fp32."""
        x = self._embedding[token_ids].float()
        if self._ln0 is not None:
            x = F.layer_norm(x, x.shape[1:], *self._ln0, NORM_EPS)
        v_first: Tensor | None = None
        for layer in self._layers:
            x, v_first = layer(x, v_first, step)
        return x

    def _norm_out(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], *self._ln_out, NORM_EPS)


def find_device(name: str) -> torch.device:
    """Return the device that a configuration names: auto, cpu or cuda.

    Raises:
        ConfigError: none of these, or torch sees no CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        which = "; CUDA_VISIBLE_DEVICES says which card" if name.startswith("cuda:") else ""
        raise ConfigError(
            f"device must be one of auto, cpu, cuda, got {name!r}{which}", param="device"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device; use cpu", param="device")
    return torch.device(name)


def _large_form(quantize: str, device: torch.device, *, packed: bool) -> Int8Form | Format | None:
    """Return how large matrices are held; None is in the weights' dtype."""
    if quantize == "none":
        return None
    if device.type == "cpu":
        return pick_int8_form(packed=packed)
    return cast("Format", quantize)


def _base_state(weights: Weights, device: torch.device) -> StateSnapshot | None:
    if weights.time_state is None:
        return None
    wkv = weights.time_state if weights.version == 7 else weights.time_state.mT
    zeros = torch.zeros(weights.num_layers, weights.hidden_size, device=device)
    return StateSnapshot(wkv.contiguous().to(device), zeros, zeros.clone())
