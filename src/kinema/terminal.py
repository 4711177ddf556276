"""What the commands show in a terminal: progress while a video is made, and tables."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kinema.engines.base import Engine, Output, Step
from kinema.engines.registry import create_engine, known_models
from kinema.generate import Prepared, generate_file, prepare, replacing
from kinema.request import GenerationOptions
from kinema.settings import EngineSettings


def run_generate(
    settings: EngineSettings,
    options: GenerationOptions,
    image: bytes | None,
    path: Path,
    out: Console,
    err: Console,
) -> None:
    """Check, load, make the video with a progress bar on ``err``, and print its path on ``out``. Raises KinemaError."""
    engine = create_engine(settings)
    prepared = prepare(engine, options, image)
    request = prepared.resolved.request
    for warning in prepared.resolved.warnings:
        err.print(f"[yellow]note:[/] {escape(warning)}")
    err.print(
        f"[dim]{escape(request.model)}: {request.size}, {request.num_frames} frames at {request.fps} fps, "
        f"{request.num_inference_steps} steps, guidance {request.guidance_scale:g}, seed {request.seed}[/]"
    )
    with replacing(path) as unfinished:
        elapsed_s = _make(engine, prepared, unfinished, err)
    err.print(f"[green]done[/] in {elapsed_s:.1f} s")
    out.print(str(path.resolve()), markup=False)


def _make(engine: Engine, prepared: Prepared, path: Path, err: Console) -> float:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as bar:
        loading = bar.add_task("load", total=1)
        engine.load()
        bar.update(loading, completed=1)
        denoise = bar.add_task("denoise", total=prepared.resolved.request.num_inference_steps)
        decode = bar.add_task("decode", total=None)

        def show(output: Output) -> None:
            bar.update(denoise if isinstance(output, Step) else decode, completed=output.index, total=output.total)

        try:
            return generate_file(engine, prepared.resolved.request, prepared.image, path, show)
        finally:
            engine.close()


def show_models(settings: EngineSettings, out: Console) -> None:
    """The models that can be served from here: the bundled ones and the configured one."""
    table = Table("model", "makes", "size", "frames", "fps", "steps", "guidance", "limits", box=None, pad_edge=False)
    for can in known_models(settings):
        makes = " + ".join(
            name for name, is_made in (("text", can.is_text_to_video), ("image", can.is_image_to_video)) if is_made
        )
        preset, limits = can.preset, can.limits
        table.add_row(
            can.model,
            makes,
            str(preset.size),
            str(preset.num_frames),
            str(preset.fps),
            str(preset.num_inference_steps),
            f"{preset.guidance_scale:g}",
            f"{limits.max_pixels} pixels, {limits.max_frames} frames",
        )
    out.print(table)
    out.print(
        "\nAny diffusers-format Wan text-to-video or TI2V checkpoint works too: --model FOLDER or --model HUB/NAME"
    )
