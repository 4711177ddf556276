"""``kinema bench``: the options of each command. What measures is imported when the command runs."""

# `kinema --help` reads this file, so a command imports what it needs when it runs.
# ruff: noqa: PLC0415

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kinema.bench.diffusers.architectures import ARCHITECTURES as PIPELINES
from kinema.bench.wan.architectures import ARCHITECTURES
from kinema.shell import ConfigOption, run, settings_from

app = typer.Typer(help="Measure the service, the scheduler and the engine.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("api")
def api(
    url: Annotated[str | None, typer.Option(help="A running service; by default one is started for this.")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key of that service.")] = None,
    database: Annotated[str | None, typer.Option(help="SQLAlchemy URL for the service that is started.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs; the medians are shown.")] = 3,
    submissions: Annotated[int, typer.Option(min=2, help="POST /v1/videos a run.")] = 500,
    polls: Annotated[int, typer.Option(min=2, help="GET /v1/videos/{id} a run.")] = 5000,
    calls: Annotated[int, typer.Option(min=2, help="POST /v1/videos/generations a run, one after the other.")] = 50,
    concurrency: Annotated[int, typer.Option(min=1, help="Connections for submissions and polls.")] = 16,
    is_json: JsonOption = False,
) -> None:
    """Measure how fast the service is without a model.

    It counts submissions and polls per second, and times what a synchronous call costs beside the model.
    """
    from kinema.bench.api import CallPlan, measure_api

    plan = CallPlan(submissions, polls, calls, concurrency, api_key)
    run(lambda: measure_api(plan, url, database, runs, is_json=is_json))


@app.command("store")
def store(
    database: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL of an empty database; by default SQLite.")
    ] = None,
    finished: Annotated[list[int], typer.Option(min=1, help="Finished jobs; may be repeated.")] = [1000, 10_000],  # noqa: B006
    waiting: Annotated[list[int], typer.Option(min=1, help="Waiting jobs; may be repeated.")] = [1000, 10_000],  # noqa: B006
    workers: Annotated[int, typer.Option(min=1, help="Workers that the waiting jobs are predicted for.")] = 64,
    calls: Annotated[int, typer.Option(min=1, help="Calls of each kind; the medians are shown.")] = 30,
    plots: Annotated[
        Path | None, typer.Option(help="Measure nothing, and draw what was recorded into this folder.")
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Measure the job database with many jobs.

    They are finished or waiting: it reports what calls of the store and the view of the queue cost."""
    from kinema.bench.store import measure_store

    if plots is not None:
        from kinema.bench.plots import draw_store, make_plots_folder

        def draw() -> None:
            make_plots_folder(plots)
            typer.echo(draw_store(plots))

        run(draw)
        return
    run(lambda: measure_store(database, finished, waiting, workers, calls, is_json=is_json))


@app.command("cluster")
def cluster(
    database: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL of an empty database; by default SQLite.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers.")] = 1000,
    frontends: Annotated[int, typer.Option(min=1, help="Frontends; each has a dispatcher.")] = 16,
    jobs: Annotated[int, typer.Option(min=1, help="Jobs in all.")] = 36_000,
    per_s: Annotated[float, typer.Option(min=0.01, help="Jobs that arrive a second.")] = 10.0,
    load: Annotated[float, typer.Option(min=0.01, help="Work that arrives, as a share of what the workers do.")] = 1.1,
    slots: Annotated[int, typer.Option(min=1, help="Videos that share a worker.")] = 1,
    turns: Annotated[int, typer.Option(min=1, help="Events of a video between its start and its end.")] = 8,
    lost_workers: Annotated[int, typer.Option(min=0, help="Workers that die, and come back after a minute.")] = 0,
    lost_frontends: Annotated[int, typer.Option(min=0, help="Frontends that die.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the arrivals.")] = 1,
    is_json: JsonOption = False,
) -> None:
    """Simulate an hour of a large cluster, without its devices.

    Dispatchers, database and queue are the real ones. It counts what was lost or made twice, and how long slots waited.
    """
    from kinema.bench.cluster import Plan, measure_cluster

    plan = Plan(workers, frontends, jobs, per_s, load, slots, turns, lost_workers, lost_frontends, seed)
    run(lambda: measure_cluster(plan, database, is_json=is_json))


@app.command("serve")
def serve(
    url: Annotated[str | None, typer.Option(help="A running service; its policy is its own.")] = None,
    model: Annotated[str | None, typer.Option(help="Start a service with this model: tiny-wan or fake.")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key of a running service.")] = None,
    policy: Annotated[list[str], typer.Option(help="shortest, fifo or round-robin; may be repeated.")] = [  # noqa: B006
        "shortest",
        "fifo",
    ],
    trace: Annotated[Path | None, typer.Option(help="A JSON object a line: at_s, class and body.")] = None,
    videos: Annotated[int, typer.Option(min=1, help="Number of videos, unless a trace says it.")] = 400,
    load: Annotated[float, typer.Option(min=0.01, help="Work that arrives, as a share of what the device does.")] = 0.8,
    long_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the videos that are long.")] = 0.2,
    short: Annotated[str | None, typer.Option(help="Body of the short videos, as JSON.")] = None,
    long: Annotated[str | None, typer.Option(help="Body of the long videos, as JSON.")] = None,
    slo: Annotated[float, typer.Option(min=1.0, help="Objective: at most so many times as slow as alone.")] = 3.0,
    max_active: Annotated[int, typer.Option(min=1, help="Generations that share the device.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the stream.")] = 1,
    plots: Annotated[Path | None, typer.Option(help="Folder for two plots of the simulation.")] = None,
    is_json: JsonOption = False,
) -> None:
    """Measure how long short and long videos take together.

    For each class it reports latency, slowdown, objectives met and the error of the ETA. Without --url and --model
    the stream is simulated, with the costs of Wan 2.1 1.3B on an H200.
    """
    from kinema.bench.serve import Live, Plan, make_classes, measure_serve
    from kinema.bench.workload import read_trace

    live = Live(url, model or "", api_key) if url or model else None

    def measure() -> None:
        classes = make_classes(short, long, long_share, is_live=live is not None)
        plan = Plan(classes, read_trace(trace) if trace else None, videos, load, seed, slo, max_active)
        measure_serve(plan, policy, live, plots, is_json=is_json)

    run(measure)


@app.command("engine")
def engine(
    model: Annotated[str | None, typer.Option(help="Name or folder of a checkpoint; by default tiny-wan.")] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help=f"Random weights instead, made on the device: {', '.join(ARCHITECTURES)}."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames, a multiple of 4 plus 1.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    measure_steps: Annotated[
        int | None, typer.Option(min=2, help="Run only so many of the steps, and count the others as long as these.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns it off.")] = None,
    stages: Annotated[
        str | None, typer.Option(help="Measure only these of text, denoise, decode and video; with commas.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs after a first one; the medians are shown.")] = 3,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Compare instead a step on one GPU with one that so many GPUs share.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="auto, fa3, cudnn, sdpa or fa3-fp8.")] = None,
    linears: Annotated[str | None, typer.Option(help="dtype or fp8, what large layers multiply.")] = None,
    offload: Annotated[str | None, typer.Option(help="auto, none, text or blocks: what stays off the GPU.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Take no more of the GPU, as a smaller one.")] = None,
    weights: Annotated[str | None, typer.Option(help="dtype or fp8, how large layers are kept.")] = None,
    step_cache: Annotated[
        bool | None, typer.Option("--step-cache", help="Compute half of the steps in the middle; a step is their mean.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="diffusers: its own pipeline too, on the same weights, as published and tuned.")
    ] = None,
    compile_with: Annotated[
        str, typer.Option(help="Backend of torch.compile for the tuned pipeline: inductor; eager compiles nothing.")
    ] = "inductor",
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="A step with a random LoRA of this rank on every layer of the blocks too.")
    ] = None,
    is_ablated: Annotated[bool, typer.Option("--ablate", help="A step without each of the optimisations too.")] = False,
    is_json: JsonOption = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON object to this file too.")] = None,
    config: ConfigOption = None,
) -> None:
    """Measure each stage of a video on this device.

    For each, from the prompt to the stored MP4, it reports time, TFLOP/s and their share of the device's best.
    """
    from kinema.bench.wan.engine import Choice, measure_engine

    flags: dict[str, object] = {
        "engine.model": model,
        "engine.device": device,
        "engine.wan.gpus": gpus,
        "engine.wan.attention": attention,
        "engine.wan.linears": linears,
        "engine.offload": offload,
        "engine.wan.memory_gb": memory_gb,
        "engine.weights": weights,
        "engine.wan.step_cache": step_cache,
    }
    video = {"size": size, "num_frames": frames, "num_inference_steps": steps, "guidance_scale": guidance}
    choice = Choice(model, architecture, measure_steps, stages, runs, against, is_ablated, lora_rank, compile_with)
    settings = settings_from(flags, config).settings.engine
    run(lambda: measure_engine(settings, video, choice, output, is_json=is_json))


@app.command("diffusers")
def diffusers(
    model: Annotated[str | None, typer.Option(help="Name or folder of a checkpoint.")] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help=f"Random weights instead, made on the device: {', '.join(PIPELINES)}."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns it off.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Videos after a first one; the medians are shown.")] = 3,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    offload: Annotated[
        str | None, typer.Option(help="auto, none, text, blocks or networks: what stays off the GPU.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="dtype or fp8, how the transformer is kept.")] = None,
    vae_tiling: Annotated[bool | None, typer.Option("--vae-tiling", help="Decode by tiles.")] = None,
    is_alone: Annotated[bool, typer.Option("--alone", help="Leave the library's own call out.")] = False,
    is_json: JsonOption = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON object to this file too.")] = None,
    config: ConfigOption = None,
) -> None:
    """Compare the diffusers engine with a plain call of the library.

    Both make the same video in one process. It reports the time of a step, the decode and the whole, and the memory.
    """
    from kinema.engines.registry import require_diffusers
    from kinema.errors import ConfigError

    flags: dict[str, object] = {
        "engine.name": "diffusers",
        "engine.model": model,
        "engine.device": device,
        "engine.offload": offload,
        "engine.weights": weights,
        "engine.diffusers.vae_tiling": vae_tiling,
    }
    video = {"size": size, "num_frames": frames, "num_inference_steps": steps, "guidance_scale": guidance}
    settings = settings_from(flags, config).settings.engine

    def measure() -> None:
        if (model is None) == (architecture is None):
            raise ConfigError("give one of --model and --architecture")
        require_diffusers("kinema bench diffusers")
        from kinema.bench.diffusers.overhead import measure_diffusers

        measure_diffusers(settings, video, architecture, runs, output, is_compared=not is_alone, is_json=is_json)

    run(measure)


@app.command("call")
def call(
    url: Annotated[
        str | None, typer.Option(help="A running service on this machine; by default one is started for this.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="API key of that service.")] = None,
    model: Annotated[str, typer.Option(help="Name or folder of a checkpoint, or fake.")] = "tiny-wan",
    architecture: Annotated[
        str | None,
        typer.Option(help=f"Random weights instead, written to a temporary folder: {', '.join(ARCHITECTURES)}."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    frames: Annotated[list[int] | None, typer.Option(help="Frames; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less turns it off.")] = None,
    is_base64: Annotated[bool, typer.Option("--base64", help="Get the video in the answer, not its URL.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Calls after a first one; the medians are shown.")] = 5,
    is_json: JsonOption = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON object to this file too.")] = None,
) -> None:
    """Measure a synchronous call, request to answer, part by part."""
    from kinema.bench.call import Service, measure_call

    body = {
        "size": size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "response_format": "b64_json" if is_base64 else "url",
    }
    service = Service(url, api_key, model, architecture)
    run(lambda: measure_call(service, body, frames or [], runs, output, is_json=is_json))


@app.command("start")
def start(
    model: Annotated[str, typer.Option(help="Name or folder of a checkpoint.")] = "tiny-wan",
    architecture: Annotated[
        str | None,
        typer.Option(help=f"Random weights instead, written to a temporary folder: {', '.join(ARCHITECTURES)}."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Starts after a first one; the medians are shown.")] = 3,
    is_json: JsonOption = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON object to this file too.")] = None,
) -> None:
    """Measure the seconds until a server listens and is ready.

    The first start and later ones are measured apart.
    """
    from kinema.bench.wan.start import measure_start

    run(lambda: measure_start(architecture, model, runs, output, is_json=is_json))
