"""The command line: arguments in, one call out. ``kinema --help`` lists the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kinema import __version__
from kinema.bench.app import app as bench_app
from kinema.cli.jobs import app as jobs_app
from kinema.errors import InvalidRequest
from kinema.hosting.logs import configure_logs
from kinema.request.options import GenerationOptions
from kinema.settings import Settings
from kinema.shell import EXIT_FAILED, ConfigOption, err, fail, out, run, run_joined, settings_from

app = typer.Typer(
    name="kinema",
    help="Make videos from prompts with Wan models, here or behind an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(jobs_app, name="jobs")
app.add_typer(bench_app, name="bench")

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Bundled name, folder or hub name of a diffusers-format Wan checkpoint.")
]
EngineOption = Annotated[str | None, typer.Option("--engine", help="wan, sglang or fake.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
GpusOption = Annotated[int | None, typer.Option("--gpus", help="GPUs that share each video.")]
ParallelOption = Annotated[str | None, typer.Option("--parallel", help="How they share it: auto, cfg or ulysses.")]
HostOption = Annotated[str | None, typer.Option("--host", help="Address to listen on.")]
PortOption = Annotated[int | None, typer.Option("--port", help="Port to listen on; 0 takes a free one.")]
DataDirOption = Annotated[Path | None, typer.Option("--data-dir", help="Folder for the database and the videos.")]
StorageOption = Annotated[
    str | None, typer.Option("--storage", help="fsspec URL for the videos, e.g. s3://bucket/videos.")
]
DatabaseOption = Annotated[str | None, typer.Option("--database", help="SQLAlchemy URL of the job database.")]
DiscoveryOption = Annotated[
    str | None, typer.Option("--discovery", help="etcd, or file for frontends and workers of one machine.")
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", help="Which frontends and workers belong together.")
]
EtcdOption = Annotated[str | None, typer.Option("--etcd", help="Addresses of etcd, separated by commas.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the video goes; ends in .mp4.")] = Path(
        "kinema.mp4"
    ),
    image: Annotated[Path | None, typer.Option(help="First frame (PNG, JPEG or WebP): image-to-video.")] = None,
    video: Annotated[Path | None, typer.Option(help="Film to edit (MP4, MOV or WebM): video-to-video.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much an edit may change, up to 1.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames, 4k+1.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length, when --num-frames is not given.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns it off.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same video.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    gpus: GpusOption = None,
    parallel: ParallelOption = None,
    engine: EngineOption = None,
    config: ConfigOption = None,
) -> None:
    """Make one video and save it as an MP4, without a server."""
    from kinema.cli.terminal import run_generate  # noqa: PLC0415 - the engines are slow to import; --help is not

    loaded = settings_from(_engine_flags(model, device, engine, gpus, parallel), config)
    options = GenerationOptions(
        prompt=prompt,
        negative_prompt=negative_prompt,
        size=size,
        num_frames=num_frames,
        seconds=seconds,
        fps=fps,
        num_inference_steps=steps,
        guidance_scale=guidance,
        strength=strength,
        seed=seed,
    )
    _check_readable(video)
    run(lambda: run_generate(loaded.settings.engine, options, _read_image(image), video, output, out, err))


@app.command()
def replay(
    film: Annotated[Path, typer.Argument(metavar="FILE.mp4", help="A video that Kinema made.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the new one; ends in .mp4.")] = None,
    image: Annotated[Path | None, typer.Option(help="The first frame that it was made from, if it was.")] = None,
    video: Annotated[Path | None, typer.Option(help="The film that it edits or continues, if it does.")] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    gpus: GpusOption = None,
    parallel: ParallelOption = None,
    engine: EngineOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a video again from what it says about itself, and compare the bytes; ends with 1 when they differ."""
    from kinema.cli.terminal import run_replay  # noqa: PLC0415 - see above

    loaded = settings_from(_engine_flags(model, device, engine, gpus, parallel), config)
    _check_readable(film, "")
    _check_readable(video)
    is_same = False

    def again() -> None:
        nonlocal is_same
        is_same = run_replay(
            loaded.settings.engine,
            film,
            _read_image(image),
            video,
            output,
            is_model_given=model is not None,
            out=out,
            err=err,
        )

    run(again)
    if not is_same:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def serve(
    host: HostOption = None,
    port: PortOption = None,
    data_dir: DataDirOption = None,
    model: ModelOption = None,
    engine: EngineOption = None,
    device: DeviceOption = None,
    gpus: GpusOption = None,
    parallel: ParallelOption = None,
    storage: StorageOption = None,
    database: DatabaseOption = None,
    config: ConfigOption = None,
) -> None:
    """Run the whole service in this process."""
    settings = _service_settings(
        {
            "server.host": host,
            "server.port": port,
            "data_dir": data_dir,
            "engine.model": model,
            "engine.name": engine,
            "engine.device": device,
            "engine.gpus": gpus,
            "engine.parallel": parallel,
            "storage.url": storage,
            "jobs.database_url": database,
        },
        config,
    )
    from kinema.hosting.frontend import run_server  # noqa: PLC0415 - see above

    run(lambda: run_server(settings))


@app.command()
def frontend(
    host: HostOption = None,
    port: PortOption = None,
    data_dir: DataDirOption = None,
    storage: StorageOption = None,
    database: DatabaseOption = None,
    discovery: DiscoveryOption = None,
    namespace: NamespaceOption = None,
    etcd: EtcdOption = None,
    config: ConfigOption = None,
) -> None:
    """Run the API and the queue; the videos are made by `kinema worker` processes."""
    settings = _service_settings(
        {
            "server.host": host,
            "server.port": port,
            "data_dir": data_dir,
            "storage.url": storage,
            "jobs.database_url": database,
            "cluster.discovery": discovery,
            "cluster.namespace": namespace,
            "cluster.etcd_endpoints": etcd,
        },
        config,
    )
    from kinema.hosting.frontend import run_frontend  # noqa: PLC0415 - see above

    run_joined(lambda: run_frontend(settings))


@app.command()
def worker(
    model: ModelOption = None,
    engine: EngineOption = None,
    device: DeviceOption = None,
    gpus: GpusOption = None,
    parallel: ParallelOption = None,
    storage: StorageOption = None,
    data_dir: DataDirOption = None,
    discovery: DiscoveryOption = None,
    namespace: NamespaceOption = None,
    etcd: EtcdOption = None,
    config: ConfigOption = None,
) -> None:
    """Run one model on one device for the frontends of a cluster."""
    settings = _service_settings(
        {
            "engine.model": model,
            "engine.name": engine,
            "engine.device": device,
            "engine.gpus": gpus,
            "engine.parallel": parallel,
            "storage.url": storage,
            "data_dir": data_dir,
            "cluster.discovery": discovery,
            "cluster.namespace": namespace,
            "cluster.etcd_endpoints": etcd,
        },
        config,
    )
    from kinema.hosting.worker import run_worker  # noqa: PLC0415 - see above

    run_joined(lambda: run_worker(settings))


@app.command()
def models(model: ModelOption = None, engine: EngineOption = None, config: ConfigOption = None) -> None:
    """Show what the models make, and with which defaults."""
    from kinema.cli.terminal import show_models  # noqa: PLC0415 - see above

    loaded = settings_from({"engine.model": model, "engine.name": engine}, config)
    run(lambda: show_models(loaded.settings.engine, out))


@app.command("config")
def show_config(config: ConfigOption = None) -> None:
    """Show every setting, its value and where it came from."""
    table = Table("setting", "value", "from", "what it does", box=None, pad_edge=False, header_style="bold")
    for row in settings_from({}, config).rows:
        table.add_row(row.key, str(row), row.origin, row.description)
    out.print(table)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        out.print(f"kinema {__version__}")
        raise typer.Exit


def _engine_flags(
    model: str | None, device: str | None, engine: str | None, gpus: int | None, parallel: str | None
) -> dict[str, object]:
    return {
        "engine.model": model,
        "engine.device": device,
        "engine.name": engine,
        "engine.gpus": gpus,
        "engine.parallel": parallel,
    }


def _service_settings(flags: dict[str, object], config: Path | None) -> Settings:
    """Of a process that runs until it is ended, and logs."""
    settings = settings_from(flags, config).settings
    configure_logs(is_json=settings.log_format == "json")
    return settings


def _read_image(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as exc:
        fail(InvalidRequest(f"--image {path}: {exc.strerror}; give a PNG, JPEG or WebP file"))


def _check_readable(video: Path | None, flag: str = "--video ") -> None:
    try:
        if video is not None:
            video.open("rb").close()
    except OSError as exc:
        fail(InvalidRequest(f"{flag}{video}: {exc.strerror}; give an MP4, MOV or WebM file"))


def main() -> None:
    """The ``kinema`` command."""
    app(prog_name="kinema")
