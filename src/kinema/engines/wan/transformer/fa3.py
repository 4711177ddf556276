"""FlashAttention 3, called as the operator that the package fa3-fwd registers with torch.

The package's Python interface is passed over: its first call imports ``torch._dynamo``, which takes 3 to 6 s.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

# (query, key, value, value scales or None) -> out; (b, tokens, heads, head_dim) each, scales (b, heads) float32.
Fa3 = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def has_fa3() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("fa3_fwd") is not None


def load_fa3() -> Fa3:
    """Return the operator: bfloat16 or e4m3 in, bfloat16 out, the head's channels next to one another in memory.

    Raises ImportError where the package is missing, AttributeError where it registers no such operator.
    """
    import fa3_fwd._C  # noqa: F401, PLC0415 - registers it; installed on few machines

    forward = torch.ops.fa3_fwd.fwd

    def attend(query: Tensor, key: Tensor, value: Tensor, value_scales: Tensor | None) -> Tensor:
        scale = query.shape[-1] ** -0.5
        # One split: with more, the order of the sums, and so the last bits, would follow from the free processors.
        out, *_ = forward(query, key, value, v_descale=value_scales, softmax_scale=scale, num_splits=1)
        assert isinstance(out, Tensor)
        return out

    return attend
