"""What the blocks attend to of the prompts: keys and values of every layer, computed once per request.

Prompts are padded to 512 tokens with zeros that are attended to like the others. Zeros have equal keys and values, so
one of them stands for all, with the logarithm of their number added to its logit: the softmax is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu

from kinema.engines.wan.transformer.network import Network


@dataclass(frozen=True)
class Text:
    """Of ``b`` prompts: ``keys_values`` (layers, b, keys, 2 d), keys before values, and ``bias`` (b, 1, 1, keys)
    float32 for the logits, minus infinity where a prompt has fewer keys than the tensor; ``counts`` (b,) int32 says
    how many, and ``max_keys`` how many a prompt can have.
    """

    keys_values: Tensor
    bias: Tensor
    counts: Tensor
    max_keys: int

    def first(self, size: int) -> Text:
        """The first prompts alone, as views."""
        return self._part(slice(size))

    def branch(self, index: int) -> Text:
        """One of the prompts alone, as views."""
        return self._part(slice(index, index + 1))

    def _part(self, own: slice) -> Text:
        return Text(self.keys_values[:, own], self.bias[own], self.counts[own], self.max_keys)

    def load(self, other: Text) -> None:
        """Make this, which is larger, say the same; no host waits."""
        size, keys = other.keys_values.shape[1:3]
        self.keys_values[:, :size, :keys].copy_(other.keys_values)
        self.bias[:size].fill_(-math.inf)
        self.bias[:size, ..., :keys].copy_(other.bias)
        self.counts[:size].copy_(other.counts)


def read_texts(network: Network, states: list[Tensor]) -> Text:
    """``states`` (1, tokens, t) are text states, zeros after each prompt's own; waits for the device."""
    parts = [_read(network, text[0].to(network.dtype)) for text in states]
    counts = [part.shape[1] for part in parts]
    keys, max_keys = max(counts), states[0].shape[1]
    padded = [torch.nn.functional.pad(part, (0, 0, 0, keys - part.shape[1])) for part in parts]
    bias = torch.full((len(parts), 1, 1, keys), -math.inf)
    for row, count, text in zip(bias, counts, states, strict=True):
        row[..., :count] = 0.0
        row[..., count - 1] = math.log(text.shape[1] - count + 1)
    device = network.device
    return Text(
        torch.stack(padded, dim=1), bias.to(device), torch.tensor(counts, dtype=torch.int32, device=device), max_keys
    )


def empty_text(network: Network, size: int, keys: int) -> Text:
    """Room for ``size`` prompts of ``keys`` tokens."""
    device = network.device
    shape = (len(network.blocks), size, keys, 2 * network.width)
    return Text(
        torch.zeros(shape, dtype=network.dtype, device=device),
        torch.full((size, 1, 1, keys), -math.inf, device=device),
        torch.zeros(size, dtype=torch.int32, device=device),
        keys,
    )


def _read(network: Network, states: Tensor) -> Tensor:
    """(layers, keys, 2 d) of the states (tokens, t)."""
    is_used = (states != 0).any(dim=1).nonzero()
    num_used = int(is_used[-1]) + 1 if len(is_used) else 0
    hidden = network.text_out(gelu(network.text_in(states[: num_used + 1]), approximate="tanh"))
    layers = []
    for block in network.blocks:
        keys_values = block.cross_kv(hidden)
        keys = keys_values[:, : network.width]
        keys.copy_(torch.nn.functional.rms_norm(keys, keys.shape[1:], block.cross_norm_k, network.eps))
        layers.append(keys_values)
    return torch.stack(layers)
