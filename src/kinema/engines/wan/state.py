"""Where a denoising is between two steps, as bytes and back.

That is the latents and what the solver remembers of the steps before; the noise is drawn once, from the seed, and the
conditioning and the timesteps follow from the request. The fields of the solver are those that diffusers 0.42.1's
``UniPCMultistepScheduler.step`` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load, save
from torch import Tensor

from kinema.engines.sealing import seal, unseal
from kinema.manifest import EngineFacts
from kinema.request import GenerationRequest

# Of the solver: lists with an entry for each of its last steps, None before there were so many.
_LISTS = ("model_outputs", "timestep_list")


@dataclass(frozen=True)
class Resumed:
    """``num_done`` steps are done, and these are the latents (1, c, f, h, w) float32 after them."""

    latents: Tensor
    num_done: int


@dataclass(frozen=True)
class Checkpoints:
    """Those of one generation."""

    made_by: EngineFacts
    request: GenerationRequest

    def save(self, solver: UniPCMultistepScheduler, latents: Tensor, num_done: int) -> bytes:
        """Copies to the CPU, so it waits for the device."""
        tensors = {"latents": latents, "last_sample": solver.last_sample}
        for name in _LISTS:
            tensors |= {f"{name}.{i}": entry for i, entry in enumerate(getattr(solver, name)) if entry is not None}
        facts = {
            "num_done": num_done,
            "step_index": solver.step_index,
            "lower_order_nums": solver.lower_order_nums,
            "this_order": solver.this_order,
        }
        # Each a copy of its own: the timesteps are views of one tensor, which safetensors does not take.
        copies = {name: torch.empty_like(tensor, device="cpu").copy_(tensor) for name, tensor in tensors.items()}
        return seal(self.made_by, self.request, facts, save(copies))

    def restore(self, data: bytes | None, solver: UniPCMultistepScheduler) -> Resumed | None:
        """Bring the solver to where it was; None when the checkpoint cannot be used, and the solver is as before."""
        opened = unseal(data, self.made_by, self.request)
        if opened is None:
            return None
        device = solver.timesteps.device
        tensors = {name: tensor.to(device) for name, tensor in load(opened.content).items()}
        _fill(solver, opened.facts, tensors)
        return Resumed(tensors["latents"], opened.facts["num_done"])


def _fill(solver: UniPCMultistepScheduler, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name in _LISTS:
        setattr(solver, name, [tensors.get(f"{name}.{i}") for i in range(solver.config.solver_order)])
    solver.last_sample = tensors["last_sample"]
    solver.lower_order_nums = facts["lower_order_nums"]
    solver.this_order = facts["this_order"]
    solver._step_index = facts["step_index"]
