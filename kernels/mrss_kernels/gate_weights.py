# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""What gates make of named weights, from what a token's rows said of themselves.

On all rows of a request at once, padding rows with weight 0. Heard is a row whose named weight is
not 0. No kernel here: the last program of `gate_rows.gate_kernel` calls these. The formulas are the
engine's (`mrss_provider/engine/gates`, `gating_layer`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrss_kernels.tail_common import (
    CONFIDENCE,
    CONTRAST,
    DELTA,
    GEOMETRIC,
    LINEAR,
    NOVELTY,
    POSTERIOR_NOVELTY,
    POWER,
    PRODUCT,
    ROUTE,
    exp,
)
from mrss_kernels.tail_tensors import NUM_FEATURES, NUM_UNITS

# The engine's constants; the checks of the kernels compare with the engine itself.
MAX_NATS: tl.constexpr = tl.constexpr(8.0)
MIN_DIVERGENCE: tl.constexpr = tl.constexpr(1e-4)

FEATURES: tl.constexpr = tl.constexpr(NUM_FEATURES)
UNITS: tl.constexpr = tl.constexpr(NUM_UNITS)
NO_ROW: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def settle(rule, weights, o_k):
    """Return the rule as which a request is merged, and what that multiplies each row with.

    Args:
        rule: index in `RULES`.
        weights: gated weights [KB], any gate's.
        o_k: which row of the request each is [KB].
    """
    if (rule == DELTA) | (rule == CONTRAST):
        strengths = tl.where(o_k == 0, 0.0, weights)
        weights = tl.where(o_k == 0, 1.0 - tl.sum(strengths, 0), weights)
    elif rule == ROUTE:
        largest = tl.max(weights, 0)
        chosen = tl.min(tl.where(weights == largest, o_k, NO_ROW), 0)
        # Of weights that are no numbers none is the largest, and no row is the answer.
        hot = tl.where(o_k == chosen, 1.0, 0.0)
        weights = tl.where(weights == weights, hot, weights)
    elif (rule == LINEAR) | (rule == POWER):
        # One row alone is its own mean, and this one keeps every bit.
        num = tl.sum((weights > 0).to(tl.int32), 0)
        rule = tl.where(num == 1, GEOMETRIC, rule)
    elif rule == PRODUCT:
        total = tl.sum(weights, 0)
        weights = tl.where((total > 0) & (total < 1), weights / total, weights)
    return rule, weights


@triton.jit
def gated(gate, rule, nats, named, tau, sharpness):
    """Return a gate's weights [KB], not those of `fixed`.

    Args:
        gate: index in `GATES`.
        rule: index in `RULES`.
        nats: of each row [KB]: minus the entropy for `confidence`, what the network says for
            `learned`, the divergence from the base for the others.
        named: weights that the names say [KB].
        tau: of all but `learned`.
        sharpness: of `novelty`.
    """
    is_novelty = (gate == NOVELTY) | (gate == POSTERIOR_NOVELTY)
    if is_novelty:
        nats = at_least_0(nats)
    if gate == CONFIDENCE:
        nats = nats / tau
    if (rule == PRODUCT) | (rule == DELTA) | (rule == CONTRAST):
        speaking = _speaking(gate, nats, named, sharpness)
        weights = tl.where(is_novelty, speaking, _relative(named, nats))
    else:
        if is_novelty:
            nats = at_most(nats, MAX_NATS) / tau
        weights = _normalised(named, nats)
    return weights


@triton.jit
def at_most(x, limit):
    # Not a minimum, which would drop a NaN.
    return tl.where(x > limit, limit, x)


@triton.jit
def at_least_0(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _speaking(gate, divergence, named, sharpness):
    """Return strengths in proportion to a power of the divergences; as named where all agree."""
    heard = tl.where(named != 0, divergence, 0.0)
    # What the posterior turned down must not silence the others by how far it is from the base.
    voice = tl.where(gate == POSTERIOR_NOVELTY, tl.abs(named) * heard, heard)
    share = voice / tl.maximum(tl.max(voice, 0), 1e-30)
    if sharpness != 1.0:
        power = tl.exp2(sharpness * tl.log2(share))
        share = tl.where(share > 0, power, tl.where(sharpness == 0, 1.0, share))
    # A schedule may have silenced all.
    agreed = named / tl.maximum(tl.sum(tl.abs(named), 0), 1e-30)
    return tl.where(tl.max(heard, 0) < MIN_DIVERGENCE, agreed, named * share)


@triton.jit
def _normalised(named, nats):
    """Return `named * e^nats` [KB], rescaled to sum 1."""
    logits = tl.log(named) + nats
    weights = exp(logits - tl.max(logits, 0))
    return weights / tl.sum(weights, 0)


@triton.jit
def _relative(named, nats):
    """Return `named * e^nats` [KB], where e^nats is 1 for the largest of the rows with a weight."""
    is_heard = named != 0
    largest = tl.max(tl.where(is_heard, nats, float("-inf")), 0)
    return tl.where(is_heard, named * exp(nats - largest), 0.0)


@triton.jit
def scores(p_gate, entropy, top, margin, from_base, from_mean, named):
    """Return what a learned gate's network says of each row [KB], in nats.

    Args:
        p_gate: its row of `TailInputs.gates`.
        entropy: of each row [KB], as all that follow.
        top: largest log-probability.
        margin: how far the second one is below it.
        from_base: divergence from row 0, not below 0.
        from_mean: divergence from the mean of the rows that are heard, not below 0.
        named: weights that the names say.
    """
    is_heard = named != 0
    num_heard = tl.sum(is_heard.to(tl.float32), 0)
    o_u = tl.arange(0, UNITS)
    p_bias = p_gate + 2 * FEATURES * UNITS + o_u
    units = tl.zeros_like(named)[:, None] + tl.load(p_bias)[None, :]
    units = _see(units, p_gate, entropy, is_heard, num_heard)
    units = _see(units, p_gate + 1, top, is_heard, num_heard)
    units = _see(units, p_gate + 2, at_most(margin, MAX_NATS), is_heard, num_heard)
    units = _see(units, p_gate + 3, at_most(from_base, MAX_NATS), is_heard, num_heard)
    units = _see(units, p_gate + 4, at_most(from_mean, MAX_NATS), is_heard, num_heard)
    return tl.sum(at_least_0(units) * tl.load(p_bias + UNITS)[None, :], 1)


@triton.jit
def _see(units, p_weight, feature, is_heard, num_heard):
    """Add a feature [KB] of each row, and its mean over the rows, to the units [KB, UNITS]."""
    p_weight += tl.arange(0, UNITS) * (2 * FEATURES)
    mean = tl.sum(tl.where(is_heard, feature, 0.0), 0) / num_heard
    own = feature[:, None] * tl.load(p_weight)[None, :]
    return units + own + mean * tl.load(p_weight + FEATURES)[None, :]
