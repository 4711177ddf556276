"""What ``kinema generate`` and ``kinema replay`` show in a terminal while a video is made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kinema.cli.generate import generate_file, kind_of, saved_film
from kinema.cli.given import InputPaths
from kinema.cli.replay import compare, prepare_again, read_manifest
from kinema.engines.base import Note, Output, Step
from kinema.engines.registry import capabilities_of, create_engine
from kinema.inputs import Prepared, prepare
from kinema.request.options import GenerationOptions
from kinema.settings import EngineSettings
from kinema.shell import as_flags, err, out


@dataclass(frozen=True, slots=True)
class _Took:
    """How long the two parts of the work took."""

    loading_s: float
    making_s: float

    def __str__(self) -> str:
        return f"model loaded in {self.loading_s:.1f} s, video made in {self.making_s:.1f} s"


def run_generate(settings: EngineSettings, options: GenerationOptions, inputs: InputPaths, path: Path) -> None:
    """Check, load, make the video with a progress bar, and print its path. Raises KinemaError."""
    inputs.check_exclusive()
    can = capabilities_of(settings, [ask.name for ask in options.loras or ()], options.tier)
    options = options.model_copy(update={"output_format": kind_of(path)})
    prepared = prepare(inputs.read(), options, can)
    request = prepared.request
    with saved_film(path) as unfinished:
        for warning in prepared.warnings:
            err.print(f"[yellow]note:[/] {escape(as_flags(warning))}")
        err.print(
            f"[dim]{escape(request.model)}: {request.size}, {request.num_frames} frames at {request.fps} fps, "
            f"{request.num_denoising_steps} steps, guidance {request.guidance_scale:g}, seed {request.seed}"
            + (f", tier {escape(request.tier)}" if request.tier else "")
            + "".join(f", {escape(use.name)} x {use.scale:g}" for use in request.loras)
            + "[/]"
        )
        took = _make(settings, prepared, unfinished)
    err.print(f"[green]done[/]: {took}")
    out.print(str(path.resolve()), markup=False)


def run_replay(
    settings: EngineSettings, path: Path, inputs: InputPaths, output: Path | None, *, is_model_given: bool
) -> bool:
    """Make the video of ``path`` again, and print whether its bytes are the same. Raises KinemaError.

    The new video goes to ``output``, if that is given. ``is_model_given`` says that the settings' model is to be used
    even when the manifest names another.
    """
    manifest = read_manifest(path)
    can = capabilities_of(settings, [lora.name for lora in manifest.request.loras or ()])
    prepared = prepare_again(path, manifest, can, inputs.read(), is_model_given=is_model_given)
    saved = _nowhere() if output is None else saved_film(output, prepared.request.output_format)
    with saved as unfinished:
        took = _make(settings, prepared, unfinished)
        verdict = compare(path, unfinished)
    err.print(f"[green]done[/]: {took}")
    if output is not None:
        err.print(str(output.resolve()), markup=False)
    out.print(verdict.sentence, markup=False)
    return verdict.is_same


@contextmanager
def _nowhere() -> Iterator[Path]:
    with TemporaryDirectory(prefix="kinema-replay-") as folder:
        yield Path(folder) / "video.mp4"


def _make(settings: EngineSettings, prepared: Prepared, path: Path) -> _Took:
    started = time.perf_counter()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as bar:
        loading = bar.add_task("load", total=1)
        engine = create_engine(settings)
        engine.load()  # imports torch, which takes longer than reading a small model
        bar.update(loading, completed=1)
        loading_s = time.perf_counter() - started
        denoise = bar.add_task("denoise", total=prepared.request.num_denoising_steps)
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
            return _Took(loading_s, generate_file(engine, prepared, path, show))
        finally:
            engine.close()
