"""CopyStream: snapshots between a GPU's memory and the host's, while the GPU computes.

What leaves the GPU does so on a stream of its own: no step waits for it, and neither does the
host, whose memory for it was taken before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mrss_provider.model.memory import release_pinned_memory
from mrss_provider.model.state import StateSnapshot

log = logging.getLogger(__name__)

# What is taken before anybody waits: some half a second a GiB, less of what is as quickly taken
# later. Some rows come before those in whose place they do are known to be read.
_PREPARED_BYTES, _PREPARED_ROWS, _NUM_COMING = 4 << 30, 512, 4


class Arrival(Protocol):
    """The moment when a copy is complete."""

    def synchronize(self) -> object:
        """Wait for it, on the host."""
        ...


class Copies(Protocol):
    """Ways of snapshots between two memories: `CopyStream`, or a stand-in."""

    def to_host(self, snapshot: StateSnapshot) -> tuple[StateSnapshot, Arrival]:
        """Begin to copy to the host; `snapshot` may be dropped at once.

        Raises:
            RuntimeError: the host has no memory for it.
        """
        ...

    def to_device(self, snapshot: StateSnapshot, arrived: Arrival | None) -> StateSnapshot:
        """Copy from the host, once that has arrived, before the device does anything further.

        Raises:
            torch.OutOfMemoryError: the device has no memory for it.
        """
        ...

    def pinned(self, snapshot: StateSnapshot) -> StateSnapshot:
        """Return a copy, in memory that copies to the device begin from, of one on the host.

        Raises:
            RuntimeError: the host has no memory for it.
        """
        ...

    def host_bytes(self, snapshot: StateSnapshot) -> int:
        """Return what a copy of `snapshot` takes of the host's memory."""
        ...

    def prepare(self, snapshot: StateSnapshot, num_rows: int) -> None:
        """Take memory of the host for so many copies of `snapshot`.

        Raises:
            RuntimeError: the host has not as much.
        """
        ...

    def close(self) -> None:
        """Give back the host's memory that no snapshot is in."""
        ...


class CopyStream:
    """Copies between a CUDA device and pinned memory.

    torch keeps pinned memory that is free for the next copy of that size, once what had to read or
    write it has. New memory takes milliseconds a row: `prepare` takes it before anybody waits.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_host(self, snapshot: StateSnapshot) -> tuple[StateSnapshot, Arrival]:
        """Copy when all is done that the device has been told to do; steps after it do not wait."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy = _each(snapshot, self._leave)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return copy, arrived

    def to_device(self, snapshot: StateSnapshot, arrived: Arrival | None) -> StateSnapshot:
        """Copy before what the device is told next; nobody waits on the host."""
        if isinstance(arrived, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(arrived)
        return _each(snapshot, lambda tensor: tensor.to(self._device, non_blocking=True))

    def pinned(self, snapshot: StateSnapshot) -> StateSnapshot:
        """Copy to pinned memory."""
        return pinned(snapshot)

    def host_bytes(self, snapshot: StateSnapshot) -> int:
        """Count blocks of pinned memory: torch rounds them up to powers of two."""
        tensors = (snapshot.wkv, snapshot.shift_att, snapshot.shift_ffn, snapshot.time_offset)
        return sum(_block_bytes(tensor) for tensor in tensors if tensor is not None)

    def prepare(self, snapshot: StateSnapshot, num_rows: int) -> None:
        """Take pinned memory and leave it to torch, for the copies that come."""
        taken = [_each(snapshot, _pinned_like) for _ in range(num_rows)]
        del taken

    def close(self) -> None:
        """Give pinned memory back: torch would keep it for copies of these sizes."""
        self._stream.synchronize()
        release_pinned_memory()

    def _leave(self, tensor: Tensor) -> Tensor:
        out = _pinned_like(tensor).copy_(tensor, non_blocking=True)
        # Whoever gets the memory of `tensor` next waits for the copy, too.
        tensor.record_stream(self._stream)
        return out


def prepare_memory(copies: Copies, snapshot: StateSnapshot, max_bytes: int) -> None:
    """Take the host's memory for what will leave a device: so many bytes of copies of `snapshot`.

    It is none where one copy is larger, and less than all where that would take long.
    """
    taken = min(max_bytes, _PREPARED_BYTES)
    num_rows = min(taken // copies.host_bytes(snapshot), _PREPARED_ROWS)
    try:
        copies.prepare(snapshot, num_rows + _NUM_COMING if num_rows else 0)
    except RuntimeError as exc:
        log.warning("the state cache could not take %d bytes of pinned RAM: %s", taken, exc)


def pinned(snapshot: StateSnapshot) -> StateSnapshot:
    """Return a copy in pinned memory of a snapshot on the host, from which nobody waits."""
    return _each(snapshot, lambda tensor: tensor.pin_memory())


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def _block_bytes(tensor: Tensor) -> int:
    return 1 << max(0, tensor.numel() * tensor.element_size() - 1).bit_length()


def _each(snapshot: StateSnapshot, change: Callable[[Tensor], Tensor]) -> StateSnapshot:
    offset = snapshot.time_offset
    return StateSnapshot(
        change(snapshot.wkv),
        change(snapshot.shift_att),
        change(snapshot.shift_ffn),
        None if offset is None else change(offset),
    )
