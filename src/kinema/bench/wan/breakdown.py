"""Where the time of one video goes: the stages of ``kinema bench engine``, measured and held against the device.

The floor of a stage is what its operations take at the rates that the device reached in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from kinema.bench.wan.ablation import Ablation, ablate
from kinema.bench.wan.diffusers_pipeline import DiffusersFirst, DiffusersTimes
from kinema.bench.wan.flops import Work, decode_work, forward_work, text_work
from kinema.bench.wan.gauge import (
    Ceilings,
    Gauge,
    count_text_tokens,
    measure_ceilings,
    time_convert,
    time_decode,
    time_text,
)
from kinema.bench.wan.loras import LoraTimes, lora_folder, measure_loras
from kinema.bench.wan.random_weights import draw, draw_transformers
from kinema.bench.wan.stages import make_video, time_step
from kinema.bench.wan.subject import Subject
from kinema.engines.registry import create_wan
from kinema.engines.wan.denoise import make_cache
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.loading import load, load_transformers
from kinema.engines.wan.solvers.choice import make_solver
from kinema.settings import EngineSettings
from kinema.storage import Storage

# Steps of the first video, which does not count; what a device compiles and records is the same for any number.
_FIRST_STEPS = 2


@dataclass(frozen=True)
class Stage:
    """Milliseconds, TFLOP, TFLOP/s, and the floor as a share of the time; None where no counted operation is done."""

    ms: float
    tflop: float | None = None
    tflops: float | None = None
    of_floor: float | None = None

    @classmethod
    def of(cls, seconds: float, work: Work, ceilings: Ceilings) -> Stage:
        floor_s = work.products / ceilings.products + work.attention / ceilings.attention
        return cls(1000 * seconds, work.total / 1e12, work.total / 1e12 / seconds, floor_s / seconds)


@dataclass(frozen=True)
class Against:
    """diffusers' pipeline on the same weights. ``video_ms`` ends with frames and without a file; ``ratios`` are its
    times divided by ours, for the stages that both have; ``setup`` says how it ran."""

    step_ms: float
    decode_ms: float
    video_ms: float
    peak_bytes: int | None
    ratios: Mapping[str, float]
    setup: Mapping[str, str]

    @classmethod
    def of(cls, times: DiffusersTimes, subject: Subject, stages: Mapping[str, Stage]) -> Against:
        video_s = times.video_s + subject.steps_not_run * times.step_s
        theirs = {"step": 1000 * times.step_s, "decode": 1000 * times.decode_s, "video": 1000 * video_s}
        ratios = {name: ms / stages[name].ms for name, ms in theirs.items() if name in stages}
        return cls(theirs["step"], theirs["decode"], theirs["video"], times.peak_bytes, ratios, times.setup)


@dataclass(frozen=True)
class Report:
    """The measurements. ``load_s`` is the time to a loaded engine, imports included; ``first_video_s`` that of a video
    of two steps after it, with all that a device compiles or records. ``peak_bytes`` is the memory that the videos
    took; ``stages`` has the stages that were asked for. ``against`` is diffusers' pipeline as published,
    ``against_careful`` as a careful user sets it up."""

    device: str
    dtype: str
    decode_dtype: str | None
    attention: str | None
    linears: str | None
    weights_dtype: str | None
    step_cache: bool | None
    versions: Mapping[str, str]
    num_tokens: int
    ceilings: Ceilings
    stages: Mapping[str, Stage]
    peak_bytes: int | None
    load_s: float
    first_video_s: float | None
    against: Against | None
    against_careful: Against | None
    loras: LoraTimes | None
    ablations: list[Ablation]


def measure(settings: EngineSettings, subject: Subject, started: float) -> Report:
    """Load the model, measure what is asked for, and free it. Raises KinemaError.

    ``started`` is the time of ``perf_counter`` from which the loading counts, imports included.
    """
    with nullcontext() if subject.lora_rank is None else lora_folder(subject.checkpoint, subject.lora_rank) as folder:
        if folder is not None:
            settings = settings.model_copy(update={"wan": settings.wan.model_copy(update={"loras": folder})})
        return _measure_loaded(settings, subject, started)


def _measure_loaded(settings: EngineSettings, subject: Subject, started: float) -> Report:
    engine, diffusers_first = _create(settings, subject)
    engine.load()
    load_s = time.perf_counter() - started - (diffusers_first.spent_s if diffusers_first else 0.0)
    try:
        return _measure(engine, subject, load_s, diffusers_first)
    finally:
        engine.close()


def _create(settings: EngineSettings, subject: Subject) -> tuple[WanEngine, DiffusersFirst | None]:
    load_components, load_others = (draw, draw_transformers) if subject.is_random else (load, load_transformers)
    if not subject.is_against_diffusers:
        return create_wan(settings, subject.checkpoint, load_components, load_others), None
    first = DiffusersFirst(
        load_components, subject.measured, subject.inputs, subject.runs, subject.num_tokens, subject.compile_with
    )
    return create_wan(settings, subject.checkpoint, first), first


def _measure(engine: WanEngine, subject: Subject, load_s: float, theirs: DiffusersFirst | None) -> Report:
    config, gauge = subject.checkpoint.transformer, Gauge(engine.device)
    gauge.forget_peak()
    times = _Times(engine, subject, gauge)
    seconds, peak_bytes = dict(times.all()), gauge.peak_bytes()
    ceilings = measure_ceilings(engine, subject.num_tokens, config.num_attention_heads, config.attention_head_dim)
    stages = _stages(engine, subject, seconds, ceilings)
    loras = None
    if subject.lora_rank is not None:
        loras = measure_loras(engine, subject, subject.lora_rank, seconds["step"], gauge)
    ablations = ablate(engine, subject.checkpoint, subject.request, gauge, subject.runs) if subject.is_ablated else []
    return Report(
        device=gauge.name,
        dtype=engine.facts.dtype,
        decode_dtype=engine.facts.decode_dtype,
        attention=engine.facts.attention,
        linears=engine.facts.linears,
        weights_dtype=engine.facts.weights_dtype,
        step_cache=engine.facts.step_cache,
        versions=engine.facts.versions,
        num_tokens=subject.num_tokens,
        ceilings=ceilings,
        stages=stages,
        peak_bytes=peak_bytes,
        load_s=load_s,
        first_video_s=times.first_video_s,
        against=None if theirs is None else _against(theirs.times, subject, stages),
        against_careful=None if theirs is None else _against(theirs.careful, subject, stages),
        loras=loras,
        ablations=ablations,
    )


def _against(times: DiffusersTimes | None, subject: Subject, stages: Mapping[str, Stage]) -> Against | None:
    return None if times is None else Against.of(times, subject, stages)


class _Times:
    """The seconds of the stages of a loaded engine; a stage that was not asked for is not run."""

    def __init__(self, engine: WanEngine, subject: Subject, gauge: Gauge) -> None:
        self._engine = engine
        self._subject = subject
        self._gauge = gauge
        self.first_video_s: float | None = None

    def all(self) -> Iterator[tuple[str, float]]:
        """Names and seconds. Steps and decode are timed in whole videos where those are measured too."""
        engine, subject, gauge, parts = self._engine, self._subject, self._gauge, self._subject.parts
        if "video" in parts:
            yield from self._videos()
        if "denoise" in parts and "video" not in parts:
            inputs = subject.inputs
            _, *steps = [time_step(engine, subject.measured, gauge, inputs) for _ in range(subject.runs + 1)]
            yield "step", median(steps)
        if "decode" in parts and "video" not in parts:
            yield "decode", time_decode(engine, subject.request, gauge, subject.runs)
        if "decode" in parts:
            yield "convert", time_convert(engine, subject.request, gauge)
        if "text" in parts:
            yield "text", time_text(engine, subject.prompts, gauge)

    def _videos(self) -> Iterator[tuple[str, float]]:
        """Make the videos and time each of their stages; the files go when all are made."""
        engine, subject, gauge, inputs = self._engine, self._subject, self._gauge, self._subject.inputs
        with TemporaryDirectory(prefix="kinema-bench-") as folder:
            storage = Storage(f"file://{Path(folder).resolve()}")
            self.first_video_s = make_video(engine, subject.with_steps(_FIRST_STEPS), inputs, storage, gauge).video_s
            numbered = [subject.numbered(number) for number in range(subject.runs)]
            videos = [make_video(engine, request, inputs, storage, gauge) for request in numbered]
        for name in ("step", "decode", "encoding", "encode", "store", "video"):
            yield name, median(getattr(video, f"{name}_s") for video in videos)


def _stages(engine: WanEngine, subject: Subject, seconds: Mapping[str, float], ceilings: Ceilings) -> dict[str, Stage]:
    """The stages in the order of a video. The whole counts the steps that were not run, and ``rest`` is the time that
    none of its stages takes."""
    num_steps = subject.request.num_inference_steps
    works = _works(engine, subject)
    found = dict(seconds)
    if "step" in found:
        found["denoise"] = num_steps * found["step"]
    if "video" in found:
        found["video"] += subject.steps_not_run * found["step"]
        parts = [found.get(name, 0.0) for name in ("text", "denoise", "decode", "encode", "store")]
        found["rest"] = found["video"] - sum(parts)
    order = ("text", "step", "denoise", "decode", "convert", "encoding", "encode", "store", "rest", "video")
    return {
        name: Stage.of(found[name], works[name], ceilings) if name in works else Stage(1000 * found[name])
        for name in order
        if name in found
    }


def _works(engine: WanEngine, subject: Subject) -> dict[str, Work]:
    """The operations of each stage that computes."""
    request, num_steps = subject.request, subject.request.num_inference_steps
    lengths = [count_text_tokens(engine, prompt) for prompt in subject.prompts]
    text = sum((text_work(subject.config("text_encoder"), length) for length in lengths), Work())
    image_keys = subject.checkpoint.num_image_keys
    computed = forward_work(subject.config("transformer"), subject.num_tokens, image_keys) * len(subject.prompts)
    decode = decode_work(subject.config("vae"), request.size, request.num_frames)
    denoise = computed * (num_steps - _count_skipped(engine, subject))
    step = denoise * (1 / num_steps)
    return {"text": text, "step": step, "denoise": denoise, "decode": decode, "video": text + denoise + decode}


def _count_skipped(engine: WanEngine, subject: Subject) -> int:
    """The number of the video's steps that the step cache does not compute."""
    solver = make_solver(subject.checkpoint.solver, subject.measured, engine.parts.device)
    cache = make_cache(engine.parts, solver, subject.measured, is_used=engine.facts.step_cache is True)
    return len(cache.skipped)
