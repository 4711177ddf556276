"""diffusers' own WanPipeline on the components that an engine is about to take: what there is to be compared with.

As published: eager, the VAE in float32, frames as numpy floats on the host.
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
class StockTimes:
    """Medians in seconds: of a denoising step, from the last step to the frames, and of the whole call, whose end are
    frames and no file. ``peak_bytes`` is as ``Gauge`` has it."""

    step_s: float
    decode_s: float
    video_s: float
    peak_bytes: int | None


@dataclass
class StockFirst:
    """Loads components by ``load_components`` and lets the stock pipeline make a request's video of them first.

    ``spent_s`` is what of the loading was that.
    """

    load_components: LoadComponents
    request: GenerationRequest
    runs: int
    times: StockTimes | None = None
    spent_s: float = field(default=0.0)

    def __call__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Components:
        parts = self.load_components(checkpoint, device, dtype)
        started = time.perf_counter()
        self.times = measure_stock(parts, checkpoint, self.request, self.runs)
        Gauge(str(device)).forget_peak()
        self.spent_s = time.perf_counter() - started
        return parts


def measure_stock(parts: Components, checkpoint: Checkpoint, request: GenerationRequest, runs: int) -> StockTimes:
    """The components are as before afterwards. One call of two steps goes before those that are measured."""
    gauge = Gauge(str(parts.device))
    pipeline = _pipeline(parts, checkpoint, request)
    _call(pipeline, request, gauge, num_steps=2)
    gauge.forget_peak()
    times = [_call(pipeline, request, gauge, request.num_inference_steps) for _ in range(runs)]
    step_s, decode_s, video_s = (statistics.median(column) for column in zip(*times, strict=True))
    return StockTimes(step_s, decode_s, video_s, gauge.peak_bytes())


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
    """Seconds of a step, all but the first; of the decode; of all."""
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
