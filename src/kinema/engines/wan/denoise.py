"""The denoising loop: noise, timesteps, velocity, one solver step; a generator that stops after each step.

Nothing here outlives its generation: solver, noise and latents belong to one generation, so generations that
interleave on a device cannot touch each other. The arithmetic is that of diffusers 0.42.1's WanPipeline and, with given
frames, of WanImageToVideoPipeline, with ``expand_timesteps`` and without. A film that is edited begins as in
WanVideoToVideoPipeline; a model with ``expand_timesteps`` then has one timestep for all of its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kinema.engines.base import Step, UInt8Array
from kinema.engines.wan.conditioning import Conditioning
from kinema.engines.wan.finite import Arrival, expect, explain
from kinema.engines.wan.launch_ahead import LaunchAhead
from kinema.engines.wan.loading import Components
from kinema.engines.wan.lora.delta import LoraRef
from kinema.engines.wan.solvers.solver import Solver
from kinema.engines.wan.state import Checkpointer, tensors_of
from kinema.engines.wan.step_cache import StepCache, choose_skipped
from kinema.request.request import GenerationRequest


class Transformer(Protocol):
    """What predicts velocities: a ``WanTransformer``, or a ``ParallelTransformer`` on several GPUs."""

    def prepare(
        self,
        texts: list[Tensor],
        timesteps: Tensor,
        latents: Tensor,
        *,
        has_clean_frame: bool,
        loras: Sequence[LoraRef] = (),
        images: Tensor | None = None,
    ) -> Any:  # noqa: ANN401
        """What ``velocities`` needs of a request; see ``WanTransformer.prepare``."""

    def velocities(self, prepared: Any, latents: Tensor, index: int) -> Tensor:  # noqa: ANN401 - its own
        """See ``WanTransformer.velocities``."""


@dataclass(frozen=True)
class Expert:
    """A transformer and the guidance scale that goes with it."""

    transformer: Transformer
    guidance_scale: float


class Prediction:
    """Predicts the velocities of one generation. An expert reads the prompts when its first step comes."""

    def __init__(
        self,
        parts: Components,
        solver: Solver,
        request: GenerationRequest,
        conditioning: Conditioning,
        cache: StepCache,
    ) -> None:
        self._parts = parts
        self._solver = solver
        self._cache = cache
        self._request = request
        self._conditioning = conditioning
        self._transformer: Transformer | None = None
        self._prepared: Any = None
        # The folder of the transformer that computed the last velocity.
        self.transformer_name = "transformer"

    def velocity(self, latents: Tensor, index: int) -> Tensor:
        """The guided velocity (1, c, f, h, w) of noisy latents at the step ``index``, which counts from 0: computed, or
        extrapolated by the step cache.
        """
        if index in self._cache.skipped:
            return self._cache.velocity(index)
        velocity = self._compute(latents, index)
        self._cache.add(index, velocity)
        return velocity

    def _compute(self, latents: Tensor, index: int) -> Tensor:
        time = self._solver.schedule.times[index]
        expert = choose_expert(self._parts, self._request, time, self._solver.schedule.num_train_timesteps)
        self.transformer_name = "transformer_2" if expert.transformer is self._parts.transformer_2 else "transformer"
        read = self._conditioning.model_input(latents)
        prepared = self._prepare(expert.transformer, read)
        return guide(expert.transformer.velocities(prepared, read, index), expert.guidance_scale)

    def _prepare(self, transformer: Transformer, latents: Tensor) -> Any:  # noqa: ANN401 - the transformer's own
        """What the transformer needs of the request. The experts run one after the other, so one is kept at a time."""
        if self._transformer is not transformer:
            self._transformer = transformer
            self._prepared = transformer.prepare(
                self._conditioning.texts,
                self._solver.schedule.timesteps,
                latents,
                has_clean_frame=self._conditioning.first_frame is not None,
                loras=self._conditioning.loras.get(self.transformer_name, ()),
                images=self._conditioning.images,
            )
        return self._prepared


def make_noise(request: GenerationRequest, parts: Components) -> Tensor:
    """Noise (1, c, f, h, w) float32, drawn on the CPU, so that every device begins with the same numbers."""
    return _draw(request, parts).to(parts.device, non_blocking=True)


def noise_ahead(request: GenerationRequest, parts: Components) -> Callable[[], Tensor]:
    """Begin to draw the noise on a thread of its own, and return a function that waits for it and returns it.

    The noise of 81 frames of 832x480 takes 15 ms, in which the text encoder can be launched. No host waits for the
    device.
    """
    thread = ThreadPoolExecutor(1, "noise")
    drawn = thread.submit(_draw, request, parts)
    thread.shutdown(wait=False)
    return lambda: drawn.result().to(parts.device, non_blocking=True)


def _draw(request: GenerationRequest, parts: Components) -> Tensor:
    # A copy from other memory to a GPU would wait for all that the GPU was given before.
    noise = torch.empty(latent_shape(request, parts), dtype=torch.float32, pin_memory=parts.device.type == "cuda")
    return torch.randn(noise.shape, generator=torch.Generator("cpu").manual_seed(request.seed), out=noise)


def latent_shape(request: GenerationRequest, parts: Components) -> tuple[int, int, int, int, int]:
    """The shape (1, c, f, h, w) of the request's latents."""
    config = parts.vae.config
    return (
        1,
        config.z_dim,
        (request.num_frames - 1) // config.scale_factor_temporal + 1,
        request.height // config.scale_factor_spatial,
        request.width // config.scale_factor_spatial,
    )


def choose_expert(parts: Components, request: GenerationRequest, timestep: float, num_train_timesteps: int) -> Expert:
    """The expert for a timestep: Wan 2.2 A14B has a second one below its boundary, other models have one alone."""
    if parts.transformer_2 is None or request.boundary_ratio is None:
        return Expert(parts.transformer, request.guidance_scale)
    if timestep >= request.boundary_ratio * num_train_timesteps:
        return Expert(parts.transformer, request.guidance_scale)
    second = request.guidance_scale_2
    return Expert(parts.transformer_2, request.guidance_scale if second is None else second)


def make_cache(parts: Components, solver: Solver, request: GenerationRequest, *, is_used: bool) -> StepCache:
    """The step cache of a generation, which skips no step unless it ``is_used`` and the solver is smooth."""
    schedule = solver.schedule
    scale = schedule.num_train_timesteps
    experts = [choose_expert(parts, request, time, scale).transformer for time in schedule.times]
    switch = next((index for index, expert in enumerate(experts) if expert is not experts[0]), None)
    skipped = choose_skipped(len(experts), switch) if is_used and solver.is_smooth else frozenset[int]()
    return StepCache(schedule.sigmas, skipped)


def guide(velocities: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): one velocity (1, c, f, h, w) from that with the prompt and, when
    there are two, that with the negative prompt.
    """
    if len(velocities) == 1:
        return velocities
    velocity, unguided = velocities[:1], velocities[1:]
    return unguided + guidance_scale * (velocity - unguided)


@dataclass(frozen=True)
class _Launched:
    """A step that the device was asked for: from the latents ``given`` to ``latents``, by the ``transformer`` of that
    folder. ``step`` is what the loop yields when they have arrived."""

    given: Tensor
    latents: Tensor
    transformer: str
    step: Step
    arrival: Arrival
    began: float


def denoise(
    parts: Components,
    solver: Solver,
    request: GenerationRequest,
    conditioning: Conditioning,
    cache: StepCache,
    checkpointer: Checkpointer,
    show: Callable[[Tensor], UInt8Array],
    noise: Callable[[], Tensor],
    ahead: LaunchAhead,
    resume: bytes | None = None,
) -> Generator[Step, None, Tensor]:
    """Yield a Step when the device has computed it; return the clean latents (1, c, f, h, w) float32.

    ``noise`` returns the noise; it is not called by a generation that resumes. ``show`` makes a picture of latents; the
    preview of a step shows the clean latents that it predicted. ``ahead`` says whether a step is launched before the
    one before it has arrived. Raises EngineFailed, with the part that is to blame, for a step whose latents are not
    finite, and InvalidRequest when LoRAs have a part in it.
    """
    resumed = checkpointer.restore(resume, solver, cache, latent_shape(request, parts))
    num_done = 0 if resumed is None else resumed.num_done
    latents = _first_latents(solver, noise(), conditioning) if resumed is None else resumed.latents
    del noise
    prediction = Prediction(parts, solver, request, conditioning, cache)
    total = len(solver.schedule.times)
    kind = (latents.shape, len(conditioning.texts))
    del resumed  # after a step its latents are old ones

    def launch(index: int, given: Tensor) -> _Launched:
        began = time.perf_counter()
        latents = solver.step(prediction.velocity(given, index), given, index)
        arrival = expect(latents)
        # The next step leaves these tensors as they are, also when it is launched before they are asked for.
        preview = partial(_preview, show, solver.predicted, conditioning)
        checkpoint = partial(checkpointer.save, tensors_of(solver, cache, latents), index + 1)
        step = Step(index + 1, total, checkpoint, preview, is_cached=index in cache.skipped)
        return _Launched(given, latents, prediction.transformer_name, step, arrival, began)

    launched: _Launched | None = None
    for index in range(num_done, total):
        present = launched or launch(index, latents)
        latents = present.latents
        launched = launch(index + 1, latents) if index + 1 < total and ahead.allows(kind) else None
        if not present.arrival.wait():
            raise explain(conditioning, present.given, f"step {index + 1} of {total}", present.transformer)
        if not present.step.is_cached:
            ahead.note(kind, time.perf_counter() - present.began)
        step = present.step
        del present  # others may run now, for as long as they like
        yield step
    return conditioning.keep_first(latents)


def _preview(show: Callable[[Tensor], UInt8Array], predicted: Tensor, conditioning: Conditioning) -> UInt8Array:
    """A picture of the clean latents that a step predicted."""
    return show(conditioning.keep_first(predicted))


def _first_latents(solver: Solver, noise: Tensor, conditioning: Conditioning) -> Tensor:
    """Noise, or the film that is edited with as much noise as the first timestep says."""
    return noise if conditioning.film is None else solver.schedule.add_noise(conditioning.film(), noise)
