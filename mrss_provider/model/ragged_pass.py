"""What the passes over packed tokens share, whatever the version: weights, and a step's reading."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from mrss_kernels import ragged_index
from mrss_kernels import rows_linear as linear_ops
from torch import Tensor

from mrss_provider.model import products
from mrss_provider.model.state import StatePool

TAIL_LEN = 4
"""From so many tokens a sequence on, the last layer's output is computed for last tokens only."""

Norm = tuple[Tensor, Tensor]


class _HasFfn(Protocol):
    @property
    def ffn_value(self) -> products.Weight: ...


Layer = TypeVar("Layer", bound=_HasFfn)


@dataclass(frozen=True)
class Reading:
    """How a pass reads its tokens.

    Attributes:
        cu_seqlens: as given.
        slots: as given.
        index: where each token stands, of `ragged_index`.
        shift_att: of each sequence, what stands before its first token [L, n, C].
        shift_ffn: the same for the FFN.
        is_grouped: there are few enough tokens for products of our own.
        cuts_tail: the last layer ends with last tokens only.
    """

    cu_seqlens: Tensor
    slots: Tensor
    index: Tensor
    shift_att: Tensor
    shift_ffn: Tensor
    is_grouped: bool
    cuts_tail: bool


class RaggedPass(ABC, Generic[Layer]):
    """One pass of a model with fp16 or bf16 weights over T packed tokens of n sequences.

    Attributes:
        grouped_tokens: up to so many tokens the products before the recurrence are one of our own;
            above, they are the library's and a small one.
        ffn_chunk_len: tokens whose FFN is computed at a time.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        embedding: Tensor,
        ln0: Norm | None,
        ln_out: Norm,
        *,
        grouped_tokens: int = linear_ops.MAX_ROWS,
        ffn_chunk_len: int | None = None,
    ) -> None:
        """Take a model's packed weights; nothing is copied.

        Args:
            layers: of the version's `pack_layer`.
            embedding: [V, C], in the weights' dtype.
            ln0: norm of looked-up rows, or None.
            ln_out: the last norm.
            grouped_tokens: see the attribute.
            ffn_chunk_len: see the attribute; None bounds the FFN's memory.
        """
        self._layers = layers
        self._embedding = embedding
        self._ln0 = ln0
        self._ln_out = ln_out
        self.grouped_tokens = grouped_tokens
        value = layers[0].ffn_value
        self.ffn_chunk_len = ffn_chunk_len or products.ffn_chunk_len(value.shape[1], value)

    def forward(
        self,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        slots: Tensor,
        pool: StatePool,
        *,
        all_positions: bool = False,
    ) -> Tensor:
        """Read one or more tokens of each sequence into its state. Only launches kernels.

        Args:
            token_ids: int64 [T], packed one sequence after the other, contiguous.
            cu_seqlens: int32 or int64 [n + 1] on the device, from 0 to T, never falling.
            slots: int64 [n], no slot twice; -1 is a padding sequence. An empty one is one too.
            pool: *modified* at `slots`.
            all_positions: return every token's hidden state, not only each sequence's last.

        Returns:
            hidden [n, C], or [T, C] with `all_positions`, fp32, after the last norm; undefined for
            padding and empty sequences.

        Raises:
            ValueError: a shape, dtype, stride or device that a kernel cannot take.
        """
        num_tokens, num_seqs = token_ids.shape[0], slots.shape[0]
        is_grouped = num_tokens <= self.grouped_tokens
        reading = Reading(
            cu_seqlens,
            slots,
            ragged_index.ragged_index(cu_seqlens, slots, num_tokens),
            # Copies, because a sequence's last token overwrites what its first one reads. Slot -1
            # is the row that stands for padding.
            pool.shift_att[:, slots],
            pool.shift_ffn[:, slots],
            is_grouped,
            not (all_positions or is_grouped) and num_tokens >= TAIL_LEN * num_seqs,
        )
        return self._forward(token_ids, reading, pool, all_positions=all_positions)

    @abstractmethod
    def _forward(
        self, token_ids: Tensor, reading: Reading, pool: StatePool, *, all_positions: bool
    ) -> Tensor:
        """Return what `forward` does."""
