"""The sigmoid that our Triton kernels share."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) in fp32, to a few units in the last place, by two instructions of the special function unit.

    Written as a division and an exponential it takes twelve instructions where this takes five; kernels that should
    wait for memory alone would then wait for those.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root
