"""What the noise level does to a transformer: scales, shifts and gates of every block, in float32.

A time's part of them is computed for all steps of a request at once. Tokens of a given first frame have the time 0, all
others the step's; so two rows at most are needed, and which of them a token has follows from its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kinema.engines.wan.transformer.network import Network


@dataclass(frozen=True)
class Times:
    """``projected`` (6, times, d) float32 and ``embedded`` (times, d): of each step, and when a first frame is given of
    time 0 before each of them.
    """

    projected: Tensor
    embedded: Tensor
    has_clean: bool

    def rows(self, index: int) -> tuple[Tensor, Tensor]:
        """Of one step: ``projected`` (6, rows, d) and ``embedded`` (rows, d), the row of time 0 first."""
        if not self.has_clean:
            return self.projected[:, index : index + 1], self.embedded[index : index + 1]
        both = slice(2 * index, 2 * index + 2)
        return self.projected[:, both], self.embedded[both]


@dataclass(frozen=True)
class Modulation:
    """Of one step: ``blocks`` (layers, 6, rows, d) and ``head`` (2, rows, d), float32. The first ``num_clean`` tokens
    have the first row, the others the last.

    The six are shift, scale and gate of the self-attention, then of the feed-forward; the head has a shift and a scale.
    """

    blocks: Tensor
    head: Tensor
    num_clean: int

    def shard(self, start: int, stop: int) -> Modulation:
        """For the tokens from ``start`` to ``stop`` alone."""
        num_clean = min(max(self.num_clean - start, 0), stop - start)
        if num_clean == 0:  # the row of the others is the only one then
            return Modulation(self.blocks[:, :, -1:], self.head[:, -1:], 0)
        return replace(self, num_clean=num_clean)


def embed_times(network: Network, timesteps: Tensor, *, has_clean: bool) -> Times:
    """``timesteps`` (steps,) are those of a whole request. Rounded where diffusers rounds."""
    if has_clean:
        timesteps = torch.stack([torch.zeros_like(timesteps), timesteps], dim=1).flatten()
    frequencies = network.time_frequencies(timesteps)
    weights = next(network.time_embedder.parameters())
    embedded = network.time_embedder(frequencies.to(weights.dtype)).to(network.dtype)
    projected = network.time_projection(torch.nn.functional.silu(embedded)).float()
    return Times(projected.view(len(timesteps), 6, -1).transpose(0, 1).contiguous(), embedded, has_clean)


def modulate(network: Network, projected: Tensor, embedded: Tensor, num_clean: int) -> Modulation:
    """Of the rows of one step."""
    blocks = network.modulation[:, :, None] + projected
    return Modulation(blocks, network.head_modulation[:, None] + embedded, num_clean)
