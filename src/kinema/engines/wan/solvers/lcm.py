"""The few steps of distilled students, by consistency (arXiv 2310.04378) or distribution matching (DMD2, 2405.14867):
predict the clean latents, and give them new noise for the next level.

A step is that of diffusers 0.42.1's FlowMatchLCMScheduler, and of its FlowMatchEulerDiscreteScheduler with
``stochastic_sampling``; on the CPU, in float32 and with the same noise, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from kinema.engines.wan.configs import FlowMatchConfig
from kinema.engines.wan.solvers.flow_match import schedule_of
from kinema.request.request import GenerationRequest


class Lcm:
    """The solver of one generation. The noise of a step follows from the seed and the step alone, so nothing needs to
    be remembered. Raises EngineFailed as ``schedule_of``.
    """

    is_smooth = False
    predicted: Tensor

    def __init__(self, config: FlowMatchConfig, request: GenerationRequest, device: torch.device) -> None:
        self.schedule = schedule_of(config, request, device)
        levels = self.schedule.levels
        self._sigmas: list[float] = levels.tolist()
        self._signals: list[float] = (1 - levels).tolist()
        self._seed = request.seed

    def step(self, velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        """See ``Solver``."""
        self.predicted = latents - self._sigmas[index] * velocity
        sigma = self._sigmas[index + 1]
        if sigma == 0:
            return self.predicted
        return self._signals[index + 1] * self.predicted + sigma * self.noise(latents, index)

    def noise(self, latents: Tensor, index: int) -> Tensor:
        """The noise, float32 of the latents' shape, that the step ``index`` gives. It is drawn on the CPU, so that
        every device has the same numbers.
        """
        # Not a sum: the next seed would have this one's noise, a step earlier. The generator reads 32 bits.
        digest = hashlib.sha256(f"{self._seed} {index}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.randn(latents.shape, generator=generator, dtype=torch.float32).to(latents.device)

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def state_names(self, _num_done: int) -> list[str]:
        """Nothing."""
        return []

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """There is nothing to restore."""
