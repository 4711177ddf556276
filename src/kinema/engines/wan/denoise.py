"""The denoising loop: noise, timesteps, velocity, one solver step; a generator that stops after each step.

Nothing here outlives its generation: the solver, the noise and the latents belong to one generator, so generations
that take turns on a device cannot touch each other. The arithmetic is that of diffusers 0.42.1's WanPipeline and, with
a first frame, of WanImageToVideoPipeline with ``expand_timesteps``; a film that is edited begins as in
WanVideoToVideoPipeline, and a model with ``expand_timesteps`` gets one timestep for all of its tokens then.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from kinema.engines.base import Step, UInt8Array
from kinema.engines.wan.state import Checkpoints
from kinema.engines.wan.weights import Components
from kinema.request import GenerationRequest


@dataclass(frozen=True)
class Conditioning:
    """Text states (1, 512, d) with and without the prompt, and clean latents: the first frame's (1, c, 1, h, w), or
    those of the film that is edited (1, c, f, h, w).

    ``negative`` is None when nothing is guided; ``first_frame`` and ``film`` are None for text-to-video.
    """

    positive: Tensor
    negative: Tensor | None
    first_frame: Tensor | None = None
    film: Tensor | None = None


@dataclass(frozen=True)
class Expert:
    """A transformer and the guidance scale that goes with it."""

    transformer: Any
    guidance_scale: float


def make_noise(request: GenerationRequest, parts: Components) -> Tensor:
    """Latents (1, c, f, h, w) float32 of pure noise. Drawn on the CPU, so that every device starts from the same."""
    config = parts.vae.config
    shape = (
        1,
        config.z_dim,
        (request.num_frames - 1) // config.scale_factor_temporal + 1,
        request.height // config.scale_factor_spatial,
        request.width // config.scale_factor_spatial,
    )
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(parts.device)


def make_solver(config: dict[str, Any], request: GenerationRequest, device: torch.device) -> UniPCMultistepScheduler:
    """The checkpoint's solver with the request's flow shift, its timesteps set; an edit begins at a later one."""
    solver = UniPCMultistepScheduler.from_config(config, flow_shift=request.flow_shift)
    solver.set_timesteps(request.num_inference_steps, device=device)
    solver.set_begin_index(request.num_inference_steps - request.num_denoising_steps)
    return solver


def choose_expert(parts: Components, request: GenerationRequest, timestep: float, num_train_timesteps: int) -> Expert:
    """Wan 2.2 A14B: the first transformer above the boundary, the second below it; other models have the first."""
    if parts.transformer_2 is None or request.boundary_ratio is None:
        return Expert(parts.transformer, request.guidance_scale)
    if timestep >= request.boundary_ratio * num_train_timesteps:
        return Expert(parts.transformer, request.guidance_scale)
    second = request.guidance_scale_2
    return Expert(parts.transformer_2, request.guidance_scale if second is None else second)


def predict_velocity(expert: Expert, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The guided velocity (1, c, f, h, w); classifier-free guidance, arXiv 2207.12598."""
    transformer = expert.transformer
    latents = latents.to(transformer.dtype)

    def run(text: Tensor) -> Tensor:
        out: Tensor = transformer(latents, timestep, text.to(transformer.dtype), return_dict=False)[0]
        return out

    velocity = run(conditioning.positive)
    if conditioning.negative is None:
        return velocity
    unguided = run(conditioning.negative)
    return unguided + expert.guidance_scale * (velocity - unguided)


def denoise(
    parts: Components,
    solver: UniPCMultistepScheduler,
    request: GenerationRequest,
    conditioning: Conditioning,
    is_expand_timesteps: bool,
    checkpoints: Checkpoints,
    show: Callable[[Tensor], UInt8Array],
    resume: bytes | None = None,
) -> Generator[Step, None, Tensor]:
    """Yield after every step; return the clean latents (1, c, f, h, w) float32.

    ``show`` makes a picture of latents; a step's preview is that of the clean ones as they are predicted then.
    """
    timesteps = solver.timesteps[solver.begin_index :]
    resumed = checkpoints.restore(resume, solver)
    num_done = 0 if resumed is None else resumed.num_done
    latents = _first_latents(parts, solver, request, conditioning) if resumed is None else resumed.latents
    mask = _noisy_mask(latents, conditioning.first_frame)
    total = len(timesteps)
    # All tokens of an edit have one time, which is given once: equal, and less to compute than a time for each.
    has_token_times = is_expand_timesteps and conditioning.film is None
    todo = zip(timesteps[num_done:], timesteps[num_done:].tolist(), strict=True)
    for index, (timestep, time) in enumerate(todo, start=num_done + 1):
        expert = choose_expert(parts, request, time, solver.config.num_train_timesteps)
        times = _token_times(mask, timestep) if has_token_times else timestep.expand(1)
        velocity = predict_velocity(expert, _keep_first(latents, mask, conditioning), times, conditioning)
        latents = solver.step(velocity, timestep, latents, return_dict=False)[0]
        preview = partial(_preview, show, solver.model_outputs[-1], mask, conditioning)
        has_preview = solver.config.predict_x0  # else the solver remembers the noise and not what is under it
        yield Step(index, total, partial(checkpoints.save, solver, latents, index), preview if has_preview else None)
    return _keep_first(latents, mask, conditioning)


def _preview(
    show: Callable[[Tensor], UInt8Array], predicted: Tensor, mask: Tensor, conditioning: Conditioning
) -> UInt8Array:
    """Of the clean latents that a step predicted."""
    return show(_keep_first(predicted, mask, conditioning))


def _first_latents(
    parts: Components, solver: UniPCMultistepScheduler, request: GenerationRequest, conditioning: Conditioning
) -> Tensor:
    """Noise, or the film that is edited as far under noise as its first timestep says."""
    noise = make_noise(request, parts)
    if conditioning.film is None:
        return noise
    begin = solver.begin_index
    noisy: Tensor = solver.add_noise(conditioning.film, noise, solver.timesteps[begin : begin + 1])
    return noisy


def _noisy_mask(latents: Tensor, first_frame: Tensor | None) -> Tensor:
    """(1, 1, f, h, w): one where there is noise to remove, zero over the given first frame."""
    mask = torch.ones_like(latents[:, :1])
    if first_frame is not None:
        mask[:, :, 0] = 0
    return mask


def _keep_first(latents: Tensor, mask: Tensor, conditioning: Conditioning) -> Tensor:
    if conditioning.first_frame is None:
        return latents
    return (1 - mask) * conditioning.first_frame + mask * latents


def _token_times(mask: Tensor, timestep: Tensor) -> Tensor:
    """The timestep of each token (1, f*h*w/4): zero over the given first frame (patch 1x2x2)."""
    return (mask[0, 0, :, ::2, ::2] * timestep).flatten()[None]
