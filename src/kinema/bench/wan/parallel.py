"""What sharing a step among GPUs brings: the steps of a video on one GPU and in each mode, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from torch import Tensor

from kinema.bench.wan.gauge import Gauge
from kinema.bench.wan.random_weights import draw, draw_transformers
from kinema.bench.wan.subject import Subject
from kinema.engines.base import NO_INPUTS, Inputs
from kinema.engines.registry import create_wan
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.ranks.plan import Mode, Parallel, ParallelPlan
from kinema.request.request import GenerationRequest
from kinema.settings import EngineSettings


@dataclass(frozen=True)
class ModeTime:
    """A step in one mode. ``step_s`` leaves out a video's first step; ``difference`` is the largest difference between
    the last latents of this mode and those of the first one, whose deviation is about 1."""

    mode: Literal["single", "cfg", "ulysses"]
    step_s: float
    difference: float


@dataclass(frozen=True)
class ParallelReport:
    """The modes that were compared, and what computed. The first one is a single GPU, where one holds all weights."""

    device: str
    gpus: int
    parallel: Parallel
    dtype: str
    attention: str | None
    linears: str | None
    weights_dtype: str | None
    versions: Mapping[str, str]
    modes: list[ModeTime]


def measure(settings: EngineSettings, subject: Subject) -> ParallelReport:
    """Load the model on all GPUs, time the measured steps in each mode, and free it. Raises KinemaError."""
    loads = (draw, draw_transformers) if subject.is_random else ()
    engine = create_wan(settings, subject.checkpoint, *loads)
    try:
        engine.load()
        facts = engine.facts
        return ParallelReport(
            device=facts.device,
            gpus=settings.wan.gpus,
            parallel=settings.wan.parallel,
            dtype=facts.dtype,
            attention=facts.attention,
            linears=facts.linears,
            weights_dtype=facts.weights_dtype,
            versions=facts.versions,
            modes=time_modes(engine, subject.measured, subject.runs, subject.inputs),
        )
    finally:
        engine.close()


@dataclass(frozen=True)
class _Fixed(ParallelPlan):
    """A plan with one mode for every video."""

    mode: Mode | None

    def mode_of(self, *, is_guided: bool) -> Mode | None:  # noqa: ARG002 - the mode is fixed
        return self.mode


def time_modes(engine: WanEngine, request: GenerationRequest, runs: int, inputs: Inputs = NO_INPUTS) -> list[ModeTime]:
    """The medians of ``runs`` videos in each mode; the engine has several GPUs, the request at least two steps.

    Raises as ``generate``.
    """
    leader = engine.leader
    assert leader is not None, "the engine has a single GPU"
    plan, found, first = leader.plan, list[ModeTime](), None
    modes: list[Mode | None] = [] if plan.is_sharded else [None]
    if request.guidance_scale > 1.0 and plan.num_ranks == 2:
        modes.append("cfg")
    modes.append("ulysses")
    try:
        for mode in modes:
            leader.plan = _Fixed(plan.num_ranks, plan.parallel, mode)
            videos = [_run(engine, request, inputs) for _ in range(runs)]
            latents = videos[0][1]
            first = latents if first is None else first
            difference = (latents - first).abs().max().item()
            found.append(ModeTime(mode or "single", median(seconds for seconds, _ in videos), difference))
    finally:
        leader.plan = plan
    return found


def _run(engine: WanEngine, request: GenerationRequest, inputs: Inputs) -> tuple[float, Tensor]:
    """Seconds of a step, and the last latents (b, c, f, h, w)."""
    gauge = Gauge(str(engine.parts.device))
    steps = engine.sample(request, inputs)
    next(steps)
    began = gauge.now()
    while True:
        try:
            next(steps)
        except StopIteration as end:
            latents: Tensor = end.value
            return (gauge.now() - began) / (request.num_denoising_steps - 1), latents
