"""What the L2 is to keep, and what may leave it first.

Tens of megabytes of weights pass through the L2 between the kernel that writes an activation and
the one that reads it, and would take its place: `KEEP` is for what later kernels of a step read
again, `STREAM` for what a step reads once. Both are hints, and no result depends on them.
"""

from __future__ import annotations

import triton.language as tl

KEEP = tl.constexpr("evict_last")
STREAM = tl.constexpr("evict_first")
