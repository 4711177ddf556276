"""Euler's method: along the velocity to the next noise level, as diffusers 0.42.1's FlowMatchEulerDiscreteScheduler.

On the CPU every bit of a float32 step equals diffusers'. With another type of the transformer diffusers rounds the
latents to that type after each step; here they stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kinema.engines.wan.configs import FlowMatchConfig
from kinema.engines.wan.solvers.flow_match import schedule_of
from kinema.request.request import GenerationRequest


class Euler:
    """The solver of one generation; it remembers nothing of earlier steps. Raises EngineFailed as ``schedule_of``."""

    is_smooth = True
    predicted: Tensor

    def __init__(self, config: FlowMatchConfig, request: GenerationRequest, device: torch.device) -> None:
        self.schedule = schedule_of(config, request, device)
        levels = self.schedule.levels
        self._sigmas: list[float] = levels.tolist()
        self._widths: list[float] = (levels[1:] - levels[:-1]).tolist()

    def step(self, velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        """See ``Solver``."""
        self.predicted = latents - self._sigmas[index] * velocity
        return latents + self._widths[index] * velocity

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def state_names(self, _num_done: int) -> list[str]:
        """Nothing."""
        return []

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """There is nothing to restore."""
