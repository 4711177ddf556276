"""How a Triton kernel is launched that holds a row at a time."""

from __future__ import annotations


def warps_for(block: int) -> int:
    """The number of warps for a row of ``block`` values, so that a thread holds 8 to 16 of them."""
    return min(max(block // 512, 1), 16)
