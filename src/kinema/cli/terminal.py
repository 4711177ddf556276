"""What the commands show in a terminal: progress while a video is made, and tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kinema.cli.generate import Prepared, generate_file, prepare, replacing
from kinema.cli.replay import compare, prepare_again, read_manifest
from kinema.engines.base import Note, Output, Step
from kinema.engines.registry import capabilities_of, create_engine, known_models
from kinema.request.options import GenerationOptions
from kinema.settings import EngineSettings
from kinema.shell import as_flags


def run_generate(
    settings: EngineSettings,
    options: GenerationOptions,
    image: bytes | None,
    video: Path | None,
    path: Path,
    out: Console,
    err: Console,
) -> None:
    """Check, load, make the video with a progress bar on ``err``, and print its path on ``out``. Raises KinemaError."""
    prepared = prepare(capabilities_of(settings), options, image, video)
    request = prepared.resolved.request
    with replacing(path) as unfinished:
        for warning in prepared.resolved.warnings:
            err.print(f"[yellow]note:[/] {escape(as_flags(warning))}")
        err.print(
            f"[dim]{escape(request.model)}: {request.size}, {request.num_frames} frames at {request.fps} fps, "
            f"{request.num_denoising_steps} steps, guidance {request.guidance_scale:g}, seed {request.seed}[/]"
        )
        elapsed_s = _make(settings, prepared, unfinished, err)
    err.print(f"[green]done[/] in {elapsed_s:.1f} s")
    out.print(str(path.resolve()), markup=False)


def run_replay(
    settings: EngineSettings,
    path: Path,
    image: bytes | None,
    video: Path | None,
    output: Path | None,
    *,
    is_model_given: bool,
    out: Console,
    err: Console,
) -> bool:
    """Make the video of ``path`` again, and say on ``out`` whether its bytes are the same. Raises KinemaError.

    The new one goes to ``output``, if there is one. ``is_model_given`` says that the settings' model is meant even when
    the file's has another name.
    """
    manifest = read_manifest(path)
    prepared = prepare_again(path, manifest, capabilities_of(settings), image, video, is_model_given=is_model_given)
    with replacing(output) if output is not None else _nowhere() as unfinished:
        elapsed_s = _make(settings, prepared, unfinished, err)
        verdict = compare(path, unfinished)
    err.print(f"[green]done[/] in {elapsed_s:.1f} s")
    if output is not None:
        err.print(str(output.resolve()), markup=False)
    out.print(verdict.sentence, markup=False)
    return verdict.is_same


@contextmanager
def _nowhere() -> Iterator[Path]:
    with TemporaryDirectory(prefix="kinema-replay-") as folder:
        yield Path(folder) / "video.mp4"


def _make(settings: EngineSettings, prepared: Prepared, path: Path, err: Console) -> float:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as bar:
        loading = bar.add_task("load", total=2)
        engine = create_engine(settings)  # imports torch, which takes longer than reading a small model
        bar.update(loading, completed=1)
        engine.load()
        bar.update(loading, completed=2)
        denoise = bar.add_task("denoise", total=prepared.resolved.request.num_denoising_steps)
        decode = bar.add_task("decode", start=False, visible=False)

        def show(output: Output) -> None:
            if isinstance(output, Note):
                err.print(f"[yellow]note:[/] {escape(output.text)}")
                return
            if isinstance(output, Step):
                bar.update(denoise, completed=output.index)
                return
            bar.start_task(decode)
            bar.update(decode, completed=output.index, total=output.total, visible=True)

        try:
            return generate_file(engine, prepared, path, show)
        finally:
            engine.close()


def show_models(settings: EngineSettings, out: Console) -> None:
    """The models that can be served from here: the bundled ones and the configured one."""
    table = Table("model", "from", "size", "frames", "fps", "steps", "guidance", "at most", box=None, pad_edge=False)
    for can in known_models(settings):
        modes = (
            ("text", can.is_text_to_video),
            ("image", can.is_image_to_video),
            ("video", can.is_video_to_video),
        )
        preset, limits = can.preset, can.limits
        side = math.isqrt(limits.max_pixels)
        table.add_row(
            can.model,
            ", ".join(name for name, is_made in modes if is_made),
            str(preset.size),
            str(preset.num_frames),
            str(preset.fps),
            str(preset.num_inference_steps),
            f"{preset.guidance_scale:g}",
            f"{side}x{side}, {limits.max_frames} frames",
        )
    out.print(table)
    out.print(
        "\nAny diffusers-format Wan text-to-video or TI2V checkpoint works too: --model FOLDER or --model HUB/NAME"
    )
