"""GateTable: the numbers of learned gates where the tail's kernels read them, each written once."""

from __future__ import annotations

from collections.abc import Collection

import torch
from mrss_kernels.tail_tensors import GATE_SIZE

from mrss_provider.engine.gates import Learned


class GateTable:
    """A row for each gate that answers use; what nobody uses any more makes room when it is full.

    Attributes:
        rows: fp32 [size, GATE_SIZE], at one address for good.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """Allocate room for `size` gates: as many as there may be answers."""
        self.rows = torch.zeros(size, GATE_SIZE, device=device)
        self._row_of: dict[str, int] = {}

    def row_of(self, gate: Learned, in_use: Collection[str]) -> int:
        """Return the gate's row, which is written if it has none yet.

        Args:
            gate: the gate.
            in_use: `sha256` of the gates that must keep their rows, fewer than there is room for.
        """
        if gate.sha256 not in self._row_of:
            row = len(self._row_of)
            if row == len(self.rows):
                row = self._row_of.pop(next(key for key in self._row_of if key not in in_use))
            self.rows[row].copy_(gate.layer.table)
            self._row_of[gate.sha256] = row
        return self._row_of[gate.sha256]
