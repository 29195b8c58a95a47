"""Compilations of the kernels for tuning: name, kernel, types of arguments, constants, options."""

from __future__ import annotations

from typing import Any

from mrss_kernels import train_ffn, train_mix7, train_time7

Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]

HALF, FLOAT = "*bf16", "*fp32"
NUM_HEADS, HEAD_SIZE = 32, 64
CHANNELS = NUM_HEADS * HEAD_SIZE


def cases() -> list[Case]:
    """Return what bf16 weights of the 1.5B shape launch."""
    return [*_mix_cases(), *_gate_cases(), *_output_cases(), *_ffn_cases()]


def _case(kernel: Any, label: str, types: dict[str, str], constants: dict[str, Any]) -> Case:
    num_warps = 8 if "BC" in constants else 4
    return f"{kernel.__name__} {label}", kernel, types, constants, {"num_warps": num_warps}


def _mix_cases() -> list[Case]:
    found = []
    common = dict.fromkeys(("p_weight", "p_bias", "p_mix"), HALF) | {"p_first": "*i32", "T": "i32"}
    common |= {"p_x": FLOAT, "eps": "fp32"}
    for mixes in (1, 6):
        constants = {"C": CHANNELS, "BC": CHANNELS, "BT": train_mix7.BLOCK_T, "MIXES": mixes}
        types = common | {"p_delta": HALF, "p_shift": FLOAT, "p_sum": FLOAT, "p_out": HALF}
        found.append(_case(train_mix7.train_norm_mix_kernel, f"{mixes}", types, constants))
        grads = {f"p_{i}": HALF for i in range(mixes)}
        absent = {f"p_{i}": None for i in range(mixes, train_mix7.MAX_MIXES)}
        types = common | grads | {"p_above": FLOAT, "p_dx": FLOAT, "p_ddelta": HALF}
        del types["p_bias"]
        kernel = train_mix7.train_norm_mix_grad_kernel
        found.append(_case(kernel, f"{mixes}", types, constants | absent))
    return found


def _gate_cases() -> list[Case]:
    rows = dict.fromkeys(("p_w_low", "p_a_low", "p_v_low", "p_k", "p_v", "p_first_v"), HALF)
    vectors = dict.fromkeys(("p_w0", "p_a0", "p_v0", "p_k_k", "p_k_a"), HALF)
    outs = dict.fromkeys(("p_key", "p_value", "p_removal", "p_added"), HALF) | {"p_w": FLOAT}
    grads = dict.fromkeys(("p_gkey", "p_gvalue", "p_gremoval", "p_gadded"), HALF) | {"p_gw": FLOAT}
    grads |= {f"p_d{name.removeprefix('p_')}": HALF for name in rows}
    constants = _heads() | train_time7.CONSTANTS
    types = rows | vectors | {"T": "i32", "H": "i32"}
    return [
        _case(train_time7.train_gates7_kernel, "bf16", types | outs, constants),
        _case(train_time7.train_gates7_grad_kernel, "bf16", types | grads, constants),
    ]


def _output_cases() -> list[Case]:
    names = ("y", "r", "k", "v", "g")
    types = {f"p_{name}": HALF for name in (*names, "weight", "bias", "r_k")}
    types |= {"T": "i32", "H": "i32", "eps": "fp32"}
    grads = {f"p_d{name}": HALF for name in names} | {"p_grad": HALF}
    return [
        _case(train_time7.train_output7_kernel, "bf16", types | {"p_out": HALF}, _heads()),
        _case(train_time7.train_output7_grad_kernel, "bf16", types | grads, _heads()),
    ]


def _ffn_cases() -> list[Case]:
    constants = {"BLOCK": train_ffn.BLOCK}
    types = {"p_x": HALF, "total": "i32"}
    grads = {"p_grad": HALF, "p_dx": HALF}
    return [
        _case(train_ffn.train_square_relu_kernel, "bf16", types | {"p_out": HALF}, constants),
        _case(train_ffn.train_square_relu_grad_kernel, "bf16", types | grads, constants),
    ]


def _heads() -> dict[str, Any]:
    return {"N": HEAD_SIZE, "BH": train_time7.TILE // HEAD_SIZE, "BT": train_time7.BLOCK_T}
