"""diffusers' own pipeline, on the components that an engine is about to take, to compare the engine with it.

The pipeline runs as published: eager, the VAE in float32, frames as numpy floats on the host.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from kinema.bench.wan.gauge import Gauge
from kinema.engines.base import Inputs
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.loading import Components, LoadComponents
from kinema.engines.wan.placement import Placement
from kinema.engines.wan.text_encoder import ALIASES, TextEncoder
from kinema.engines.wan.transformer.network import TransformerWeights
from kinema.engines.wan.vae.autoencoder import Vae
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
    inputs: Inputs
    runs: int
    times: DiffusersTimes | None = None
    spent_s: float = field(default=0.0)

    def __call__(self, checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype) -> Components:
        parts = self.load_components(checkpoint, placement, dtype)
        started = time.perf_counter()
        self.times = time_pipeline(parts, checkpoint, self.request, self.inputs, self.runs)
        Gauge(str(placement.device)).forget_peak()
        self.spent_s = time.perf_counter() - started
        return parts


def time_pipeline(
    parts: Components, checkpoint: Checkpoint, request: GenerationRequest, inputs: Inputs, runs: int
) -> DiffusersTimes:
    """Time the pipeline after one call of two steps; it leaves the components as they were."""
    gauge = Gauge(str(parts.device))
    pipeline = _pipeline(parts, checkpoint, request)
    _call(pipeline, request, inputs, gauge, num_steps=2)
    gauge.forget_peak()
    times = [_call(pipeline, request, inputs, gauge, request.num_inference_steps) for _ in range(runs)]
    step_s, decode_s, video_s = (statistics.median(column) for column in zip(*times, strict=True))
    return DiffusersTimes(step_s, decode_s, video_s, gauge.peak_bytes())


def _pipeline(
    parts: Components, checkpoint: Checkpoint, request: GenerationRequest
) -> WanPipeline | WanImageToVideoPipeline:
    path = str(checkpoint.path)
    second = parts.transformer_2
    kind = WanImageToVideoPipeline if checkpoint.has_image_channels else WanPipeline
    pipeline = kind(
        tokenizer=AutoTokenizer.from_pretrained(path, subfolder="tokenizer", trust_remote_code=False),
        text_encoder=_text_encoder(parts.text_encoder, path),
        transformer=_transformer(parts.transformer, path, "transformer"),
        transformer_2=None if second is None else _transformer(second, path, "transformer_2"),
        vae=_vae(parts.vae, path),
        scheduler=make_scheduler(checkpoint, request),
        boundary_ratio=request.boundary_ratio,
        expand_timesteps=checkpoint.is_expand_timesteps,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_scheduler(checkpoint: Checkpoint, request: GenerationRequest) -> Any:  # noqa: ANN401 - of several classes
    """diffusers' scheduler of the checkpoint's class, with the request's shift."""
    name = checkpoint.solver["_class_name"]
    shift = {"flow_shift" if name == "UniPCMultistepScheduler" else "shift": request.flow_shift}
    return getattr(diffusers, name).from_config(checkpoint.solver, **shift)


def _text_encoder(own: TextEncoder, path: str) -> UMT5EncoderModel:
    """transformers' module on the encoder's own tensors."""
    with torch.device("meta"):
        module = UMT5EncoderModel(UMT5Config.from_pretrained(path, subfolder="text_encoder"))
    tied = {alias: own.weights[name] for name, alias in ALIASES.items()}
    module.load_state_dict({**own.weights, **tied}, assign=True)
    return module.eval()


def _transformer(own: TransformerWeights, path: str, name: str) -> WanTransformer3DModel:
    """diffusers' module on the transformer's own tensors."""
    with torch.device("meta"):
        module = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(path, subfolder=name))
    # The tables of the rotation are no weights: they are computed, and a meta device computes nothing.
    made, device = module.config, own.tensors["proj_out.weight"].device
    module.rope = type(module.rope)(made.attention_head_dim, made.patch_size, made.rope_max_seq_len).to(device)
    module.load_state_dict(own.tensors, assign=True)
    return module.eval()


def _vae(own: Vae, path: str) -> AutoencoderKLWan:
    """diffusers' module on the VAE's own tensors."""
    with torch.device("meta"):
        module = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(path, subfolder="vae"))
    module.load_state_dict(own.weights, assign=True)
    return module.eval()


def _call(
    pipeline: WanPipeline | WanImageToVideoPipeline,
    request: GenerationRequest,
    inputs: Inputs,
    gauge: Gauge,
    num_steps: int,
) -> tuple[float, float, float]:
    """Seconds of a step, without the first one; of the decode; of the whole call."""
    ends: list[float] = []

    def note(_pipeline: object, _index: int, _time: object, _tensors: object) -> dict[str, object]:
        ends.append(gauge.now())
        return {}

    given = {} if inputs.first_frame is None else {"image": Image.fromarray(inputs.first_frame)}
    started = gauge.now()
    pipeline(
        **given,
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
