"""Recurrent ops of RWKV-6 and RWKV-7 on pools of states, addressed by slot.

Pools are `[S, H, N, N]`, [V, K] for RWKV-7 and [K, V] for RWKV-6; every op modifies its pool in
place and returns y. See `mrss_kernels.reference` for shapes, dtypes and formulas.
"""

from mrss_kernels.reference import wkv6_decode, wkv6_prefill, wkv7_decode, wkv7_prefill

__all__ = ["wkv6_decode", "wkv6_prefill", "wkv7_decode", "wkv7_prefill"]
