"""Self-attention by FlashAttention 3 in e4m3, and the same arithmetic in torch, for its error where it cannot run.

Queries and keys are as large as their norms make them, far from where e4m3 begins and ends, so they are cast as they
are; a head's values are scaled so that the largest is the largest that e4m3 has (arXiv 2407.08608, without its
rotations). Shares of the softmax are e4m3 too, their sum is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kinema.engines.wan.transformer.fp8 import E4M3, LARGEST, SMALLEST

# FA3 multiplies shares, which are 1 at most, by it, so that fewer of them are less than e4m3's smallest.
_SHARES = 256.0


def attend_fp8(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(b, tokens, heads, head_dim) bfloat16 each, with heads one after another."""
    from fa3_fwd_interface import flash_attn_func  # noqa: PLC0415 - only there where it is installed

    from kinema.engines.wan.transformer.fp8_kernels import cast_heads, scale_heads  # noqa: PLC0415 - Triton

    values, scales = scale_heads(value)
    out = flash_attn_func(cast_heads(query), cast_heads(key), values, v_descale=scales, num_splits=1)
    assert isinstance(out, Tensor)
    return out


def attend_fp8_plainly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """On any device, with all shares (b, heads, tokens, tokens) in memory. FA3 rounds shares by the largest logit so
    far, and this by the largest of all."""
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
    largest = v.abs().amax(dim=(2, 3), keepdim=True).clamp(min=SMALLEST)
    logits = _rounded(q) @ _rounded(k).transpose(2, 3) * q.shape[-1] ** -0.5
    shares = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    seen = _rounded(shares * _SHARES) @ _rounded(v * (LARGEST / largest))
    seen = seen / shares.sum(dim=-1, keepdim=True) * (largest / LARGEST / _SHARES)
    return seen.to(query.dtype).transpose(1, 2)


def _rounded(x: Tensor) -> Tensor:
    """To e4m3, and back to float32."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3).float()
