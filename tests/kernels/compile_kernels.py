"""Compile every Triton kernel for compute capability 9.0, on a machine without a GPU.

Prints one JSON line a kernel: name, bytes of machine code, shared memory, registers, stack bytes,
whether each `wgmma` waits for the one before.
Run it without TRITON_INTERPRET; `test_compile.py` does.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import fused6_cases
import persistent_cases
import quantized_cases
import ragged6_cases
import ragged_cases
import tail_cases
import train_cases
import triton
import wkv_chunk_cases
from assembler import resources, waits_for_products
from mrss_kernels import (
    add_norm_mix,
    lora_up7,
    rows_linear,
    sparse_linear,
    time_mix7,
    time_mix7_few,
    wkv6,
    wkv7,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

HALF = "*fp16"
LINEAR = {
    "p_x": HALF,
    "p_w": HALF,
    "p_scales": "*fp32",
    "p_groups": "*i32",
    "p_y": "*fp32",
    "B": "i32",
    "R": "i32",
}
NORM = dict.fromkeys(("p_weight", "p_bias", "p_weight0", "p_bias0"), "*fp32")
NORM |= {"p_shift": "*fp32", "p_mix": "*fp32", "p_out": HALF}
NORM |= {"p_x": "*fp32", "p_tokens": "*i64", "p_parts": "*fp32", "p_slots": "*i64"}
NORM |= {"p_sum": "*fp32", "B": "i32", "eps": "fp32"}
MIX = dict.fromkeys(
    ("p_in", "p_low", "p_lora", "p_vectors", "p_first", "p_pool", "p_offset"), "*fp32"
)
MIX |= {"p_up": HALF, "p_slots": "*i64", "p_out": HALF, "B": "i32", "eps": "fp32"}
LORA = {"p_low": "*fp32", "p_up": HALF, "p_vectors": "*fp32", "p_out": "*fp32", "B": "i32"}
VECTORS = dict.fromkeys(("p_r", "p_k", "p_v", "p_kk", "p_a", "p_u"), HALF)
VECTORS |= {"p_w": "*fp32", "p_y": "*fp32", "p_slots": "*i64", "p_cu_seqlens": "*i64"}
VECTORS |= {"y_scale": "fp32"}
RANKS = {"RW": 128, "RA": 128, "RG": 256, "RV": 64}
BLOCKS = {"B" + name: rank for name, rank in RANKS.items()}
HEAD = {"H": 32, "N": 64, "R": 3 * 2048 + 576, **RANKS}
WIDE_RANKS = {"RW": 128, "RA": 128, "RG": 512, "RV": 128}
WIDE_HEAD = {"H": 64, "N": 64, "R": 3 * 4096 + 896, **WIDE_RANKS}
WIDE_HEAD |= {"B" + name: rank for name, rank in WIDE_RANKS.items()}
FEW_ROWS = [("1.5b", HEAD | BLOCKS, group) for group in (1, 2, 4)]
FEW_ROWS += [("7.2b", WIDE_HEAD, group) for group in (1, 2)]
# A gate whose block of columns is a power of two above its rank.
FEW_ROWS += [("2.9b", HEAD | BLOCKS | {"RG": 320, "BRG": 512}, 2)]
GEMV = {"K": 2048, "BN": 4, "BK": 2048, "SPLITS": 1, "PDL": True}
SKINNY = {"K": 2048, "BM": 16, "BN": 64, "SPLITS": 1, "PIECES": 1, "PREFETCH": 0}
SKINNY |= {"PDL": True}
POOLS = {"*fp32": "fp32", "*fp16": "fp16"}


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return name, kernel, types of the arguments, constants and options of every compilation."""
    found: list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]] = []
    for pool, name in POOLS.items():
        types = VECTORS | {"p_pool": pool}
        block = {"H": 32, "N": 64, "BV": 16}
        found += [
            (f"{kernel.__name__} {name}", kernel, types, block, {"num_warps": 1})
            for kernel in (
                wkv6.wkv6_decode_kernel,
                wkv6.wkv6_prefill_kernel,
                wkv7.wkv7_decode_kernel,
                wkv7.wkv7_prefill_kernel,
            )
        ]
        flags = {"PARTS": 1, "STACKED": False, "OFFSET": False, "PDL": True}
        types = MIX | {"p_pool": pool}
        for fused in (True, False):
            constants = HEAD | BLOCKS | flags | {"FUSED": fused}
            label = f"time_mix7_kernel {name} {'fused' if fused else 'apart'}"
            options = {"num_warps": 8 if fused else 2, "launch_pdl": True}
            found.append((label, time_mix7.time_mix7_kernel, types, constants, options))
        options = {"num_warps": 8, "launch_pdl": True}
        for label, head, group in FEW_ROWS:
            constants = head | flags | {"G": group, "WARPS": 8}
            label_full = f"time_mix7_few_kernel {name} {label} {group}"
            kernel = time_mix7_few.time_mix7_few_kernel
            limit = time_mix7.register_limit(group, [head[name] for name in RANKS])
            found.append((label_full, kernel, types, constants, options | limit))
    pdl = {"num_warps": 4, "launch_pdl": True}
    for grouped, relu2 in ((True, False), (False, True)):
        flags = {"GROUPED": grouped, "RELU2": relu2, "EVEN": grouped}
        label = "grouped" if grouped else "relu2"
        types = LINEAR | {"p_y": HALF} if relu2 else LINEAR
        one = GEMV | flags | {"SCALED": False, "ASM": 0}
        found.append((f"gemv_kernel {label}", rows_linear.gemv_kernel, types, one, pdl))
        for label_k, cut in (
            ("loop", {"BK": 128, "STAGES": 4}),
            ("one block", {"BK": 256, "SPLITS": 8, "STAGES": 1}),
        ):
            constants = SKINNY | flags | cut
            label_full = f"skinny_kernel {label} {label_k}"
            found.append((label_full, rows_linear.skinny_kernel, types, constants, pdl))
        for pieces, columns in ((1, 0), (2, 256), (4, 0)):
            constants = SKINNY | flags | {"BM": 8, "BN": 32, "BK": 512, "STAGES": 3}
            options = {"num_warps": 2, "launch_pdl": True}
            name = f"skinny_kernel {label} {pieces} pieces"
            few = constants | {"PIECES": pieces, "PREFETCH": columns}
            found.append((name, rows_linear.skinny_kernel, types, few, options))
    for mixes in (0, 1, 6):
        constants = {"C": 2048, "BC": 2048, "BS": 256, "PARTS": 4, "MIXES": mixes, "BX": 8}
        constants |= {"EMBED": mixes == 6, "NORM0": mixes == 6, "PDL": True}
        kernel = add_norm_mix.add_norm_mix_kernel
        found.append((f"{kernel.__name__} {mixes}", kernel, NORM, constants, pdl))
    types = {"p_x": HALF, "total": "i32"}
    constants = {"BLOCK": 2048, "PDL": True}
    found.append(("square_relu_kernel", rows_linear.square_relu_kernel, types, constants, pdl))
    constants = {"C": 2048, "R": HEAD["R"], **RANKS, "PARTS": 1, "PDL": True}
    for rows, widest, num_warps in ((16, 512, 8), (16, 256, 8), (32, 128, 4)):
        cut = {name: min(size, widest) for name, size in BLOCKS.items()} | {"BM": rows, "BN": 64}
        label = f"lora_up_kernel {rows} {widest}"
        options = {"num_warps": num_warps, "launch_pdl": True}
        found.append((label, lora_up7.lora_up_kernel, LORA, constants | cut, options))
    types = {"p_x": HALF, "p_w": HALF, "p_index": "*i32", "p_y": "*fp32", "B": "i32"}
    constants = {"K": 8192, "R": 2048, "PART": 1024, "BP": 1024, "BN": 128, "BK": 64, "PDL": True}
    options = {"num_warps": 8, "launch_pdl": True}
    kernel = sparse_linear.sparse_linear_kernel
    found.append(("sparse_linear_kernel", kernel, types, constants, options))
    found += wkv_chunk_cases.cases() + train_cases.cases()
    found += quantized_cases.cases() + ragged6_cases.cases() + persistent_cases.cases()
    return found + ragged_cases.cases() + fused6_cases.cases() + tail_cases.cases()


def compile_one(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: Any) -> Any:
    """Compile one kernel as a launch on aligned tensors would."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    # Strides of a layer's states too: without it they are read one number at a time.
    multiples = [n for n in names if n.startswith("p_") or n in ("pool_stride", "shift_stride")]
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in multiples}
    form = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = form(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def main() -> None:
    """Compile the cases whose name holds the first argument; all of them without one.

    `--one-each` compiles the first case of each kernel, and the first with inputs in chunks.
    """
    # Looking for garbage at every 700 new objects is a third of a compilation.
    gc.set_threshold(20_000, 20, 20)
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    found = cases()
    if wanted == "--one-each":
        forms = [(case[0].split()[0], case[3].get("CHUNK", 0) > 0) for case in found]
        found = [case for i, case in enumerate(found) if forms.index(forms[i]) == i]
        wanted = ""
    for name, kernel, types, constants, options in found:
        if wanted in name:
            compiled = compile_one(kernel, types, constants, options)
            cubin = compiled.asm["cubin"]
            line = {"kernel": name, "bytes": len(cubin), "shared": compiled.metadata.shared}
            line |= {"serialised": waits_for_products(compiled.asm["ptx"])}
            sys.stdout.write(json.dumps(line | resources(cubin)) + "\n")


if __name__ == "__main__":
    main()
