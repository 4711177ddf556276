"""Where a token stands in time, height and width, as angles by which queries and keys are turned (arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.engines.wan.transformer.network import Network


@dataclass(frozen=True)
class Rotation:
    """``cosines`` and ``sines`` (tokens, head_dim / 2) float32, one for each pair of neighbouring channels."""

    cosines: Tensor
    sines: Tensor

    def shard(self, start: int, stop: int) -> Rotation:
        """For the tokens from ``start`` to ``stop`` alone."""
        return Rotation(self.cosines[start:stop], self.sines[start:stop])


def rotation_of(network: Network, grid: tuple[int, int, int]) -> Rotation:
    """``grid`` counts tokens along the three axes."""
    return Rotation(_spread(network.cosines, network.axes, grid), _spread(network.sines, network.axes, grid))


def _spread(table: Tensor, axes: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    parts = []
    for axis, part in enumerate(torch.split(table, list(axes), dim=1)):
        shape = [1, 1, 1, -1]
        shape[axis] = grid[axis]
        parts.append(part[: grid[axis]].view(shape).expand(*grid, -1))
    return torch.cat(parts, dim=-1).flatten(0, 2)
