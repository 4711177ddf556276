"""The operations of a block between its matrix products, in torch.

Statistics and modulation are float32, and the result of an operation has the type of the hidden states: there diffusers
rounds too. ``block_kernels.py`` does the same on CUDA, in one pass over memory each. Hidden states
are (b, tokens, d), modulation rows (rows, d) float32: the first ``num_clean`` tokens have the first row, the others the
last.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention

from kinema.engines.wan.transformer.embeddings import Rotation, Text
from kinema.engines.wan.transformer.layers import Linear, PlainLinear


class BlockOperations(Protocol):
    """The operations of one network's blocks, with its ``eps`` and its number of heads."""

    def norm(self, hidden: Tensor, shift: Tensor, scale: Tensor, num_clean: int) -> Tensor:
        """The layer norm, modulated."""

    def add_norm(
        self, hidden: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, num_clean: int
    ) -> Tensor:
        """Add the branch, times its gate, to ``hidden`` in place; return the ``norm`` of the sum."""

    def add_norm_affine(self, hidden: Tensor, branch: Tensor, gate: Tensor, affine: Linear, num_clean: int) -> Tensor:
        """``add_norm`` with the layer norm's own weight and bias (d,) in place of a modulation."""

    def rotate(self, qkv: Tensor, norms: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, tokens, heads, head_dim) from ``qkv`` (b, tokens, 3 d), which may be
        overwritten.

        Queries and keys are normalised over all heads together, by ``norms`` (2, d), and rotated.
        """

    def norm_query(self, query: Tensor, weight: Tensor) -> Tensor:
        """The queries (b, tokens, d), normalised over all heads together; ``query`` may be overwritten."""

    def attend_text(self, query: Tensor, keys_values: Tensor, text: Text) -> Tensor:
        """Cross-attention (b, tokens, d) of ``query`` to a block's ``keys_values`` (b, keys, 2 d) of ``text``."""

    def gelu_linear(self, x: Tensor, layer: PlainLinear) -> Tensor:
        """GELU, in its tanh form and computed in float32, of the layer's result."""


class TorchBlockOperations:
    """``BlockOperations`` in torch, on any device."""

    def __init__(self, num_heads: int, eps: float) -> None:
        self._num_heads = num_heads
        self._eps = eps

    def norm(self, hidden: Tensor, shift: Tensor, scale: Tensor, num_clean: int) -> Tensor:
        shape = hidden.shape[-1:]
        if len(scale) == 1:
            return layer_norm(hidden.float(), shape, 1 + scale[0], shift[0], self._eps).to(hidden.dtype)
        normed = layer_norm(hidden.float(), shape, eps=self._eps)
        tokens = hidden.shape[1]
        scaled = torch.addcmul(_of_tokens(shift, num_clean, tokens), normed, 1 + _of_tokens(scale, num_clean, tokens))
        return scaled.to(hidden.dtype)

    def add_norm(
        self, hidden: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, num_clean: int
    ) -> Tensor:
        self._add(hidden, branch, gate, num_clean)
        return self.norm(hidden, shift, scale, num_clean)

    def add_norm_affine(self, hidden: Tensor, branch: Tensor, gate: Tensor, affine: Linear, num_clean: int) -> Tensor:
        self._add(hidden, branch, gate, num_clean)
        return layer_norm(hidden.float(), hidden.shape[-1:], affine.weight, affine.bias, self._eps).to(hidden.dtype)

    def rotate(self, qkv: Tensor, norms: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = qkv.chunk(3, dim=-1)
        angles = torch.complex(rotation.cosines, rotation.sines)[:, None]
        return (
            _rotate(self._heads(self.norm_query(query, norms[0])), angles),
            _rotate(self._heads(self.norm_query(key, norms[1])), angles),
            self._heads(value),
        )

    def norm_query(self, query: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(query, query.shape[-1:], weight, self._eps)

    def attend_text(self, query: Tensor, keys_values: Tensor, text: Text) -> Tensor:
        key, value = keys_values.chunk(2, dim=-1)
        q, k, v = (self._heads(part).transpose(1, 2) for part in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=text.bias.to(q.dtype))
        return out.transpose(1, 2).flatten(2)

    def gelu_linear(self, x: Tensor, layer: PlainLinear) -> Tensor:
        return gelu(linear(x, layer.weight, layer.bias), approximate="tanh")

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self._num_heads, -1)

    @staticmethod
    def _add(hidden: Tensor, branch: Tensor, gate: Tensor | None, num_clean: int) -> None:
        if gate is None:
            hidden.add_(branch)
        elif hidden.dtype == torch.float32:
            hidden.addcmul_(branch, _of_tokens(gate, num_clean, hidden.shape[1]))
        else:
            factor = _of_tokens(gate, num_clean, hidden.shape[1])
            hidden.copy_(torch.addcmul(hidden.float(), branch.float(), factor))


def _of_tokens(rows: Tensor, num_clean: int, num_tokens: int) -> Tensor:
    """The row of each token (tokens, d), or one row (1, d) when all tokens have the same."""
    if len(rows) == 1:
        return rows
    return torch.cat([rows[:1].expand(num_clean, -1), rows[1:].expand(num_tokens - num_clean, -1)])


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate ``x`` (b, tokens, heads, head_dim) by complex angles (tokens, 1, head_dim / 2)."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles).flatten(3).to(x.dtype)
