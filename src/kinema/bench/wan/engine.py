"""``kinema bench engine``: what each stage of a video takes on this device, and how near that is to the device's best.

Videos are made on their real way, one at a time, from a prompt to stored files. docs/performance.md has the figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from kinema.bench.wan.subject import PARTS, Part, Subject, checkpoint_of
from kinema.engines.registry import find_checkpoint, require_reference, require_wan
from kinema.engines.wan.checkpoint import Checkpoint
from kinema.errors import ConfigError
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings
from kinema.shell import as_flags, err, out

PROMPT = (
    "A red fox runs through fresh snow at the edge of a pine forest in the morning, the camera follows it from the side"
)


@dataclass(frozen=True)
class Choice:
    """What the command was told beside the settings and the video; None where an option was left out."""

    model: str | None
    architecture: str | None
    measure_steps: int | None
    stages: str | None
    runs: int
    against: str | None
    is_ablated: bool
    lora_rank: int | None
    compile_with: str


def measure_engine(
    settings: EngineSettings, video: Mapping[str, object], choice: Choice, output: Path | None, *, is_json: bool
) -> None:
    """Measure and print; ``video`` has fields of a request, None for the preset's own. Raises KinemaError."""
    _check(settings, choice)
    if settings.wan.gpus > 1:
        _check_shared(choice)
    parts = _parts(choice.stages)
    with _checkpoint(settings, choice.architecture) as checkpoint:
        if choice.against is not None and checkpoint.image_encoder is not None:
            raise ConfigError("--against diffusers is for models without an image encoder; leave it out")
        request = _resolve(video, checkpoint)
        subject = Subject(
            checkpoint=checkpoint,
            is_random=choice.architecture is not None,
            request=request,
            measured_steps=min(choice.measure_steps or request.num_inference_steps, request.num_inference_steps),
            parts=parts,
            runs=choice.runs,
            is_against_diffusers=choice.against is not None,
            is_ablated=choice.is_ablated,
            lora_rank=choice.lora_rank,
            compile_with=choice.compile_with,
        )
        started = time.perf_counter()
        # They load torch, which nothing above needs and which belongs to the time that loading takes.
        from kinema.bench.wan import breakdown, parallel, table  # noqa: PLC0415

        with err.status("measuring"):
            if settings.wan.gpus > 1:
                report: breakdown.Report | parallel.ParallelReport = parallel.measure(settings, subject)
            else:
                report = breakdown.measure(settings, subject, started)
    text = json.dumps(table.as_json(report, subject), indent=2)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    out.print_json(text) if is_json else out.print(*table.render(report, subject), sep="\n")


def _check(settings: EngineSettings, choice: Choice) -> None:
    if settings.name not in ("wan", "auto"):
        raise ConfigError(f"engine.name = {settings.name!r}: what is measured is the wan engine")
    if choice.model is not None and choice.architecture is not None:
        raise ConfigError("--model and --architecture exclude each other: one has weights, the other draws them")
    if choice.architecture is not None and (settings.wan.transformer or settings.wan.transformer_2):
        raise ConfigError(
            "--architecture draws the weights: leave out engine.wan.transformer and engine.wan.transformer_2"
        )
    if choice.against not in (None, "diffusers"):
        raise ConfigError(f"--against {choice.against!r} is not known; the only pipeline to compare with is diffusers")
    if choice.against is not None:
        require_reference()
    for name, value in (("wan.linears", settings.wan.linears), ("weights", settings.weights)):
        if choice.is_ablated and value != "dtype":
            raise ConfigError(
                f"engine.{name} = {value!r}: --ablate is for engine.{name} = 'dtype', whose parts it replaces"
            )
    # Steps that are not computed are shorter than the others, so none can stand for another.
    if settings.wan.step_cache and (choice.measure_steps is not None or choice.is_ablated or settings.wan.gpus > 1):
        raise ConfigError(
            "engine.wan.step_cache = true: --measure-steps, --ablate and --gpus are for engine.wan.step_cache = false, "
            "where all steps are computed"
        )
    if (
        choice.lora_rank is not None
        and choice.stages is not None
        and not {"denoise", "video"} & set(_parts(choice.stages))
    ):
        raise ConfigError("--lora-rank compares steps: give --stages with denoise or video, or leave it out")
    require_wan()


def _check_shared(choice: Choice) -> None:
    if choice.stages is not None or choice.against is not None or choice.is_ablated or choice.lora_rank is not None:
        raise ConfigError(
            "--gpus compares steps alone: leave out --stages, --against, --ablate and --lora-rank, or measure on one "
            "GPU (--gpus 1)"
        )


def _parts(names: str | None) -> frozenset[Part]:
    if names is None:
        return frozenset(PARTS)
    found = frozenset(part for part in PARTS if part in names.split(","))
    if len(found) != len(set(names.split(","))):
        raise ConfigError(f"--stages {names!r}: give some of {', '.join(PARTS)}, with commas between them")
    return found


def _checkpoint(settings: EngineSettings, architecture: str | None) -> AbstractContextManager[Checkpoint]:
    return nullcontext(find_checkpoint(settings)) if architecture is None else checkpoint_of(architecture)


def _resolve(video: Mapping[str, object], checkpoint: Checkpoint) -> GenerationRequest:
    """Complete the request and print what was adjusted. Raises RequestError."""
    options = GenerationOptions.model_validate({"prompt": PROMPT, "seed": 0, **video})
    can = checkpoint.capabilities()
    resolved = resolve(options, can, None if can.is_text_to_video else can.preset.size)
    for warning in resolved.warnings:
        err.print(f"[yellow]note:[/] {escape(as_flags(warning))}")
    return resolved.request
