"""What sharing a step among GPUs brings: the steps of one video on a single one and shared each way, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal

from torch import Tensor

from kinema.bench.wan.gauge import Gauge
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.ranks.plan import Mode, Plan
from kinema.request.request import GenerationRequest


@dataclass(frozen=True)
class Way:
    """One of sharing. ``step_s`` leaves out a video's first step; ``difference`` is the largest one between its last
    latents and those of a single GPU, whose deviation is about 1."""

    name: Literal["single", "cfg", "ulysses"]
    step_s: float
    difference: float


@dataclass(frozen=True)
class _Fixed(Plan):
    mode: Mode | None

    def mode_of(self, *, is_guided: bool) -> Mode | None:  # noqa: ARG002 - whatever the guidance
        return self.mode


def time_ways(engine: WanEngine, request: GenerationRequest, runs: int) -> list[Way]:
    """The engine, which is loaded, has several GPUs; the request has two steps at least. Raises as ``generate``."""
    leader = engine.leader
    assert leader is not None, "the engine has a single GPU"
    plan, ways, single = leader.plan, list[Way](), None
    modes: list[Mode | None] = [None, "ulysses"]
    if request.guidance_scale > 1.0 and plan.num_ranks == 2:
        modes.insert(1, "cfg")
    try:
        for mode in modes:
            leader.plan = _Fixed(plan.num_ranks, plan.parallel, mode)
            runs_of = [_run(engine, request) for _ in range(runs)]
            latents = runs_of[0][1]
            single = latents if single is None else single
            difference = (latents - single).abs().max().item()
            ways.append(Way(mode or "single", median(seconds for seconds, _ in runs_of), difference))
    finally:
        leader.plan = plan
    return ways


def _run(engine: WanEngine, request: GenerationRequest) -> tuple[float, Tensor]:
    """Seconds of a step, and the last latents."""
    gauge = Gauge(str(engine.parts.device))
    steps = engine.sample(request)
    next(steps)
    began = gauge.now()
    while True:
        try:
            next(steps)
        except StopIteration as end:
            latents: Tensor = end.value
            return (gauge.now() - began) / (request.num_denoising_steps - 1), latents
