"""Noise levels and times are those of diffusers' solver, for any settings that a checkpoint may have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kinema.engines.wan.configs import SolverConfig
from kinema.engines.wan.solver import noise_levels

SETTINGS: list[dict[str, Any]] = [
    {},
    {"final_sigmas_type": "sigma_min"},
    {"shift_terminal": 0.1},
    {"num_train_timesteps": 500},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("flow_shift", [0.5, 1.0, 3.0, 5.0, 12.0])
def test_levels_are_those_of_diffusers(settings: dict[str, Any], flow_shift: float) -> None:
    """To the bit, for few steps and for many."""
    from diffusers import UniPCMultistepScheduler

    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, **settings}
    theirs = UniPCMultistepScheduler(**config, flow_shift=flow_shift)
    # A single step has no level between the first one and the last to stretch.
    for num_steps in (2, 7, 20, 50, 200) if "shift_terminal" in settings else (1, 2, 7, 20, 50, 200):
        theirs.set_timesteps(num_steps)
        levels, times = noise_levels(SolverConfig.model_validate(config), flow_shift, num_steps)
        assert torch.equal(levels, theirs.sigmas)
        assert torch.equal(times, theirs.timesteps)
