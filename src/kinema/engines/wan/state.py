"""The state of a denoising between two steps, as the bytes of a checkpoint and back.

The state is the latents and what the solver and the step cache remember of the steps before. All else, noise,
conditioning and coefficients, follows from the request and its seed.
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
class Checkpointer:
    """Writes the checkpoints of one generation, and reads them back. Only an engine with the facts ``made_by`` and the
    same request can use them.
    """

    made_by: EngineFacts
    request: GenerationRequest

    def save(self, solver: Solver, cache: StepCache, latents: Tensor, num_done: int) -> bytes:
        """The checkpoint after ``num_done`` steps. Waits for the device, since it copies tensors to the CPU."""
        assert solver.last_sample is not None, "no step was taken"
        tensors = {"latents": latents, "last_sample": solver.last_sample}
        tensors |= {f"predicted.{i}": predicted for i, predicted in enumerate(solver.predicted)}
        tensors |= {f"computed.{one.index}": one.velocity for one in cache.computed}
        copies = {name: torch.empty_like(tensor, device="cpu").copy_(tensor) for name, tensor in tensors.items()}
        computed = [one.index for one in cache.computed]
        facts = {"num_done": num_done, "num_predicted": len(solver.predicted), "computed": computed}
        return seal(self.made_by, self.request, facts, save(copies))

    def restore(self, data: bytes | None, solver: Solver, cache: StepCache) -> Resumed | None:
        """Put solver and cache into the stored state; None, with both unchanged, when the checkpoint cannot be used."""
        opened = unseal(data, self.made_by, self.request)
        if opened is None:
            return None
        device = solver.timesteps.device
        tensors = {name: tensor.to(device) for name, tensor in load(opened.content).items()}
        solver.predicted = [tensors[f"predicted.{i}"] for i in range(opened.facts["num_predicted"])]
        solver.last_sample = tensors["last_sample"]
        cache.computed = [Computed(index, tensors[f"computed.{index}"]) for index in opened.facts["computed"]]
        return Resumed(tensors["latents"], opened.facts["num_done"])
