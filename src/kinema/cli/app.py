"""The command line: arguments in, one call out. ``kinema --help`` lists the commands.

What a command needs is imported when it runs, so that ``--help``, ``--version`` and completion answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kinema.bench.app import app as bench_app
from kinema.cli import options as flag
from kinema.cli.jobs import app as jobs_app
from kinema.cli.lazy_values import convert_lazily
from kinema.cli.storage import app as storage_app
from kinema.imports import without_collector
from kinema.shell import EXIT_FAILED, ConfigOption, out, print_anything, run, run_joined, settings_from

if TYPE_CHECKING:
    from kinema.settings import Settings

convert_lazily()
app = typer.Typer(
    name="kinema",
    help="Make videos from prompts with Wan models, here or behind an OpenAI-compatible API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes take longer to import than all else that --help does, and are no help in a pipe
)
app.add_typer(jobs_app, name="jobs")
app.add_typer(storage_app, name="storage")
app.add_typer(bench_app, name="bench")


@app.command()
def generate(
    prompt: flag.PromptArgument,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="File to write; its name ends in .mp4, .webm or .gif."),
    ] = Path("kinema.mp4"),
    image: flag.ImageOption = None,
    last_frame: flag.LastFrameOption = None,
    video: flag.VideoOption = None,
    control_video: flag.ControlVideoOption = None,
    reference_image: flag.ReferenceImageOption = None,
    conditioning: flag.ConditioningOption = None,
    strength: flag.StrengthOption = None,
    size: flag.SizeOption = None,
    num_frames: flag.NumFramesOption = None,
    seconds: flag.SecondsOption = None,
    fps: flag.FpsOption = None,
    steps: flag.StepsOption = None,
    guidance: flag.GuidanceOption = None,
    seed: flag.SeedOption = None,
    negative_prompt: flag.NegativePromptOption = None,
    tier: flag.TierOption = None,
    lora: flag.LoraOption = None,
    model: flag.ModelOption = None,
    transformer: flag.TransformerOption = None,
    device: flag.DeviceOption = None,
    gpus: flag.GpusOption = None,
    parallel: flag.ParallelOption = None,
    loras: flag.LorasOption = None,
    engine: flag.EngineOption = None,
    config: ConfigOption = None,
) -> None:
    """Make one video and save it as a file, without a server."""
    loaded = settings_from(_engine_flags(model, transformer, device, engine, gpus, parallel, loras), config)
    from kinema.cli.given import InputPaths, read_loras  # noqa: PLC0415 - imported when it runs, as all below
    from kinema.cli.terminal import run_generate  # noqa: PLC0415
    from kinema.request.options import GenerationOptions  # noqa: PLC0415

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
        tier=tier,
    )
    inputs = InputPaths(image, last_frame, video, control_video, reference_image, conditioning)

    def make() -> None:
        asked = options.model_copy(update={"loras": read_loras(lora or [])})
        run_generate(loaded.settings.engine, asked, inputs, output)

    run(make)


@app.command()
def replay(
    film: Annotated[Path, typer.Argument(metavar="FILE", help="An MP4 or WebM file that Kinema made.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Keep the new video; its name ends as that of the first."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The first frame, if the video was made from one.")
    ] = None,
    last_frame: Annotated[
        Path | None,
        typer.Option("--last-frame", metavar="FILE", help="The last frame, if the video was made from one."),
    ] = None,
    video: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The other video, if this one edits or continues one.")
    ] = None,
    control_video: flag.ControlVideoOption = None,
    reference_image: flag.ReferenceImageOption = None,
    conditioning: flag.ConditioningOption = None,
    model: flag.ModelOption = None,
    transformer: flag.TransformerOption = None,
    device: flag.DeviceOption = None,
    gpus: flag.GpusOption = None,
    parallel: flag.ParallelOption = None,
    loras: flag.LorasOption = None,
    engine: flag.EngineOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a video again from its own manifest and compare the bytes.

    The exit code is 1 when the bytes differ.
    """
    loaded = settings_from(_engine_flags(model, transformer, device, engine, gpus, parallel, loras), config)
    from kinema.cli.given import InputPaths  # noqa: PLC0415
    from kinema.cli.terminal import run_replay  # noqa: PLC0415

    inputs, is_same = InputPaths(image, last_frame, video, control_video, reference_image, conditioning), False

    def again() -> None:
        nonlocal is_same
        is_same = run_replay(loaded.settings.engine, film, inputs, output, is_model_given=model is not None)

    run(again)
    if not is_same:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def serve(
    host: flag.HostOption = None,
    port: flag.PortOption = None,
    data_dir: flag.DataDirOption = None,
    model: flag.ModelOption = None,
    transformer: flag.TransformerOption = None,
    served_name: flag.ServedNameOption = None,
    engine: flag.EngineOption = None,
    device: flag.DeviceOption = None,
    gpus: flag.GpusOption = None,
    parallel: flag.ParallelOption = None,
    loras: flag.LorasOption = None,
    storage: flag.StorageOption = None,
    database: flag.DatabaseOption = None,
    config: ConfigOption = None,
) -> None:
    """Run the whole service in this process."""
    settings = _service_settings(
        {
            "server.host": host,
            "server.port": port,
            "data_dir": data_dir,
            "storage.url": storage,
            "jobs.database_url": database,
            "engine.served_name": served_name,
            **_engine_flags(model, transformer, device, engine, gpus, parallel, loras),
        },
        config,
    )
    with without_collector():
        from kinema.hosting.frontend import run_server  # noqa: PLC0415

    run_joined(lambda: run_server(settings))


@app.command()
def frontend(
    host: flag.HostOption = None,
    port: flag.PortOption = None,
    data_dir: flag.DataDirOption = None,
    storage: flag.StorageOption = None,
    database: flag.DatabaseOption = None,
    discovery: flag.DiscoveryOption = None,
    namespace: flag.NamespaceOption = None,
    etcd: flag.EtcdOption = None,
    config: ConfigOption = None,
) -> None:
    """Run the API and the queue of a cluster.

    The videos are made by `kinema worker` processes.
    """
    settings = _service_settings(
        {
            "server.host": host,
            "server.port": port,
            "data_dir": data_dir,
            "storage.url": storage,
            "jobs.database_url": database,
            **_cluster_flags(discovery, namespace, etcd),
        },
        config,
    )
    with without_collector():
        from kinema.hosting.frontend import run_frontend  # noqa: PLC0415

    run_joined(lambda: run_frontend(settings))


@app.command()
def worker(
    model: flag.ModelOption = None,
    transformer: flag.TransformerOption = None,
    served_name: flag.ServedNameOption = None,
    engine: flag.EngineOption = None,
    device: flag.DeviceOption = None,
    gpus: flag.GpusOption = None,
    parallel: flag.ParallelOption = None,
    loras: flag.LorasOption = None,
    storage: flag.StorageOption = None,
    data_dir: flag.DataDirOption = None,
    discovery: flag.DiscoveryOption = None,
    namespace: flag.NamespaceOption = None,
    etcd: flag.EtcdOption = None,
    config: ConfigOption = None,
) -> None:
    """Run one model on one device for the frontends of a cluster."""
    settings = _service_settings(
        {
            "storage.url": storage,
            "data_dir": data_dir,
            "engine.served_name": served_name,
            **_engine_flags(model, transformer, device, engine, gpus, parallel, loras),
            **_cluster_flags(discovery, namespace, etcd),
        },
        config,
    )
    with without_collector():
        from kinema.hosting.worker import run_worker  # noqa: PLC0415

    run_joined(lambda: run_worker(settings))


@app.command()
def models(
    model: flag.ModelOption = None,
    transformer: flag.TransformerOption = None,
    loras: flag.LorasOption = None,
    engine: flag.EngineOption = None,
    is_families: Annotated[
        bool, typer.Option("--families", help="Show the kinds of models that the engine diffusers runs.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Show what the models make, their defaults, limits and LoRAs."""
    loaded = settings_from(_engine_flags(model, transformer, None, engine, None, None, loras), config)
    from kinema.cli.tables import show_families, show_models  # noqa: PLC0415

    if is_families:
        show_families(out)
        return
    run(lambda: show_models(loaded.settings.engine, out))


@app.command("config")
def show_config(
    is_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False, config: ConfigOption = None
) -> None:
    """Show each setting, its value and where that comes from.

    Into a pipe it prints a line for each: key, value, source, environment variable and description, separated by tabs.
    """
    loaded = settings_from({}, config)
    from kinema.cli.tables import show_settings  # noqa: PLC0415

    show_settings(loaded.rows, out, is_json=is_json)


@app.callback(invoke_without_command=True)
def _root(
    is_version: Annotated[bool | None, typer.Option("--version", help="Print the version and stop.")] = None,
) -> None:
    if is_version:
        _print_version()
        raise typer.Exit


def _print_version() -> None:
    from kinema import __version__  # noqa: PLC0415

    out.print(f"kinema {__version__}")


def _engine_flags(
    model: str | None,
    transformer: Path | None,
    device: str | None,
    engine: str | None,
    gpus: int | None,
    parallel: str | None,
    loras: Path | None,
) -> dict[str, object]:
    own = "diffusers" if engine == "diffusers" else "wan"
    return {
        "engine.model": model,
        f"engine.{own}.transformer": transformer,
        "engine.device": device,
        "engine.name": engine,
        "engine.wan.gpus": gpus,
        "engine.wan.parallel": parallel,
        f"engine.{own}.loras": loras,
    }


def _cluster_flags(discovery: str | None, namespace: str | None, etcd: str | None) -> dict[str, object]:
    return {"cluster.discovery": discovery, "cluster.namespace": namespace, "cluster.etcd_endpoints": etcd}


def _service_settings(flags: dict[str, object], config: Path | None) -> Settings:
    """The settings of a process that runs until it is stopped, and whose log begins here."""
    settings = settings_from(flags, config).settings
    from kinema.hosting.logs import configure_logs  # noqa: PLC0415

    configure_logs(is_json=settings.log_format == "json")
    return settings


def main() -> None:
    """Run the ``kinema`` command."""
    print_anything()
    if sys.argv[1:] == ["--version"]:  # Typer would import pydantic, to understand the flag
        _print_version()
        return
    app(prog_name="kinema")
