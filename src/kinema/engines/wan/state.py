"""The state of a denoising between two steps, as the bytes of a checkpoint and back.

The state is the latents and what the solver and the step cache remember of the steps before. All else, noise,
conditioning and coefficients, follows from the request and its seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kinema.engines.sealing import log_unused, seal, unseal
from kinema.engines.wan.solvers.solver import Solver
from kinema.engines.wan.step_cache import Computed, StepCache
from kinema.manifest import EngineFacts
from kinema.request.request import GenerationRequest

# Latents, UniPC's last sample and two predictions, and two velocities.
_MAX_TENSORS = 6
_MAX_ITEM_BYTES = 4
_MAX_NAMES_BYTES = 64 * 2**10
_VELOCITY_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Resumed:
    """``num_done`` steps are done, and these are the latents (1, c, f, h, w) float32 after them."""

    latents: Tensor
    num_done: int


def tensors_of(solver: Solver, cache: StepCache, latents: Tensor) -> dict[str, Tensor]:
    """The state after a step. Each step makes new tensors, so none changes these, also not one that fails."""
    return {"latents": latents} | solver.state() | {f"computed.{one.index}": one.velocity for one in cache.computed}


@dataclass(frozen=True)
class Checkpointer:
    """Writes the checkpoints of one generation, and reads them back. Only an engine with the facts ``made_by`` and the
    same request can use them.
    """

    made_by: EngineFacts
    request: GenerationRequest

    def save(self, tensors: Mapping[str, Tensor], num_done: int) -> bytes:
        """The checkpoint of the state after ``num_done`` steps. Waits for the device, since it copies tensors to the
        CPU."""
        copies = {name: torch.empty_like(tensor, device="cpu").copy_(tensor) for name, tensor in tensors.items()}
        return seal(self.made_by, self.request, {"num_done": num_done}, save(copies))

    def restore(self, data: bytes | None, solver: Solver, cache: StepCache, shape: Sequence[int]) -> Resumed | None:
        """Put solver and cache into the stored state of latents of this shape; None, with both unchanged, when the
        checkpoint cannot be used."""
        opened = unseal(data, self.made_by, self.request)
        if opened is None:
            return None
        of_solver, computed = solver.state_names(opened.num_done), cache.computed_before(opened.num_done)
        names = ["latents", *of_solver, *(f"computed.{index}" for index in computed)]
        try:
            stored = _load(opened.content, names, shape)
        except (ValueError, SafetensorError) as exc:
            log_unused(exc)
            return None
        tensors = {name: tensor.to(solver.schedule.timesteps.device) for name, tensor in stored.items()}
        solver.restore({name: tensors[name] for name in of_solver})
        cache.computed = [Computed(index, tensors[f"computed.{index}"]) for index in computed]
        return Resumed(tensors["latents"], opened.num_done)


def _load(content: bytes, names: Sequence[str], shape: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of these names and this shape, in the memory of ``content``. Raises SafetensorError or ValueError."""
    if len(content) > _MAX_TENSORS * math.prod(shape) * _MAX_ITEM_BYTES + _MAX_NAMES_BYTES:
        raise ValueError("it is larger than its state")
    tensors: dict[str, Tensor] = load(content)
    if tensors.keys() != set(names):
        raise ValueError("it has other tensors than its state has")
    for name, tensor in tensors.items():
        # Velocities are in the type of the transformer, all else is float32.
        types = _VELOCITY_TYPES if name.startswith("computed.") else (torch.float32,)
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in types:
            raise ValueError(f"its {name} is {list(tensor.shape)} of {tensor.dtype}, and not {list(shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"its {name} has values that are not finite")
    return tensors
