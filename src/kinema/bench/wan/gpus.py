"""``kinema bench gpus``: what a step takes on one GPU, and shared by several in each way that there is."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kinema.bench.wan.architectures import ARCHITECTURES
from kinema.bench.wan.engine import app, check_subject, checkpoint_of
from kinema.engines.registry import create_wan
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.errors import ConfigError
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings
from kinema.shell import ConfigOption, err, out, run, settings_from

if TYPE_CHECKING:
    from kinema.bench.wan.parallel import Way

__all__ = ["app"]

_PROMPT = "A red fox runs through fresh snow at the edge of a pine forest in the morning"


@app.command("gpus")
def bench_gpus(
    model: Annotated[str | None, typer.Option(help="Name or folder of a checkpoint; by default tiny-wan.")] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help=f"Random weights instead, made on the devices: {', '.join(ARCHITECTURES)}."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[list[int] | None, typer.Option(help="Frames, 4k+1; of several videos when repeated.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns it off.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each video; the first one does not count.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Videos of each kind; the medians are shown.")] = 1,
    gpus: Annotated[int, typer.Option(min=2, help="GPUs that share a step.")] = 2,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N, the first of them.")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    config: ConfigOption = None,
) -> None:
    """Time a step on one GPU and shared by several, and compare what they make."""
    flags: dict[str, object] = {"engine.model": model, "engine.device": device}
    flags |= {"engine.gpus": gpus, "engine.parallel": "auto"}
    settings = settings_from(flags, config).settings.engine
    options = GenerationOptions(prompt=_PROMPT, size=size, guidance_scale=guidance, num_inference_steps=steps, seed=0)

    def measured() -> None:
        check_subject(settings, model, architecture)
        if settings.step_cache:
            raise ConfigError("engine.step_cache = true: what is compared are steps with engine.step_cache = false")
        with checkpoint_of(settings, architecture) as checkpoint, err.status("measuring"):
            lengths = [{"num_frames": count} for count in frames] if frames else [{}]
            can = checkpoint.capabilities()
            requests = [resolve(options.model_copy(update=length), can).request for length in lengths]
            _show(*_measure(settings, checkpoint, architecture, requests, runs), is_json=is_json)

    run(measured)


def _measure(
    settings: EngineSettings,
    checkpoint: Checkpoint,
    architecture: str | None,
    requests: list[GenerationRequest],
    runs: int,
) -> tuple[dict[str, Any], list[tuple[GenerationRequest, list[Way]]]]:
    """What computed, and the times of each request."""
    from kinema.bench.wan.parallel import time_ways  # noqa: PLC0415 - the same
    from kinema.bench.wan.random_weights import draw, draw_transformers  # noqa: PLC0415 - loads torch

    loads = () if architecture is None else (draw, draw_transformers)
    engine = create_wan(settings, checkpoint, *loads)
    try:
        engine.load()
        facts = {"model": checkpoint.name, **engine.facts.model_dump(mode="json", exclude={"parallel"})}
        return facts, [(request, time_ways(engine, request, runs)) for request in requests]
    finally:
        engine.close()


def _show(facts: dict[str, Any], found: list[tuple[GenerationRequest, list[Way]]], *, is_json: bool) -> None:
    if is_json:
        videos = [
            {"size": str(request.size), "num_frames": request.num_frames, "ways": [asdict(way) for way in ways]}
            for request, ways in found
        ]
        out.print_json(json.dumps({**facts, "videos": videos}))
        return
    out.print(
        f"{facts['model']}: {facts['gpus']} x {facts['device']}, {facts['dtype']}, attention {facts['attention']}",
        markup=False,
    )
    table = Table("video", "shared", "ms a step", "times as fast", "difference", box=None, pad_edge=False)
    for request, ways in found:
        for way in ways:
            table.add_row(
                f"{request.size}, {request.num_frames} frames",
                way.name,
                f"{1000 * way.step_s:,.1f}",
                f"{ways[0].step_s / way.step_s:.2f}",
                "none" if way.difference == 0 else f"{way.difference:.1e}",
            )
    out.print(table)
