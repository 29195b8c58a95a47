"""What the tail of a step reads and writes: tensors at fixed addresses. Knows no Triton.

The host fills `TailInputs` between steps; `tail.launch_tail` and `reference_tail.tail` read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mrss_kernels._launch import next_power_of_2

RULES = ("linear", "geometric", "product", "power", "delta", "contrast", "route")
"""Merge rules; a request has the index of its own."""

GATES = ("fixed", "novelty", "confidence", "learned", "posterior-novelty")
"""Gates, by what they do with the rows of a token; a request has the index of its own."""

ORDERS = ("openai", "rwkv")
"""Sampling orders; a request has the index of its own."""

INT_FIELDS = (
    "first_row",
    "num_rows",
    "next_row",
    "rule",
    "gate",
    "base_named",
    "keep_merged",
    "top_k",
    "order",
    "choice",
    "position",
    "count_row",
    "bias_row",
    "gate_row",
    "allowed_row",
)
"""Rows of `p_ints [len, G]`."""

FLOAT_FIELDS = (
    "cut",
    "temperature",
    "top_p",
    "min_p",
    "repetition",
    "presence",
    "frequency",
    "decay",
    "exponent",
    "tau",
    "sharpness",
)
"""Rows of `p_floats [len, G]`."""

NUM_LEVELS = 8
"""Heights above which each block says how much mass it has; the last one is everything."""

NUM_BINS = 2048
"""Bins of the scores of a request that has too many candidates to compare all with all."""

NUM_FEATURES, NUM_UNITS = 5, 16
"""What a learned gate sees of each row, and the units of its network."""

GATE_SIZE = 2 * NUM_FEATURES * NUM_UNITS + 2 * NUM_UNITS
"""Numbers of a learned gate: weights of the units, by unit; their biases; how they add up."""

NUM_PARTS = 4
"""What each block says of a row to a gate: entropy, two divergences, the second largest logit."""

MAX_VOCAB_SIZE = 1 << 18
"""Integer masses of more tokens could overflow."""

MAX_BLOCKS = 128
"""Blocks that a vocabulary is cut into: their parts are added up by one program."""

MIN_BLOCK = 1024

MAX_ENDS = 8
"""Tokens of a request that may mean the end of its text, beside token 0."""

SEEN, SAMPLED = 1, 2
"""Bits of `marks`: the token occurred in prompt or answer, or in the answer."""


@dataclass(frozen=True)
class TailInputs:
    """What G requests want, by request unless said otherwise. The host writes, the kernels read.

    Must be written by copies or ordinary kernels, not by kernels with dependent launch. Rows of
    `ints` and `floats` are named by `INT_FIELDS` and `FLOAT_FIELDS`, and `column` returns one:

    - first_row, num_rows: the request's rows of the logits, neighbours, its base first if it has
      one; num_rows 0 is a padding request, all else of which is ignored. Requests may share rows
      if their bans, rules, gates and named weights are the same.
    - next_row: first of as many rows of `TailOutputs.token_ids` that get the token; -1 none.
    - rule, gate, order: index in `RULES`, `GATES`, `ORDERS`.
    - base_named: 1 if row 0 is a base that the name contains. cut: in [0, 1), for `delta` and
      `contrast`. exponent: of `power`.
    - tau: above 0, of all gates but `fixed` and `learned`. sharpness: at least 0, the power of the
      relative divergence in `novelty`, where weights are strengths; 1 for `posterior-novelty`.
      gate_row: row of `gates` of a `learned` gate.
    - keep_merged: 1 if `TailOutputs.merged` is wanted. It is also written, wanted or not, where
      there is more than one row, a penalty or a bias; otherwise it is the row of the logits.
    - temperature: below 1e-30 greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    - choice, position: counters of the random number. position is *incremented* with each token.
    - count_row: row of `counts` and `marks`, its own; -1 is no penalties. repetition (1 off),
      presence, frequency (0 off), decay (1 off).
    - bias_row: row of `bias`; -1 is none.
    - allowed_row: row of `allowed`; -1 is none. Of requests that share rows one at most has one,
      which holds for all.

    Attributes:
        ints: int32 [len(INT_FIELDS), G].
        floats: fp32 [len(FLOAT_FIELDS), G].
        seeds: int64 [G].
        named: weights that the names say, by row of the logits, fp32 [B]; 0 for a base that is not
            named. They sum to 1, or are strengths for `product`, `delta` and `contrast`; only the
            last one's may be negative. At least one of a request is not 0.
        counts: occurrences in the answer, decayed, fp32 [P, V], *modified*.
        marks: bits `SEEN` and `SAMPLED`, uint8 [P, V], *modified*.
        bias: fp32 [P2, V]; -inf bans a token before gate and merge, 0 is nothing, other values are
            added after the penalties.
        banned: uint8 [V], 1 for ids that no request may get.
        gates: learned gates, fp32 [P3, GATE_SIZE].
        allowed: what grammars leave, int32 [P4, ceil(V / 32) + MAX_ENDS]: bit i of word w is 1 if
            token 32 w + i may come next, else it is as good as banned. Behind the words ids (-1
            none) whose probability becomes token 0's, and theirs 0; their bits are 1 all the same,
            and nothing bans them.
    """

    ints: Tensor
    floats: Tensor
    seeds: Tensor
    named: Tensor
    counts: Tensor
    marks: Tensor
    bias: Tensor
    banned: Tensor
    gates: Tensor
    allowed: Tensor

    @classmethod
    def allocate(
        cls,
        num_groups: int,
        num_rows: int,
        vocab_size: int,
        *,
        num_count_rows: int = 0,
        num_bias_rows: int = 0,
        num_gate_rows: int = 0,
        num_allowed_rows: int = 0,
        device: torch.device | str = "cuda",
    ) -> TailInputs:
        """Return inputs of padding requests without penalties, bias, bans, masks or truncation."""
        ints = torch.zeros(len(INT_FIELDS), num_groups, dtype=torch.int32, device=device)
        floats = torch.zeros(len(FLOAT_FIELDS), num_groups, device=device)
        for name in ("next_row", "count_row", "bias_row", "allowed_row"):
            ints[INT_FIELDS.index(name)] = -1
        for name in ("temperature", "top_p", "repetition", "decay", "exponent", "tau", "sharpness"):
            floats[FLOAT_FIELDS.index(name)] = 1.0
        marks = torch.zeros(num_count_rows, vocab_size, dtype=torch.uint8, device=device)
        return cls(
            ints=ints,
            floats=floats,
            seeds=torch.zeros(num_groups, dtype=torch.int64, device=device),
            named=torch.zeros(num_rows, device=device),
            counts=torch.zeros(num_count_rows, vocab_size, device=device),
            marks=marks,
            bias=torch.zeros(num_bias_rows, vocab_size, device=device),
            banned=torch.zeros(vocab_size, dtype=torch.uint8, device=device),
            gates=torch.zeros(num_gate_rows, GATE_SIZE, device=device),
            allowed=no_masks(num_allowed_rows, vocab_size, device=device),
        )

    @property
    def num_groups(self) -> int:
        """How many requests there is room for."""
        return self.ints.shape[1]

    def column(self, name: str) -> Tensor:
        """Return the view [G] of one of `INT_FIELDS` or `FLOAT_FIELDS`."""
        if name in INT_FIELDS:
            return self.ints[INT_FIELDS.index(name)]
        return self.floats[FLOAT_FIELDS.index(name)]


@dataclass(frozen=True)
class TailOutputs:
    """What the tail leaves, all *written*, and the memory that its kernels hand each other.

    Attributes:
        token_ids: int64 [B or more], what the next step reads; only rows that `next_row` names are
            written. A request that fails gets token 0 there.
        ids: int64 [G], the token, or -1 where the merged numbers are not finite: then counts and
            position stay as they are (counts decay). -1 for padding requests.
        log_probs: fp32 [G], natural log-probability of the token under the merge, before penalties
            and temperature.
        merged: fp32 [G, V], merged logits before penalties; see `TailInputs.keep_merged`.
    """

    token_ids: Tensor
    ids: Tensor
    log_probs: Tensor
    merged: Tensor
    scratch: TailScratch = field(repr=False)

    @classmethod
    def allocate(
        cls,
        token_ids: Tensor,
        num_groups: int,
        num_rows: int,
        vocab_size: int,
        *,
        max_rows: int = 32,
        block: int | None = None,
    ) -> TailOutputs:
        """Return outputs on the device of `token_ids`, for any step up to these sizes.

        Args:
            token_ids: int64 [B or more], kept and written.
            num_groups: requests.
            num_rows: rows of the logits.
            vocab_size: V, at most 2^18.
            max_rows: rows that one request may have.
            block: tokens of a block, a power of two; None takes `choose_block`. Results are the
                same bits for the same block only.
        """
        device = token_ids.device
        block = block or choose_block(vocab_size)
        return cls(
            token_ids=token_ids,
            ids=torch.full((num_groups,), -1, dtype=torch.int64, device=device),
            log_probs=torch.zeros(num_groups, device=device),
            merged=torch.zeros(num_groups, vocab_size, device=device),
            scratch=TailScratch.allocate(
                num_groups,
                num_rows,
                vocab_size,
                max_rows,
                block or choose_block(vocab_size),
                device,
            ),
        )


@dataclass(frozen=True)
class TailScratch:
    """Parts of blocks: [B, NB] or [B, NUM_PARTS, NB] of rows, [G, NB] of requests, their sums.

    `arrived`, `num_undecided` and `bins` are 0 between steps: who reads them puts them back.
    """

    max_rows: int
    block: int
    part_max: Tensor
    part_mass: Tensor
    parts: Tensor
    row_max: Tensor
    row_mass: Tensor
    row_log_mass: Tensor
    row_weight: Tensor
    rule: Tensor
    scores: Tensor
    top: Tensor
    best_id: Tensor
    mass: Tensor
    merged_top: Tensor
    merged_mass: Tensor
    low: Tensor
    cell: Tensor
    level_mass: Tensor
    level_count: Tensor
    least_cell: Tensor
    offset: Tensor
    count: Tensor
    plan: Tensor
    num_candidates: Tensor
    candidates: Tensor
    candidate_ids: Tensor
    bins: Tensor
    bracket: Tensor
    sums: Tensor
    num_undecided: Tensor
    arrived: Tensor

    @classmethod
    def allocate(
        cls,
        num_groups: int,
        num_rows: int,
        vocab_size: int,
        max_rows: int,
        block: int,
        device: torch.device,
    ) -> TailScratch:
        blocks = -(-vocab_size // block)

        def floats(*shape: int) -> Tensor:
            return torch.empty(*shape, device=device)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        def longs(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        return cls(
            max_rows=max_rows,
            block=block,
            part_max=floats(num_rows, blocks),
            part_mass=floats(num_rows, blocks),
            parts=floats(num_rows, NUM_PARTS, blocks),
            row_max=floats(num_rows),
            row_mass=floats(num_rows),
            row_log_mass=floats(num_rows),
            row_weight=floats(num_rows),
            rule=ints(num_groups),
            scores=floats(num_groups, vocab_size),
            top=floats(num_groups, blocks),
            best_id=ints(num_groups, blocks),
            mass=floats(num_groups, blocks),
            merged_top=floats(num_groups, blocks),
            merged_mass=floats(num_groups, blocks),
            low=floats(num_groups, blocks),
            cell=ints(num_groups, blocks),
            level_mass=ints(num_groups, blocks, NUM_LEVELS),
            level_count=ints(num_groups, blocks, NUM_LEVELS),
            least_cell=ints(num_groups, blocks),
            offset=ints(num_groups, blocks),
            count=ints(num_groups, blocks),
            plan=floats(num_groups, 8),
            num_candidates=ints(num_groups),
            candidates=floats(num_groups, vocab_size),
            candidate_ids=ints(num_groups, vocab_size),
            bins=longs(num_groups, NUM_BINS),
            bracket=ints(num_groups, 8),
            sums=longs(3, num_groups, blocks),
            num_undecided=ints(num_groups),
            arrived=ints(num_groups),
        )


def no_masks(num_rows: int, vocab_size: int, **where: Any) -> Tensor:
    """Return rows for `TailInputs.allowed` that allow no token; `where` is for `torch.zeros`."""
    num_words = -(-vocab_size // 32)
    rows = torch.zeros(num_rows, num_words + MAX_ENDS, dtype=torch.int32, **where)
    rows[:, num_words:] = -1
    return rows


def choose_block(vocab_size: int) -> int:
    """Return how many tokens a block has: the least that makes at most `MAX_BLOCKS` of them."""
    return max(MIN_BLOCK, next_power_of_2(-(-vocab_size // MAX_BLOCKS)))
