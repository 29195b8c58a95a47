"""A state from a prompt: what a row is after a long text, kept as a state file is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mrss_provider.errors import InvalidRequestError
from mrss_provider.model.state_metadata import StateMetadata
from mrss_provider.model.tuned_state import TunedState

if TYPE_CHECKING:
    from mrss_provider.model.model import Model

# Whole blocks of the recurrence's kernels; bounds the memory of a pass.
_PIECE_LEN = 512
_BEGIN = 0


def state_from_prompt(
    model: Model,
    token_ids: Sequence[int],
    *,
    name: str,
    start: TunedState | None = None,
    metadata: StateMetadata | None = None,
) -> TunedState:
    """Read a text and return the state after it: a prompt that begins with it need not repeat it.

    Args:
        model: that reads.
        token_ids: of the text, at least one.
        name: of the state.
        start: what it begins from; None is the base.
        metadata: what the file is to say beside where it comes from.

    Returns:
        A state with wkv and shifts, fp32 on the CPU, whose metadata names the model, the number of
        tokens and their sha256, and the state that it began from.

    Raises:
        InvalidRequestError: no tokens, or ones that the model does not know, or a state that is not
            finite.
    """
    vocab_size = model.config.vocab_size
    if not token_ids or not all(0 <= token_id < vocab_size for token_id in token_ids):
        raise InvalidRequestError(
            f"a state is made of at least one token id in [0, {vocab_size}), got "
            f"{len(token_ids)} ids"
        )
    pool = model.new_pool(1)
    slots = torch.zeros(1, dtype=torch.int64, device=model.device)
    ids = torch.tensor(token_ids, dtype=torch.int64, device=model.device)
    pool.write(0, start)
    if start is not None and start.metadata.bos and token_ids[0] != _BEGIN:
        model.decode(torch.full_like(slots, _BEGIN), slots, pool)
    for piece in torch.split(ids, _PIECE_LEN):
        model.prefill(piece, [0, len(piece)], slots, pool)
    row = pool.snapshot(0).to_host()
    if not row.is_finite:
        raise InvalidRequestError(f"the state after {len(token_ids)} tokens is not finite")
    made = {
        "from_prompt": {
            "num_tokens": len(token_ids),
            "tokens_sha256": _digest(token_ids),
            "start": None if start is None else {"name": start.name, "sha256": start.sha256},
        }
    }
    told = metadata or StateMetadata()
    # A leading token 0 has been read, if the state that it began from wanted one.
    told = replace(told, bos=False, orientation="vk", training={**told.training, **made})
    return TunedState(
        name,
        row.wkv.float().contiguous(),
        row.time_offset,
        row.shift_att.contiguous(),
        row.shift_ffn.contiguous(),
        told.with_base(model.config),
    )


def _digest(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(token_ids, dtype="<i4").tobytes()).hexdigest()
