"""Recurrent states: the pool that rows live in, by slot, and snapshots that own their memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mrss_provider.model.config import ModelConfig

STATE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""Dtypes of recurrent states by the names that `EngineConfig.state_dtype` uses."""


class RowState(Protocol):
    """What a slot can be set to: a tuned state or a snapshot. None means zeros (no offset)."""

    @property
    def wkv(self) -> Tensor:
        """[L, H, N, N] in the model's orientation."""
        ...

    @property
    def shift_att(self) -> Tensor | None:
        """[L, C]."""
        ...

    @property
    def shift_ffn(self) -> Tensor | None:
        """[L, C]."""
        ...

    @property
    def time_offset(self) -> Tensor | None:
        """[L, C]."""
        ...


@dataclass(frozen=True)
class StateSnapshot:
    """One row's whole state at a moment; a copy that nothing else writes to.

    Attributes:
        wkv: [L, H, N, N] in the pool's dtype; [V, K] for RWKV-7, [K, V] for RWKV-6.
        shift_att: [L, C] fp32, the last token's input of each time mixing.
        shift_ffn: [L, C] fp32, the last token's input of each ffn.
        time_offset: [L, C] fp32, or None.
    """

    wkv: Tensor
    shift_att: Tensor
    shift_ffn: Tensor
    time_offset: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors hold."""
        tensors = (self.wkv, self.shift_att, self.shift_ffn, self.time_offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def is_finite(self) -> bool:
        """Whether every number is; waits for the device."""
        parts = (self.wkv, self.shift_att, self.shift_ffn)
        return all(bool(torch.isfinite(part).all()) for part in parts)

    def to_host(self) -> StateSnapshot:
        """Return the snapshot in the host's memory; waits for the device."""
        offset = self.time_offset
        return StateSnapshot(
            self.wkv.cpu(),
            self.shift_att.cpu(),
            self.shift_ffn.cpu(),
            None if offset is None else offset.cpu(),
        )


class StatePool:
    """The states of S slots, layer by layer, written in place by the forward pass.

    Attributes:
        num_slots: S.
        wkv: [L, S, H, N, N] fp32 or fp16.
        shift_att: [L, S + 1, C] fp32. The last row takes what padding rows (slot -1) write.
        shift_ffn: [L, S + 1, C] fp32, likewise.
        time_offset: [L, S + 1, C] fp32, or None until a state with an offset is written.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        *,
        device: torch.device,
        state_dtype: str = "fp32",
        base: StateSnapshot | None = None,
    ) -> None:
        """Allocate S slots, all holding the base state.

        Args:
            config: of the model whose rows these are.
            num_slots: S.
            device: where.
            state_dtype: of wkv, "fp32" or "fp16".
            base: what a slot starts from; None is zeros.
        """
        layers, heads, size, _ = config.state_shape
        shift_shape = (layers, num_slots + 1, config.hidden_size)
        self.num_slots = num_slots
        self.wkv = torch.zeros(
            (layers, num_slots, heads, size, size), dtype=STATE_DTYPES[state_dtype], device=device
        )
        self.shift_att = torch.zeros(shift_shape, device=device)
        self.shift_ffn = torch.zeros(shift_shape, device=device)
        self.time_offset: Tensor | None = None
        self._base = base
        self._with_offset: set[int] = set()
        if base is not None:
            for slot in range(num_slots):
                self.write(slot, None)

    @property
    def has_offsets(self) -> bool:
        """Whether any slot holds a state with a time offset."""
        return bool(self._with_offset)

    def layer_offsets(self, layer: int) -> Tensor | None:
        """Return a layer's time offsets by slot [S + 1, C], or None while no slot has one."""
        if not self._with_offset or self.time_offset is None:
            return None
        return self.time_offset[layer]

    def write(self, slot: int, state: RowState | None) -> None:
        """Set everything that a slot holds; None sets the base state.

        From pinned memory, which is not to be written to any more, nobody waits for the device.
        """
        state = self._base if state is None else state
        if state is None:
            for tensor in (self.wkv, self.shift_att, self.shift_ffn):
                tensor[:, slot].zero_()
            self._write_offset(slot, None)
            return
        self.wkv[:, slot].copy_(state.wkv, non_blocking=True)
        for shift, value in (
            (self.shift_att, state.shift_att),
            (self.shift_ffn, state.shift_ffn),
        ):
            if value is None:
                shift[:, slot].zero_()
            else:
                shift[:, slot].copy_(value, non_blocking=True)
        self._write_offset(slot, state.time_offset)

    def reinject(self, slot: int, base_slot: int, state: RowState) -> None:
        """Make a slot's wkv what `base_slot` has plus what `state` has beyond the base state.

        Nothing else of the slot changes. Where `base_slot` holds the base state untouched, the
        slot's wkv becomes that of `state`.
        """
        added = state.wkv.float()
        if self._base is not None:
            added = added - self._base.wkv.float()
        added = added.to(self.wkv.device)
        self.wkv[:, slot].copy_(self.wkv[:, base_slot].float() + added)

    def copy(self, src_slot: int, dst_slots: Sequence[int]) -> None:
        """Make `dst_slots` hold what `src_slot` holds."""
        if not dst_slots:
            return
        # From pinned memory: the host does not wait for the steps under way.
        index = torch.tensor(dst_slots, pin_memory=self.wkv.is_cuda)
        index = index.to(self.wkv.device, non_blocking=True)
        for tensor in (self.wkv, self.shift_att, self.shift_ffn):
            tensor[:, index] = tensor[:, src_slot].unsqueeze(1)
        for slot in dst_slots:
            offset = self._offset(src_slot)
            self._write_offset(slot, offset)

    def snapshot(self, slot: int) -> StateSnapshot:
        """Copy out what a slot holds."""
        offset = self._offset(slot)
        return StateSnapshot(
            self.wkv[:, slot].clone(),
            self.shift_att[:, slot].clone(),
            self.shift_ffn[:, slot].clone(),
            None if offset is None else offset.clone(),
        )

    def _offset(self, slot: int) -> Tensor | None:
        if slot not in self._with_offset or self.time_offset is None:
            return None
        return self.time_offset[:, slot]

    def _write_offset(self, slot: int, value: Tensor | None) -> None:
        if value is None:
            if slot in self._with_offset and self.time_offset is not None:
                self.time_offset[:, slot].zero_()
            self._with_offset.discard(slot)
            return
        if self.time_offset is None:
            self.time_offset = torch.zeros_like(self.shift_att)
        self.time_offset[:, slot].copy_(value, non_blocking=True)
        self._with_offset.add(slot)
