"""All layers of RWKV-7's decode step in one launch: its weights, its buffers, its arguments.

What it computes is what `add_norm_mix`, `rows_linear` and `time_mix7` compute launch by launch,
with other cuts of the sums. Derivation and measurements: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mrss_kernels._checks import (
    expect_contiguous,
    expect_device,
    expect_dtype,
    expect_rows_of_slots,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch, shared_bytes
from mrss_kernels.persistent7_ahead import blocks_ahead
from mrss_kernels.persistent7_choice import HEAD_SIZE, ROWS, obstacle_to_one_launch
from mrss_kernels.persistent7_cuts import (
    FFN_FACTOR,
    Cuts,
    buffer_sizes,
    find_cuts,
    keeps_states,
)


@dataclass(frozen=True)
class StackedLayers7:
    """The weights of L layers, one below the other.

    Attributes:
        project: as `PackedLayer.project`, layer 0 filled up with zeros: [L (3C + sum(ranks)), C].
        up: second halves of the LoRAs, likewise: [L C, sum(up_ranks)].
        output: [L C, C].
        ffn_key: [L 4C, C].
        ffn_value: [L C, 4C].
        groups: which of the six mixed inputs each 64 rows of a layer's `project` read, int32.
        norm1: weight and bias of the layer norms before time mixing [L, 2, C] fp32.
        norm2: of those before the FFN.
        mix: [L, 6, C] fp32.
        ffn_mix: [L, C] fp32.
        vectors: [L, 8, C] fp32, rows as `mrss_kernels.time_mix7.VECTORS`.
        ranks: of the LoRAs of w, a, g, v, multiples of 64, those of layer 1 and above.
        up_ranks: the same as `up` has them, multiples of 8 and not more.
    """

    project: Tensor
    up: Tensor
    output: Tensor
    ffn_key: Tensor
    ffn_value: Tensor
    groups: Tensor
    norm1: Tensor
    norm2: Tensor
    mix: Tensor
    ffn_mix: Tensor
    vectors: Tensor
    ranks: tuple[int, int, int, int]
    up_ranks: tuple[int, int, int, int]


class PersistentLayers7:
    """The layers of a decode step of a number of rows that this is for.

    Steps must follow one another on one stream: they share their buffers. Between two steps the
    even layers' numbers all read as not written; a step's first layer sees to the odd ones'.
    """

    def __init__(self, layers: StackedLayers7, rows: Collection[int] = ROWS) -> None:
        """Allocate the buffers of steps of so many rows; weights are kept, not copied.

        Raises:
            ValueError: weights whose shapes, dtypes or devices do not fit together, or numbers of
                rows that the kernel does not take.
        """
        if not set(rows) <= set(ROWS):
            raise ValueError(f"rows must be among {list(ROWS)}, got {list(rows)}")
        num_layers, _, channels = layers.norm1.shape
        _check_layers(layers, num_layers, channels)
        device = layers.project.device
        self._layers = layers
        self._rows = sorted(rows)
        self._num_programs = torch.cuda.get_device_properties(device).multi_processor_count
        self._cuts = {rows: self._find_cuts(rows) for rows in self._rows}
        card = torch.cuda.get_device_name(device)
        sizes = (channels, sum(layers.up_ranks))
        self._ahead = {
            rows: blocks_ahead(card, *sizes, rows, cuts) for rows, cuts in self._cuts.items()
        }
        self._help = {
            rows: layers.groups.new_tensor(cuts.help) for rows, cuts in self._cuts.items()
        }
        matrices = (layers.project, layers.up, layers.output, layers.ffn_key, layers.ffn_value)
        self._descriptors = [_descriptor(each, 256) for each in matrices]
        self._buffers = {rows: self._blank_buffers(rows) for rows in self._rows}

    def _find_cuts(self, rows: int) -> Cuts:
        layers = self._layers
        shared = shared_bytes(layers.groups.device)
        sums = (sum(layers.ranks), sum(layers.up_ranks))
        return find_cuts(rows, layers.norm1.shape[-1], *sums, self._num_programs, shared)

    def _blank_buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        layers, cuts = self._layers, self._cuts[rows]
        channels = layers.norm1.shape[-1]
        parts = (cuts.output_parts, cuts.value_parts)
        floats, halves = buffer_sizes(rows, channels, sum(layers.ranks), parts)
        make = layers.groups.new_full
        in_fp32 = make((2, floats), -1).view(torch.float32)
        return in_fp32, make((2, halves), -1, dtype=torch.int16).view(layers.project.dtype)

    def advance(
        self,
        x: Tensor,
        mixed: Tensor,
        shift_att: Tensor,
        shift_ffn: Tensor,
        pool: Tensor,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run all layers behind the first norm.

        Args:
            x: residual stream [B, C] fp32, of a number of rows that this is for.
            mixed: layer 0's six mixed inputs [6, B, C], in the dtype of the weights. Neither may
                hold a number all of whose bits are 1, which no arithmetic makes: it would trap.
                Both start at a multiple of 16 bytes.
            shift_att: normalised last tokens by layer and slot [L, S', C] fp32, *modified* but for
                layer 0's, which whoever made `mixed` has written.
            shift_ffn: likewise, *modified*.
            pool: states [L, S, H, 64, 64] fp32 or fp16, *modified*.
            slots: int64 [B], no slot twice; -1 is a padding row.

        Returns:
            The residual stream [B, C] before the last FFN's product, and the parts [P, B, C] of
            that product. Both are the buffers' own and hold until the next step.

        Raises:
            ValueError: a shape, dtype, stride, device or start that the kernel cannot take.
        """
        from mrss_kernels.persistent7_kernel import NUM_COMPUTING_WARPS, persistent7_kernel

        layers = self._layers
        rows, channels = x.shape
        self._check(x, mixed, shift_att, shift_ffn, pool, slots)
        if not rows:
            return x, x.new_empty((1, 0, channels))
        floats, halves = self._buffers[rows]
        cuts = self._cuts[rows]
        rank_w, rank_a, rank_g, rank_v = layers.up_ranks
        persistent7_kernel[(self._num_programs,)](
            *self._descriptors,
            _descriptor(pool.view(-1, HEAD_SIZE), HEAD_SIZE),
            layers.groups,
            self._help[rows],
            layers.norm1,
            layers.norm2,
            layers.mix,
            layers.ffn_mix,
            layers.vectors,
            pool,
            shift_att,
            shift_ffn,
            slots,
            x,
            mixed,
            torch.empty_like(x),
            floats,
            halves,
            pool.shape[0],
            int(keeps_states(channels, rows)),
            self._num_programs,
            pool.shape[1],
            pool.stride(0),
            shift_att.stride(0),
            *self._ahead[rows],
            B=rows,
            C=channels,
            F=FFN_FACTOR * channels,
            G=cuts.group,
            R=3 * channels + sum(layers.ranks),
            RW=rank_w,
            RA=rank_a,
            RG=rank_g,
            RV=rank_v,
            LOW_A=layers.ranks[0],
            LOW_G=sum(layers.ranks[:2]),
            LOW_V=sum(layers.ranks[:3]),
            HELPED=cuts.helped,
            HELP_LEN=max(cuts.help) * 256,
            OUTPUT_PARTS=cuts.output_parts,
            VALUE_PARTS=cuts.value_parts,
            STAGES=cuts.num_stages,
            INPUT_BLOCKS=cuts.input_blocks,
            CHUNK=cuts.chunk,
            SLICE=cuts.slice_len,
            num_warps=NUM_COMPUTING_WARPS,
            launch_cooperative_grid=True,
            **dependent_launch(x.device),
        )
        # The last layer is an odd one.
        residual_at, parts_at = self._offsets(rows)
        last, parts = floats[1], cuts.value_parts
        residual = last[residual_at : residual_at + rows * channels].view(rows, channels)
        end = parts_at + parts * rows * channels
        return residual, last[parts_at:end].view(parts, rows, channels)

    def _offsets(self, rows: int) -> tuple[int, int]:
        """Return where the residual stream before the FFN and the FFN's parts begin."""
        channels = self._layers.norm1.shape[-1]
        cuts = self._cuts[rows]
        projected = 2 * (3 * channels + sum(self._layers.ranks))
        parts_at = rows * (projected + cuts.output_parts * channels)
        return parts_at + rows * (cuts.value_parts + 1) * channels, parts_at

    def _check(
        self,
        x: Tensor,
        mixed: Tensor,
        shift_att: Tensor,
        shift_ffn: Tensor,
        pool: Tensor,
        slots: Tensor,
    ) -> None:
        num_layers, _, channels = self._layers.norm1.shape
        rows = x.shape[0]
        if rows and rows not in self._rows:
            raise ValueError(f"x must have {', '.join(map(str, self._rows))} rows, got {rows}")
        shift_shape = (num_layers, *shift_att.shape[1:2], channels)
        expect_shape("x", x, (rows, channels))
        expect_shape("mixed", mixed, (6, rows, channels))
        expect_shape("shift_att", shift_att, shift_shape)
        expect_shape("shift_ffn", shift_ffn, shift_shape)
        expect_shape("pool", pool, (num_layers, *pool.shape[1:2], channels // 64, 64, 64))
        for name, tensor in (("x", x), ("shift_att", shift_att), ("shift_ffn", shift_ffn)):
            expect_dtype(name, tensor, (torch.float32,))
        expect_dtype("mixed", mixed, (self._layers.project.dtype,))
        expect_dtype("pool", pool, (torch.float32, torch.float16))
        expect_rows_of_slots(slots, rows, x.device)
        named = [("x", x), ("mixed", mixed), ("shift_att", shift_att), ("shift_ffn", shift_ffn)]
        for name, tensor in [*named, ("pool", pool)]:
            expect_contiguous(name, tensor)
            expect_device(name, tensor, self._layers.project.device)
        # Words of 16 bytes are read.
        for name, tensor in (("x", x), ("mixed", mixed)):
            if past := tensor.data_ptr() % 16:
                raise ValueError(
                    f"{name} must start at a multiple of 16 bytes, got {past} bytes past one"
                )


def _descriptor(matrix: Tensor, num_columns: int) -> Any:
    """Return how the TMA finds blocks of 64 rows and so many columns of a matrix."""
    # Here and not above: Triton on a machine without CUDA may lack Gluon.
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(128, 8 * matrix.element_size())
    shape, strides = list(matrix.shape), list(matrix.stride())
    return TensorDescriptor(matrix, shape, strides, [64, num_columns], layout)


def _check_layers(layers: StackedLayers7, num_layers: int, channels: int) -> None:
    obstacle = obstacle_to_one_launch(
        layers.project.device, num_layers, channels, HEAD_SIZE, layers.ranks
    )
    if obstacle is not None:
        raise ValueError(f"layers must be ones that the kernel takes: {obstacle}")
    _check_ranks(layers)
    total, inner = sum(layers.ranks), FFN_FACTOR * channels
    projected = 3 * channels + total
    shapes = {
        "project": (num_layers * projected, channels),
        "up": (num_layers * channels, sum(layers.up_ranks)),
        "output": (num_layers * channels, channels),
        "ffn_key": (num_layers * inner, channels),
        "ffn_value": (num_layers * channels, inner),
        "groups": (projected // 64,),
        "norm1": (num_layers, 2, channels),
        "norm2": (num_layers, 2, channels),
        "mix": (num_layers, 6, channels),
        "ffn_mix": (num_layers, channels),
        "vectors": (num_layers, 8, channels),
    }
    for field in fields(layers):
        if field.name in ("ranks", "up_ranks"):
            continue
        tensor = getattr(layers, field.name)
        expect_shape(field.name, tensor, shapes[field.name])
        expect_contiguous(field.name, tensor)
        expect_device(field.name, tensor, layers.project.device)
        if field.name == "groups":
            expect_dtype(field.name, tensor, (torch.int32,))
        elif len(shapes[field.name]) == 2 and field.name != "ffn_mix":
            expect_dtype(field.name, tensor, (layers.project.dtype,))
        else:
            expect_dtype(field.name, tensor, (torch.float32,))
    expect_dtype("project", layers.project, (torch.float16, torch.bfloat16))


def _check_ranks(layers: StackedLayers7) -> None:
    if any(rank % 64 for rank in layers.ranks):
        raise ValueError(f"ranks must be multiples of 64, got {list(layers.ranks)}")
    pairs = zip(layers.up_ranks, layers.ranks, strict=True)
    if not all(0 < up <= rank and up % 8 == 0 for up, rank in pairs):
        raise ValueError(
            f"up_ranks must be multiples of 8 of at least 8 and at most {list(layers.ranks)}, "
            f"got {list(layers.up_ranks)}"
        )
