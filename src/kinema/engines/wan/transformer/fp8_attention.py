"""Self-attention by FlashAttention 3 in e4m3, and the same arithmetic in torch, for its error where it cannot run.

Queries and keys are as large as their norms make them, far from where e4m3 begins and ends, so they are cast as they
are. A head's values are scaled so that the largest of them is the largest number of e4m3 (arXiv 2407.08608, without its
rotations). The weights of the softmax are e4m3 too; their sum is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kinema.engines.wan.transformer.fa3 import load_fa3
from kinema.engines.wan.transformer.fp8_operations import E4M3, LARGEST, SMALLEST

# FA3 multiplies the weights of the softmax, which are 1 at most, by it, so that fewer of them are less than e4m3's
# smallest number.
_FACTOR = 256.0


def load_fp8_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The kernel: (b, tokens, heads, head_dim) bfloat16 each, a token's heads one after another.

    Raises ImportError where the package fa3-fwd is missing.
    """
    from kinema.engines.wan.transformer.fp8_kernels import cast_heads, scale_heads  # noqa: PLC0415 - Triton needs CUDA

    fa3 = load_fa3()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        values, scales = scale_heads(value)
        return fa3(cast_heads(query), cast_heads(key), values, scales)

    return attend


def attend_fp8_plainly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same arithmetic on any device, with all weights (b, heads, tokens, tokens) of the softmax in memory.

    FA3 rounds weights by the largest logit so far, and this function by the largest of all.
    """
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
    largest = v.abs().amax(dim=(2, 3), keepdim=True).clamp(min=SMALLEST)
    logits = _rounded(q) @ _rounded(k).transpose(2, 3) * q.shape[-1] ** -0.5
    weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    seen = _rounded(weights * _FACTOR) @ _rounded(v * (LARGEST / largest))
    seen = seen / weights.sum(dim=-1, keepdim=True) * (largest / LARGEST / _FACTOR)
    return seen.to(query.dtype).transpose(1, 2)


def _rounded(x: Tensor) -> Tensor:
    """The number of e4m3 that is nearest, in float32."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3).float()
