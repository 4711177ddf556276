"""diffusers' own WanPipeline, on the components that an engine is about to take, to compare the engine with it.

The pipeline runs as published: eager, the VAE in float32, frames as numpy floats on the host.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from kinema.bench.wan.gauge import Gauge
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.loading import Components, LoadComponents
from kinema.request.request import GenerationRequest


@dataclass(frozen=True)
class DiffusersTimes:
    """Median seconds of a denoising step, of the decode after the last step, and of the whole call, which ends with
    frames and no file. ``peak_bytes`` is the memory of the device, as ``Gauge`` counts it."""

    step_s: float
    decode_s: float
    video_s: float
    peak_bytes: int | None


@dataclass
class DiffusersFirst:
    """Loads components by ``load_components``, and first has diffusers' pipeline make a request's video with them.

    ``spent_s`` is the time of that, which does not belong to the loading.
    """

    load_components: LoadComponents
    request: GenerationRequest
    runs: int
    times: DiffusersTimes | None = None
    spent_s: float = field(default=0.0)

    def __call__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Components:
        parts = self.load_components(checkpoint, device, dtype)
        started = time.perf_counter()
        self.times = time_pipeline(parts, checkpoint, self.request, self.runs)
        Gauge(str(device)).forget_peak()
        self.spent_s = time.perf_counter() - started
        return parts


def time_pipeline(parts: Components, checkpoint: Checkpoint, request: GenerationRequest, runs: int) -> DiffusersTimes:
    """Time the pipeline after one call of two steps; it leaves the components as they were."""
    gauge = Gauge(str(parts.device))
    pipeline = _pipeline(parts, checkpoint, request)
    _call(pipeline, request, gauge, num_steps=2)
    gauge.forget_peak()
    times = [_call(pipeline, request, gauge, request.num_inference_steps) for _ in range(runs)]
    step_s, decode_s, video_s = (statistics.median(column) for column in zip(*times, strict=True))
    return DiffusersTimes(step_s, decode_s, video_s, gauge.peak_bytes())


def _pipeline(parts: Components, checkpoint: Checkpoint, request: GenerationRequest) -> WanPipeline:
    pipeline = WanPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        transformer=parts.transformer,
        transformer_2=parts.transformer_2,
        vae=parts.vae,
        scheduler=UniPCMultistepScheduler.from_config(checkpoint.solver, flow_shift=request.flow_shift),
        boundary_ratio=request.boundary_ratio,
        expand_timesteps=checkpoint.is_expand_timesteps,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _call(
    pipeline: WanPipeline, request: GenerationRequest, gauge: Gauge, num_steps: int
) -> tuple[float, float, float]:
    """Seconds of a step, without the first one; of the decode; of the whole call."""
    ends: list[float] = []

    def note(_pipeline: object, _index: int, _time: object, _tensors: object) -> dict[str, object]:
        ends.append(gauge.now())
        return {}

    started = gauge.now()
    pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=num_steps,
        guidance_scale=request.guidance_scale,
        guidance_scale_2=request.guidance_scale_2,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="np",
        callback_on_step_end=note,
    )
    ended = gauge.now()
    return (ends[-1] - ends[0]) / (len(ends) - 1), ended - ends[-1], ended - started
