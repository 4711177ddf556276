"""``kinema bench diffusers``: what a video takes through our engine, and what the same call of the library takes.

Both run in one process, on the same weights in the same places, in turn. Every step ends with a device that is idle, in
both. docs/models.md has the figures.
"""

from __future__ import annotations

import inspect
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from kinema.bench.diffusers.architectures import ARCHITECTURES
from kinema.bench.diffusers.random_pipeline import draw, family_named
from kinema.bench.wan.gauge import Gauge
from kinema.engines.base import NO_INPUTS, Frames, Step, UInt8Array
from kinema.engines.diffusers.call_arguments import arguments_of
from kinema.engines.diffusers.engine import DiffusersEngine, frames_of
from kinema.engines.diffusers.memory import Savings, free_bytes_of
from kinema.engines.diffusers.model_folder import Model
from kinema.engines.diffusers.model_folder import inspect as inspect_folder
from kinema.engines.diffusers.pipeline_weights import read_pipeline
from kinema.engines.diffusers.progress import StepBar
from kinema.errors import ConfigError
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings
from kinema.shell import err, out

PROMPT = (
    "A red fox runs through fresh snow at the edge of a pine forest in the morning, the camera follows it from the side"
)
_GIB = 2**30

# A pipeline in these types on this device, for the model.
Build = Callable[[Model, torch.device, torch.dtype, torch.dtype], Any]


@dataclass(frozen=True)
class Times:
    """Seconds until the first step is done, of a further step, from the last step to the last frame on the host, and of
    the whole; ``peak_gib`` is the memory of the device, None on a CPU."""

    first_step_s: float
    step_s: float
    decode_s: float
    video_s: float
    peak_gib: float | None


@dataclass(frozen=True)
class Report:
    """What was measured, and of what. ``is_same`` says whether both made the same frames, bit for bit."""

    model: str
    pipeline: str
    device: str
    dtype: str
    vae_dtype: str
    offload: str
    weights: str
    size: str
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    load_s: float
    engine: Times
    stock: Times | None
    is_same: bool | None
    versions: Mapping[str, str]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as long the engine takes."""
        stock = self.stock
        if stock is None:
            return {}
        names = ("step_s", "video_s")
        return {name: getattr(self.engine, name) / getattr(stock, name) for name in names}


def measure_diffusers(
    settings: EngineSettings,
    video: Mapping[str, object],
    architecture: str | None,
    runs: int,
    output: Path | None,
    *,
    is_compared: bool,
    is_json: bool,
) -> None:
    """Measure and print; ``video`` has fields of a request, None for the preset's own. Raises KinemaError."""
    model, build = _subject(settings, architecture)
    with err.status("measuring"):
        report = measure(model, build, settings, video, runs, is_compared=is_compared)
    text = json.dumps({**asdict(report), "ratios": report.ratios}, indent=2)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    out.print_json(text) if is_json else out.print(_table(report))


def measure(
    model: Model,
    build: Build,
    settings: EngineSettings,
    video: Mapping[str, object],
    runs: int,
    *,
    is_compared: bool = True,
) -> Report:
    """Make videos of the model by turns, after one of each that does not count. Raises KinemaError."""
    built: list[Any] = []
    device_of: list[torch.device] = []
    free_before: list[int | None] = []

    def load(model: Model, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:  # noqa: ANN401 - of diffusers
        # Random weights are drawn on the device: what they take there is no less room for them.
        free_before.append(free_bytes_of(device_of[0]))
        built.append(build(model, device_of[0], dtype, vae_dtype))
        return built[0]

    savings = Savings(settings.offload, settings.weights, settings.diffusers.vae_tiling)
    started = time.perf_counter()
    engine = DiffusersEngine(
        model,
        settings.device,
        settings.dtype,
        vae_dtype=settings.vae_dtype,
        savings=savings,
        load_pipeline=load,
        free_bytes=lambda _device: free_before[0],
    )
    device_of.append(torch.device(engine.device))
    engine.load()
    gauge = Gauge(engine.device)
    gauge.now()
    load_s = time.perf_counter() - started
    (pipeline,) = built
    request = _request(engine, video)
    ways: dict[str, Callable[[GenerationRequest], tuple[Times, UInt8Array]]] = {
        "engine": lambda request: _by_engine(engine, request, gauge)
    }
    if is_compared:
        ways["stock"] = lambda request: _by_library(pipeline, model, request, gauge)
    for way in ways.values():
        way(request.model_copy(update={"num_inference_steps": 2}))
    times: dict[str, list[Times]] = {name: [] for name in ways}
    frames: dict[str, UInt8Array] = {}
    for _ in range(runs):
        for name, way in ways.items():
            gauge.forget_peak()
            taken, frames[name] = way(request)
            times[name].append(taken)
    facts = engine.facts
    return Report(
        model=model.name,
        pipeline=type(pipeline).__name__,
        device=gauge.name,
        dtype=facts.dtype,
        vae_dtype=facts.decode_dtype or facts.dtype,
        offload=engine.offload,
        weights=facts.weights_dtype or facts.dtype,
        size=str(request.size),
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        load_s=load_s,
        engine=_median(times["engine"]),
        stock=_median(times["stock"]) if is_compared else None,
        is_same=np.array_equal(frames["engine"], frames["stock"]) if is_compared else None,
        versions=facts.versions,
    )


def _read(model: Model, _device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:  # noqa: ANN401 - of diffusers
    return read_pipeline(model, dtype, vae_dtype)


def _subject(settings: EngineSettings, name: str | None) -> tuple[Model, Build]:
    """A model and what reads or draws it. Raises ConfigError for an unknown name."""
    if name is None:
        return inspect_folder(settings.model), _read
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise ConfigError(f"--architecture {name!r} is not known; give one of: {', '.join(ARCHITECTURES)}")
    family = family_named(architecture.family)
    # A folder of no files: the digest of the weights is that of none.
    model = Model(name, Path(), {"_class_name": family.pipelines[0]}, family, {}, flow_shift=None)
    return model, lambda _model, device, dtype, vae_dtype: draw(architecture, device, dtype, vae_dtype)


def _request(engine: DiffusersEngine, video: Mapping[str, object]) -> GenerationRequest:
    can = engine.capabilities
    if not can.is_text_to_video:
        raise ConfigError(f"{can.model} makes no videos from text alone, and these are measured")
    return resolve(GenerationOptions.model_validate({"prompt": PROMPT, "seed": 0, **video}), can).request


def _by_engine(engine: DiffusersEngine, request: GenerationRequest, gauge: Gauge) -> tuple[Times, UInt8Array]:
    started, ends, frames = gauge.now(), [], []
    for output in engine.generate(request, NO_INPUTS):
        if isinstance(output, Step):
            ends.append(gauge.now())
        elif isinstance(output, Frames):
            frames.append(np.asarray(output.data))
    return _times(started, ends, gauge), np.concatenate(frames)


@torch.no_grad()
def _by_library(
    pipeline: Any,  # noqa: ANN401 - of diffusers
    model: Model,
    request: GenerationRequest,
    gauge: Gauge,
) -> tuple[Times, UInt8Array]:
    """The library's call, with nothing but a bar that notes the time."""
    if getattr(pipeline, "guider", None) is not None:
        pipeline.guider = pipeline.guider.new(guidance_scale=request.guidance_scale)
    accepted = inspect.signature(type(pipeline).__call__).parameters
    arguments = arguments_of(model.family, request, NO_INPUTS, accepted)
    ends: list[float] = []
    pipeline.progress_bar = lambda iterable=None, total=None: StepBar(
        lambda _: ends.append(gauge.now()), iterable, total
    )
    generator = torch.Generator("cpu").manual_seed(request.seed)
    torch.manual_seed(request.seed)  # some draw from these numbers too
    started = gauge.now()
    made = pipeline(**arguments, generator=generator, output_type="np")
    times = _times(started, ends, gauge)
    return times, (np.asarray(frames_of(made)) * 255).round().astype(np.uint8)


def _times(started: float, ends: list[float], gauge: Gauge) -> Times:
    ended, peak = gauge.now(), gauge.peak_bytes()
    steps = [later - earlier for earlier, later in pairwise(ends)]
    return Times(
        first_step_s=ends[0] - started,
        step_s=statistics.median(steps),
        decode_s=ended - ends[-1],
        video_s=ended - started,
        peak_gib=None if peak is None else peak / _GIB,
    )


def _median(times: list[Times]) -> Times:
    first, step, decode, video = (
        statistics.median(getattr(one, name) for one in times)
        for name in ("first_step_s", "step_s", "decode_s", "video_s")
    )
    return Times(first, step, decode, video, max((one.peak_gib for one in times if one.peak_gib), default=None))


def _table(report: Report) -> Table:
    title = (
        f"{report.model}, {report.pipeline}: {report.size}, {report.num_frames} frames, "
        f"{report.num_inference_steps} steps, guidance {report.guidance_scale:g}\n{report.device}; {report.dtype}, "
        f"VAE {report.vae_dtype}, weights {report.weights}, offload {report.offload}; "
        f"loaded in {report.load_s:.1f} s"
    )
    table = Table("", "this engine", "the library", "ratio", box=box.SIMPLE, title=title, title_justify="left")
    stock = report.stock
    names = {"first_step_s": "text and first step, s", "step_s": "a step, s", "decode_s": "decode, s"}
    for key, words in {**names, "video_s": "whole video, s", "peak_gib": "memory at most, GiB"}.items():
        own, other = getattr(report.engine, key), None if stock is None else getattr(stock, key)
        ratio = "" if not own or not other else f"{own / other:.3f}"
        table.add_row(words, *("" if value is None else f"{value:.3f}" for value in (own, other)), ratio)
    if report.is_same is not None:
        table.caption = "the frames are the same, bit for bit" if report.is_same else "the frames differ"
    return table
