"""`learned`: a network, trained by `mrss gate train`, that weighs the rows of each token."""

from __future__ import annotations

import hashlib

from torch import Tensor

from mrss_provider.engine.gate_metadata import GateMetadata
from mrss_provider.engine.gates.gate import Gate
from mrss_provider.engine.gating_layer import GatingLayer
from mrss_provider.engine.merges import Rows


class Learned(Gate):
    """One trained gate, as a file holds it; `engine.gating_layer` has the formula.

    Args:
        file: the file's stem, what requests name it.
        layer: what it computes.
        metadata: what the file says of itself.

    Attributes:
        file: as given.
        layer: as given.
        metadata: as given.
        sha256: of the layer's numbers (hex).
    """

    name = "learned"
    needs_base = True

    def __init__(self, file: str, layer: GatingLayer, metadata: GateMetadata) -> None:
        self.file = file
        self.layer = layer
        self.metadata = metadata
        self.sha256 = hashlib.sha256(layer.table.numpy().tobytes()).hexdigest()

    def weights(self, rows: Rows, *, sums_to_one: bool) -> Tensor:
        """Return the named weights times what the network says."""
        return self.layer.weights(rows, sums_to_one=sums_to_one)
