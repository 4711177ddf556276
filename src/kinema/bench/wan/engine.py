"""``kinema bench engine``: what each stage of a video takes on this device, and how near that is to the device's best.

Videos are made on their real way, one at a time, from a prompt to stored files. docs/performance.md has the figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.markup import escape

from kinema.bench.serve import app
from kinema.bench.wan.architectures import ARCHITECTURES, write_architecture
from kinema.bench.wan.breakdown import PARTS, Part, Subject, measure
from kinema.bench.wan.table import as_json, render
from kinema.engines.registry import require_wan
from kinema.engines.wan.checkpoint import Checkpoint, inspect
from kinema.errors import ConfigError
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings
from kinema.shell import ConfigOption, as_flags, err, out, run, settings_from

__all__ = ["app"]

_PROMPT = (
    "A red fox runs through fresh snow at the edge of a pine forest in the morning, the camera follows it from the side"
)


@app.command("engine")
def bench_engine(
    model: Annotated[str | None, typer.Option(help="Name or folder of a checkpoint; by default tiny-wan.")] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help=f"Random weights instead, made on the device: {', '.join(ARCHITECTURES)}."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames, 4k+1.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    measure_steps: Annotated[
        int | None, typer.Option(min=2, help="Run so many of the steps, and count the others as long as these.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns it off.")] = None,
    stages: Annotated[str, typer.Option(help="Which of these to measure.")] = ",".join(PARTS),
    runs: Annotated[int, typer.Option(min=1, help="Runs after a first one; the medians are shown.")] = 3,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    attention: Annotated[str | None, typer.Option(help="auto, fa3, cudnn, sdpa or fa3-fp8.")] = None,
    linears: Annotated[str | None, typer.Option(help="dtype or fp8, what large layers multiply.")] = None,
    step_cache: Annotated[
        bool | None, typer.Option("--step-cache", help="Compute half of the steps in the middle; a step is their mean.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="diffusers: its own pipeline too, on the same weights.")] = None,
    is_ablated: Annotated[bool, typer.Option("--ablate", help="A step without each of the optimisations too.")] = False,
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON object to this file too.")] = None,
    config: ConfigOption = None,
) -> None:
    """Time, TFLOP/s and share of the device's best of every stage of a video, from its prompt to the stored MP4."""
    options = GenerationOptions(
        prompt=_PROMPT, size=size, num_frames=frames, num_inference_steps=steps, guidance_scale=guidance, seed=0
    )
    kernels: dict[str, object] = {
        "engine.attention": attention,
        "engine.linears": linears,
        "engine.step_cache": step_cache,
    }
    settings = settings_from({"engine.model": model, "engine.device": device, **kernels}, config).settings.engine

    def measured() -> None:
        check_subject(settings, model, architecture)
        _check(settings, against, is_ablated=is_ablated)
        _check_step_cache(settings, is_cut=measure_steps is not None, is_ablated=is_ablated)
        with checkpoint_of(settings, architecture) as checkpoint:
            request = _resolve(options, checkpoint)
            subject = Subject(
                checkpoint=checkpoint,
                is_random=architecture is not None,
                request=request,
                measured_steps=min(measure_steps or request.num_inference_steps, request.num_inference_steps),
                parts=_parts(stages),
                runs=runs,
                is_against_stock=against is not None,
                is_ablated=is_ablated,
            )
            with err.status("measuring"):
                report = measure(settings, subject)
            told = json.dumps(as_json(report, subject), indent=2)
            if output is not None:
                output.write_text(told + "\n", encoding="utf-8")
            out.print_json(told) if is_json else out.print(*render(report, subject), sep="\n")

    run(measured)


def check_subject(settings: EngineSettings, model: str | None, architecture: str | None) -> None:
    """Raises ConfigError when there is nothing that could be measured."""
    if settings.name != "wan":
        raise ConfigError(f"engine.name = {settings.name!r}: what is measured is the wan engine")
    if model is not None and architecture is not None:
        raise ConfigError("--model and --architecture exclude each other: one has weights, the other draws them")
    require_wan()


def _check(settings: EngineSettings, against: str | None, *, is_ablated: bool) -> None:
    if against not in (None, "diffusers"):
        raise ConfigError(f"--against {against!r} is not known; what there is to compare with is diffusers")
    if settings.gpus > 1:
        raise ConfigError(f"engine.gpus = {settings.gpus}: one GPU is measured here, and several by kinema bench gpus")
    if is_ablated and settings.linears != "dtype":
        raise ConfigError(
            f"engine.linears = {settings.linears!r}: --ablate is for engine.linears = 'dtype', whose parts it replaces"
        )


def _check_step_cache(settings: EngineSettings, *, is_cut: bool, is_ablated: bool) -> None:
    """Its steps are not equal, so none can stand for others."""
    if settings.step_cache and (is_cut or is_ablated):
        raise ConfigError(
            "engine.step_cache = true: --measure-steps and --ablate are for engine.step_cache = false, where all steps "
            "are computed"
        )


def _parts(names: str) -> frozenset[Part]:
    found = frozenset(part for part in PARTS if part in names.split(","))
    if len(found) != len(set(names.split(","))):
        raise ConfigError(f"--stages {names!r}: give some of {', '.join(PARTS)}, with commas between them")
    return found


@contextmanager
def checkpoint_of(settings: EngineSettings, architecture: str | None) -> Iterator[Checkpoint]:
    """Of an architecture there are configs alone, in a folder that goes when the block ends."""
    if architecture is None:
        yield inspect(settings.model)
        return
    with TemporaryDirectory(prefix="kinema-bench-") as folder:
        yield write_architecture(architecture, Path(folder))


def _resolve(options: GenerationOptions, checkpoint: Checkpoint) -> GenerationRequest:
    """Says what was adjusted. Raises RequestError."""
    resolved = resolve(options, checkpoint.capabilities())
    for warning in resolved.warnings:
        err.print(f"[yellow]note:[/] {escape(as_flags(warning))}")
    return resolved.request
