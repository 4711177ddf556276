"""Where a denoising is between two steps, as bytes and back.

That is the latents and what the solver and the step cache remember of the steps before; the noise is drawn once, from
the seed, and the conditioning and all coefficients follow from the request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from kinema.engines.sealing import seal, unseal
from kinema.engines.wan.solver import Solver
from kinema.engines.wan.step_cache import Computed, StepCache
from kinema.manifest import EngineFacts
from kinema.request.request import GenerationRequest


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

    def save(self, solver: Solver, cache: StepCache, latents: Tensor, num_done: int) -> bytes:
        """Copies to the CPU, so it waits for the device."""
        assert solver.last_sample is not None, "no step was taken"
        tensors = {"latents": latents, "last_sample": solver.last_sample}
        tensors |= {f"predicted.{i}": predicted for i, predicted in enumerate(solver.predicted)}
        tensors |= {f"computed.{one.index}": one.velocity for one in cache.computed}
        copies = {name: torch.empty_like(tensor, device="cpu").copy_(tensor) for name, tensor in tensors.items()}
        computed = [one.index for one in cache.computed]
        facts = {"num_done": num_done, "num_predicted": len(solver.predicted), "computed": computed}
        return seal(self.made_by, self.request, facts, save(copies))

    def restore(self, data: bytes | None, solver: Solver, cache: StepCache) -> Resumed | None:
        """Bring both to where they were; None when the checkpoint cannot be used, and they are as before."""
        opened = unseal(data, self.made_by, self.request)
        if opened is None:
            return None
        device = solver.timesteps.device
        tensors = {name: tensor.to(device) for name, tensor in load(opened.content).items()}
        solver.predicted = [tensors[f"predicted.{i}"] for i in range(opened.facts["num_predicted"])]
        solver.last_sample = tensors["last_sample"]
        cache.computed = [Computed(index, tensors[f"computed.{index}"]) for index in opened.facts["computed"]]
        return Resumed(tensors["latents"], opened.facts["num_done"])
