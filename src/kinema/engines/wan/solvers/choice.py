"""Which solver a request has: the one that it names, or else its checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kinema.engines.wan.configs import FlowMatchConfig, UniPCConfig, check_steps, read_solver, solver_name
from kinema.engines.wan.solvers.euler import Euler
from kinema.engines.wan.solvers.lcm import Lcm
from kinema.engines.wan.solvers.solver import Solver
from kinema.engines.wan.solvers.unipc import UniPC
from kinema.errors import InvalidRequest
from kinema.request.request import GenerationRequest


def make_solver(own: Mapping[str, Any], request: GenerationRequest, device: torch.device) -> Solver:
    """The solver of a request, for a checkpoint whose ``scheduler_config.json`` is ``own``.

    Reads the request's ``solver``, ``timesteps``, ``num_inference_steps``, ``flow_shift``, ``strength`` and ``seed``. A
    solver that is not the checkpoint's own has diffusers' defaults, and the checkpoint's ``num_train_timesteps``.

    Raises InvalidRequest for a solver or timesteps that there are not, and EngineFailed when the settings make no sense
    together, so that a step would give no numbers.
    """
    config = read_solver(own)
    scale = config.num_train_timesteps
    try:
        check_steps(request.solver, request.timesteps, request.num_inference_steps, scale)
    except ValueError as exc:
        raise InvalidRequest(str(exc)) from exc
    name = request.solver or solver_name(own)
    if name == "unipc":
        unipc = config if isinstance(config, UniPCConfig) else UniPCConfig.of(scale)
        return UniPC(unipc, request, device)
    flow_match = config if isinstance(config, FlowMatchConfig) else FlowMatchConfig(num_train_timesteps=scale)
    return (Euler if name == "euler" else Lcm)(flow_match, request, device)
