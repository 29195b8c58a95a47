"""The tail of a decode step on the device: logits of rows [B, V] to one token a request.

What a request wants lies in tensors at fixed addresses, which the host fills between steps; the
launches depend on their sizes only, so that they can be part of a CUDA graph. The same in plain
torch is `reference_tail.tail`. Derivation and error bounds: kernels/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrss_kernels import allowed_tokens, draw_token, find_candidates, gate_rows, merge_rows
from mrss_kernels._checks import (
    expect_contiguous,
    expect_device,
    expect_dtype,
    expect_shape,
)
from mrss_kernels._launch import dependent_launch, next_power_of_2
from mrss_kernels.tail_tensors import (
    FLOAT_FIELDS,
    GATE_SIZE,
    INT_FIELDS,
    MAX_ENDS,
    MAX_VOCAB_SIZE,
    TailInputs,
    TailOutputs,
)

FEW, PAIRS, WIDTH = 64, 256, 8
"""Up to PAIRS candidates each is compared with every other one, up to FEW in one go, else WIDTH
after WIDTH. Of more, the programs that share a request leave not many more than that undecided."""

TILE = 1024
"""Undecided candidates that a search looks at at once, where there are more than PAIRS."""

CHUNK = 1024
"""Bins that are added up at once."""

FINDERS, DRAWERS = 1024, 512
"""About as many programs as a device runs at a time; of more requests one takes more blocks."""


def launch_tail(
    logits: Tensor,
    inputs: TailInputs,
    outputs: TailOutputs,
    *,
    truncate: bool = True,
    mixed: bool = True,
    gated: bool = True,
    constrained: bool = True,
    num_groups: int | None = None,
) -> None:
    """Pick one token for each request. Launches kernels only: it can be captured.

    A request's numbers do not depend on its neighbours, its place, or the flags: each flag that
    is off saves launches that would do nothing.

    Args:
        logits: [B, V] fp32, *modified*: ids that a request may not get become -inf in its rows.
        inputs: of G requests.
        outputs: *written*.
        truncate: whether any request has top_k, a top_p below 1 or a min_p above 0.
        mixed: whether any request has more than one row.
        gated: whether any request has another gate than `fixed`; not looked at unless `mixed`.
        constrained: whether any request has a row of `TailInputs.allowed`.
        num_groups: only the first so many requests are looked at; None is all of them.

    Raises:
        ValueError: a shape, dtype, stride or device that the kernels cannot take.
    """
    count = inputs.num_groups if num_groups is None else num_groups
    _check(logits, inputs, outputs, count)
    if not count:
        return
    s = outputs.scratch
    stride = inputs.num_groups
    vocab = logits.shape[1]
    blocks = -(-vocab // s.block)
    grid = (blocks, count)
    sizes = {"V": vocab, "NB": blocks, "BLOCK": s.block, "num_warps": max(1, s.block // 128)}
    # Without contraction an expression has the same bits in every variant of a kernel.
    sizes |= {"enable_fp_fusion": False} | dependent_launch(logits.device)
    if constrained:
        launch = {name: value for name, value in sizes.items() if name != "NB"}
        allowed_tokens.allow_tokens_kernel[grid](
            logits, inputs.ints, inputs.allowed, stride, **launch
        )
    padded = {"NBP": next_power_of_2(blocks)}
    most = next_power_of_2(s.max_rows)
    if mixed:
        # Rows of a tile: as many as the registers hold beside what is done with them.
        tile = min(most, 8 if s.block <= 1024 else 4)
        rows = {"KT": tile, "KB": most}
        gate_rows.row_stats_kernel[grid](
            logits,
            inputs.ints,
            inputs.named,
            inputs.bias,
            inputs.banned,
            s.part_max,
            s.part_mass,
            s.arrived,
            s.row_max,
            s.row_mass,
            s.row_log_mass,
            s.row_weight,
            s.rule,
            stride,
            **sizes,
            **padded,
            **rows,
        )
        if gated:
            gate_rows.gate_kernel[grid](
                logits,
                inputs.ints,
                inputs.floats,
                inputs.named,
                inputs.gates,
                s.row_max,
                s.row_mass,
                s.row_log_mass,
                s.part_max,
                s.parts,
                s.arrived,
                s.row_weight,
                s.rule,
                stride,
                KL=max(1, tile // 2),
                **sizes,
                **padded,
                **rows,
            )
    if not mixed:
        # One row alone needs few registers: more of its programs fit with fewer warps each.
        sizes["num_warps"] = max(1, s.block // 256)
    merge_rows.merge_rows_kernel[grid](
        logits,
        inputs.ints,
        inputs.floats,
        inputs.named,
        inputs.bias,
        inputs.banned,
        inputs.counts,
        inputs.marks,
        s.row_max,
        s.row_mass,
        s.row_log_mass,
        s.row_weight,
        s.rule,
        outputs.merged,
        s.scores,
        s.top,
        s.best_id,
        s.mass,
        s.merged_top,
        s.merged_mass,
        s.low,
        s.cell,
        s.level_mass,
        s.level_count,
        s.least_cell,
        s.offset,
        s.count,
        s.plan,
        s.num_candidates,
        s.arrived,
        stride,
        MIXED=mixed,
        TRUNCATE=truncate,
        **sizes,
        **padded,
        KT=min(most, 4),
    )
    if truncate:
        per = _blocks_a_program(blocks, count, FINDERS)
        find_candidates.find_candidates_kernel[(-(-blocks // per), count)](
            logits,
            outputs.merged,
            s.scores,
            inputs.ints,
            inputs.floats,
            s.plan,
            s.least_cell,
            s.offset,
            s.count,
            s.num_candidates,
            s.candidates,
            s.candidate_ids,
            s.bins,
            s.bracket,
            s.arrived,
            stride,
            per,
            PAIRS=PAIRS,
            CHUNK=CHUNK,
            **sizes | {"num_warps": 4},
        )
    per = _blocks_a_program(blocks, count, DRAWERS) if truncate else blocks
    draw_token.draw_token_kernel[(-(-blocks // per), count)](
        logits,
        outputs.merged,
        s.scores,
        inputs.ints,
        inputs.floats,
        inputs.seeds,
        inputs.counts,
        inputs.marks,
        s.top,
        s.best_id,
        s.mass,
        s.plan,
        s.least_cell,
        s.num_candidates,
        s.candidates,
        s.candidate_ids,
        s.bracket,
        s.sums,
        s.num_undecided,
        s.arrived,
        outputs.token_ids,
        outputs.ids,
        outputs.log_probs,
        stride,
        per,
        PAIRS=PAIRS,
        FEW=FEW,
        WIDTH=WIDTH,
        TILE=TILE,
        TRUNCATE=truncate,
        **sizes | {"num_warps": 8},
        **padded,
    )


def _blocks_a_program(blocks: int, num_groups: int, programs: int) -> int:
    per = 1
    while per < blocks and blocks * num_groups > per * programs:
        per *= 2
    return per


def _check(logits: Tensor, inputs: TailInputs, outputs: TailOutputs, num_groups: int) -> None:
    if logits.dim() != 2 or not 0 < logits.shape[1] <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"logits must be [B, V] with V in [1, {MAX_VOCAB_SIZE}], got {list(logits.shape)}"
        )
    num_rows, vocab = logits.shape
    capacity = inputs.num_groups
    if not 0 <= num_groups <= capacity:
        raise ValueError(f"num_groups must be in [0, {capacity}], got {num_groups}")
    scratch = outputs.scratch
    if scratch.part_max.shape[0] < num_rows:
        raise ValueError(
            f"outputs must be allocated for {num_rows} rows or more, "
            f"got {scratch.part_max.shape[0]}"
        )
    pools = (inputs.counts.shape[0], vocab)
    masks = -(-vocab // 32) + MAX_ENDS
    expected = (
        ("logits", logits, (num_rows, vocab), torch.float32),
        ("ints", inputs.ints, (len(INT_FIELDS), capacity), torch.int32),
        ("floats", inputs.floats, (len(FLOAT_FIELDS), capacity), torch.float32),
        ("seeds", inputs.seeds, (capacity,), torch.int64),
        ("named", inputs.named, (max(num_rows, inputs.named.shape[0]),), torch.float32),
        ("counts", inputs.counts, pools, torch.float32),
        ("marks", inputs.marks, pools, torch.uint8),
        ("bias", inputs.bias, (inputs.bias.shape[0], vocab), torch.float32),
        ("banned", inputs.banned, (vocab,), torch.uint8),
        ("gates", inputs.gates, (inputs.gates.shape[0], GATE_SIZE), torch.float32),
        ("allowed", inputs.allowed, (inputs.allowed.shape[0], masks), torch.int32),
        ("token_ids", outputs.token_ids, (outputs.token_ids.shape[0],), torch.int64),
        ("ids", outputs.ids, (max(num_groups, outputs.ids.shape[0]),), torch.int64),
        ("log_probs", outputs.log_probs, outputs.ids.shape, torch.float32),
        ("merged", outputs.merged, (outputs.ids.shape[0], vocab), torch.float32),
        ("scores", scratch.scores, (outputs.ids.shape[0], vocab), torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        expect_shape(name, tensor, shape)
        expect_dtype(name, tensor, (dtype,))
        expect_contiguous(name, tensor)
        expect_device(name, tensor, logits.device)
