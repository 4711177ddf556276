"""diffusers' own pipeline, on the components that an engine is about to take, to compare the engine with it.

It runs in two ways: as published, eager and with the VAE in float32; and as a careful user sets it up, by what
diffusers itself offers. Both give frames as numpy floats on the host.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.utils import logging as diffusers_logging
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

log = logging.getLogger(__name__)

Pipeline: TypeAlias = "WanPipeline | WanImageToVideoPipeline"

_DEFAULT_SETUP = {"blocks": "eager", "attention": "native", "vae": "float32"}
# diffusers' own names: FlashAttention 3 and 2, and what torch has. Others compute something else, or are downloaded.
_ATTENTIONS = ("_flash_3", "flash", "_native_cudnn", "_native_flash", "native")
_TIMINGS = 3


@dataclass(frozen=True)
class DiffusersTimes:
    """Median seconds of a denoising step, of the decode after the last step, and of the whole call, which ends with
    frames and no file. ``peak_bytes`` is the memory of the device, as ``Gauge`` counts it, and ``setup`` says how the
    pipeline was set up."""

    step_s: float
    decode_s: float
    video_s: float
    peak_bytes: int | None
    setup: Mapping[str, str]


@dataclass
class DiffusersFirst:
    """Loads components by ``load_components``, and first has diffusers' pipeline make a request's video with them.

    ``num_tokens`` is the number of the video's tokens, and ``compile_with`` the backend of torch.compile in the careful
    way. ``careful`` stays None, with a line in the log, where that does not run. ``spent_s`` is the time of all this,
    which does not belong to the loading.
    """

    load_components: LoadComponents
    request: GenerationRequest
    inputs: Inputs
    runs: int
    num_tokens: int
    compile_with: str
    times: DiffusersTimes | None = None
    careful: DiffusersTimes | None = None
    spent_s: float = field(default=0.0)

    def __call__(self, checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype) -> Components:
        parts = self.load_components(checkpoint, placement, dtype)
        started = time.perf_counter()
        gauge = Gauge(str(placement.device))
        with _pipeline(parts, checkpoint, self.request) as pipeline:
            self.times = self._time(pipeline, gauge, _DEFAULT_SETUP)
        gauge.forget_peak()
        try:
            with _pipeline(parts, checkpoint, self.request) as pipeline:
                setup = _set_up(pipeline, self.request, self.num_tokens, self.compile_with, gauge)
                self.careful = self._time(pipeline, gauge, setup)
        except Exception as exc:  # a compiler may be missing, and the rest of the report is still wanted
            log.warning("diffusers' pipeline was not measured as a careful user runs it: %s", exc)
        gauge.forget_peak()
        self.spent_s = time.perf_counter() - started
        return parts

    def _time(self, pipeline: Pipeline, gauge: Gauge, setup: Mapping[str, str]) -> DiffusersTimes:
        """Time the pipeline after one call of two steps."""
        request = self.request
        _call(pipeline, request, self.inputs, gauge, num_steps=2)
        gauge.forget_peak()
        times = [_call(pipeline, request, self.inputs, gauge, request.num_inference_steps) for _ in range(self.runs)]
        step_s, decode_s, video_s = (statistics.median(column) for column in zip(*times, strict=True))
        return DiffusersTimes(step_s, decode_s, video_s, gauge.peak_bytes(), setup)


def _set_up(
    pipeline: Pipeline, request: GenerationRequest, num_tokens: int, compile_with: str, gauge: Gauge
) -> Mapping[str, str]:
    """Set the pipeline up as a careful user does, and say how: the transformer's blocks compiled one by one, the VAE in
    bfloat16, and of the kernels for attention and the layouts of the VAE those that are fastest here."""
    diffusers_logging.set_verbosity_error()  # it warns of each of these settings
    transformers = [one for one in (pipeline.transformer, pipeline.transformer_2) if one is not None]
    attention = _fastest(_attentions(pipeline.transformer, num_tokens), gauge)
    for transformer in transformers:
        transformer.set_attention_backend(attention)
        transformer.compile_repeated_blocks(fullgraph=True, backend=compile_with)
    formats = _decodes(pipeline.vae, request)
    chosen = _fastest(formats, gauge)
    formats[chosen]()  # the last one that was timed may be the other
    return {"blocks": f"compiled ({compile_with})", "attention": attention, "vae": f"bfloat16, {chosen}"}


def _attentions(transformer: WanTransformer3DModel, num_tokens: int) -> dict[str, Callable[[], object]]:
    """Self-attention by each backend of diffusers that is here without a download."""
    config = transformer.config
    shape = (1, num_tokens, config.num_attention_heads, config.attention_head_dim)
    query, key, value = (torch.randn(shape, device=transformer.device, dtype=transformer.dtype) for _ in range(3))

    def attend(name: str) -> Callable[[], object]:
        return lambda: dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name))

    found: dict[str, Callable[[], object]] = {}
    for name in _ATTENTIONS:
        try:
            transformer.set_attention_backend(name)
            attend(name)()
        except Exception as exc:  # each backend says in its own way that it cannot be used
            log.info("diffusers' attention %s is not measured: %s", name, exc)
        else:
            found[name] = attend(name)
    return found


def _decodes(vae: AutoencoderKLWan, request: GenerationRequest) -> dict[str, Callable[[], object]]:
    """A decode of the video in bfloat16 in each layout of the VAE's convolutions, which it leaves so."""
    config = vae.config
    num_frames = (request.num_frames - 1) // config.scale_factor_temporal + 1
    size = (request.height // config.scale_factor_spatial, request.width // config.scale_factor_spatial)
    vae.to(torch.bfloat16)
    latents = torch.randn((1, config.z_dim, num_frames, *size), device=vae.device, dtype=vae.dtype)

    def decode(memory_format: torch.memory_format) -> None:
        for weight in vae.parameters():
            if weight.dim() == len(latents.shape):
                weight.data = weight.data.contiguous(memory_format=memory_format)
        vae.decode(latents, return_dict=False)

    return {
        "channels first": lambda: decode(torch.contiguous_format),
        "channels last": lambda: decode(torch.channels_last_3d),
    }


@torch.no_grad()
def _fastest(works: Mapping[str, Callable[[], object]], gauge: Gauge) -> str:
    """The name of the work that takes least time, after one run that does not count."""

    def seconds(work: Callable[[], object]) -> float:
        work()
        return statistics.median(gauge.time(work) for _ in range(_TIMINGS))

    taken = {name: seconds(work) for name, work in works.items()}
    return min(taken, key=taken.__getitem__)


@contextmanager
def _pipeline(parts: Components, checkpoint: Checkpoint, request: GenerationRequest) -> Iterator[Pipeline]:
    """The pipeline on these components, which are afterwards as they were."""
    path, tokenizer = checkpoint.root_of, str(checkpoint.root_of("tokenizer"))
    second = parts.transformer_2
    kind = WanImageToVideoPipeline if checkpoint.has_image_channels else WanPipeline
    pipeline = kind(
        tokenizer=AutoTokenizer.from_pretrained(tokenizer, subfolder="tokenizer", trust_remote_code=False),
        text_encoder=_text_encoder(parts.text_encoder, path("text_encoder")),
        transformer=_transformer(parts.transformer, path("transformer"), "transformer"),
        transformer_2=None if second is None else _transformer(second, path("transformer_2"), "transformer_2"),
        vae=_vae(parts.vae, path("vae")),
        scheduler=make_scheduler(checkpoint, request),
        boundary_ratio=request.boundary_ratio,
        expand_timesteps=checkpoint.is_expand_timesteps,
    )
    pipeline.set_progress_bar_config(disable=True)
    try:
        with attention_backend("native"):  # a choice for one model is one for all of the process, until this ends
            yield pipeline
    finally:
        torch.compiler.reset()


def make_scheduler(checkpoint: Checkpoint, request: GenerationRequest) -> Any:  # noqa: ANN401 - of several classes
    """diffusers' scheduler of the checkpoint's class, with the request's shift."""
    name = checkpoint.solver["_class_name"]
    shift = {"flow_shift" if name == "UniPCMultistepScheduler" else "shift": request.flow_shift}
    return getattr(diffusers, name).from_config(checkpoint.solver, **shift)


def _text_encoder(own: TextEncoder, path: Path) -> UMT5EncoderModel:
    """transformers' module on the encoder's own tensors."""
    with torch.device("meta"):
        module = UMT5EncoderModel(UMT5Config.from_pretrained(str(path), subfolder="text_encoder"))
    tied = {alias: own.weights[name] for name, alias in ALIASES.items()}
    module.load_state_dict({**own.weights, **tied}, assign=True)
    return module.eval()


def _transformer(own: TransformerWeights, path: Path, name: str) -> WanTransformer3DModel:
    """diffusers' module on the transformer's own tensors."""
    with torch.device("meta"):
        module = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(str(path), subfolder=name))
    # The tables of the rotation are no weights: they are computed, and a meta device computes nothing.
    made, device = module.config, own.tensors["proj_out.weight"].device
    module.rope = type(module.rope)(made.attention_head_dim, made.patch_size, made.rope_max_seq_len).to(device)
    module.load_state_dict(own.tensors, assign=True)
    return module.eval()


def _vae(own: Vae, path: Path) -> AutoencoderKLWan:
    """diffusers' module on the VAE's own tensors."""
    with torch.device("meta"):
        module = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(str(path), subfolder="vae"))
    module.load_state_dict(own.weights, assign=True)
    return module.eval()


def _call(
    pipeline: Pipeline,
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
