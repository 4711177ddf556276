"""The noise levels of diffusers 0.42.1's FlowMatchEulerDiscreteScheduler and FlowMatchLCMScheduler, which are equal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kinema.engines.wan.configs import FlowMatchConfig
from kinema.engines.wan.solvers.solver import Schedule, require_finite, shift, starts_of, stretch
from kinema.request.request import GenerationRequest


def schedule_of(config: FlowMatchConfig, request: GenerationRequest, device: torch.device) -> Schedule:
    """The schedule of a request. Raises EngineFailed when its settings make no sense together."""
    levels, timesteps = noise_levels(config, request)
    schedule = Schedule.of(levels, timesteps, request, config.num_train_timesteps, device)
    require_finite(request, schedule.levels[:-1].isfinite().tolist())
    return schedule


def noise_levels(config: FlowMatchConfig, request: GenerationRequest) -> tuple[Tensor, Tensor]:
    """The noise levels (steps + 1,) and the times (steps,), both float32.

    Without a list the levels are even between the shifted ends, and are then shifted: diffusers shifts the lower end
    twice. Listed ones are those of ``set_timesteps(sigmas=...)``.
    """
    scale = config.num_train_timesteps
    sigmas = starts_of(request, scale, np.float32)
    if sigmas is None:
        ends = shift(np.array([scale, 1], dtype=np.float32) / np.float32(scale), request.flow_shift)
        first, last = (end.item() * scale for end in ends)
        sigmas = np.linspace(first, last, request.num_inference_steps) / scale
    sigmas = stretch(shift(sigmas, request.flow_shift), config.shift_terminal)
    levels = torch.from_numpy(sigmas).to(torch.float32)
    return torch.cat([levels, torch.zeros(1)]), levels * scale
