"""The flags that several commands have, each declared once. Nothing else is imported here: ``--help`` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="A bundled name, or a folder or hub name of a diffusers-format Wan checkpoint."
    ),
]
TransformerOption = Annotated[
    Path | None,
    typer.Option(
        "--transformer", metavar="FILE", help="A .safetensors or .gguf file in place of the model's own transformer."
    ),
]
ServedNameOption = Annotated[
    str | None, typer.Option("--served-name", metavar="NAME", help="What clients call the model.")
]
EngineOption = Annotated[
    str | None, typer.Option("--engine", metavar="NAME", help="auto, wan, diffusers, sglang or fake.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or one GPU, for instance cuda:1.")
]
GpusOption = Annotated[int | None, typer.Option("--gpus", metavar="NUMBER", help="GPUs that make each video together.")]
ParallelOption = Annotated[
    str | None, typer.Option("--parallel", metavar="NAME", help="How GPUs share a video: auto, cfg, ulysses or shard.")
]
LorasOption = Annotated[
    Path | None, typer.Option("--loras", metavar="FOLDER", help="Folder with LoRAs, as safetensors files.")
]
HostOption = Annotated[str | None, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")]
PortOption = Annotated[
    int | None, typer.Option("--port", metavar="NUMBER", help="Port to listen on; 0 takes a free one.")
]
DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", metavar="FOLDER", help="Folder for the database and the videos.")
]
StorageOption = Annotated[
    str | None, typer.Option("--storage", metavar="URL", help="fsspec URL for the videos, as s3://bucket/videos.")
]
DatabaseOption = Annotated[
    str | None, typer.Option("--database", metavar="URL", help="SQLAlchemy URL of the job database.")
]
DiscoveryOption = Annotated[
    str | None,
    typer.Option("--discovery", metavar="NAME", help="etcd, or file when all processes are on one machine."),
]
NamespaceOption = Annotated[
    str | None,
    typer.Option("--namespace", metavar="NAME", help="Frontends and workers of one namespace belong together."),
]
EtcdOption = Annotated[
    str | None, typer.Option("--etcd", metavar="URLS", help="Addresses of etcd, separated by commas.")
]

# What is asked of a video. The names of the API's fields are flags too.
PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help="What the video shows.")]
ImageOption = Annotated[
    Path | None,
    typer.Option(
        "--image", metavar="FILE", help="First frame of the video: a PNG, JPEG, WebP, AVIF, GIF or HEIC file."
    ),
]
LastFrameOption = Annotated[
    Path | None,
    typer.Option("--last-frame", metavar="FILE", help="Last frame, beside --image, for a model that takes it."),
]
VideoOption = Annotated[
    Path | None, typer.Option("--video", metavar="FILE", help="Video to edit by the prompt: an MP4, MOV or WebM file.")
]
ControlVideoOption = Annotated[
    list[Path] | None,
    typer.Option("--control-video", metavar="FILE", help="Film that says what is to be seen; one flag for each."),
]
ReferenceImageOption = Annotated[
    list[Path] | None,
    typer.Option("--reference-image", metavar="FILE", help="Picture of what is to be seen; one flag for each."),
]
ConditioningOption = Annotated[
    list[str] | None,
    typer.Option("--conditioning", metavar="FRAME=FILE", help="Picture of one frame, from 0; one flag for each."),
]
StrengthOption = Annotated[
    float | None,
    typer.Option("--strength", metavar="NUMBER", help="How much of --video may change: above 0, up to 1."),
]
SizeOption = Annotated[
    str | None, typer.Option("--size", metavar="WIDTHxHEIGHT", help="Size in pixels, for instance 832x480.")
]
NumFramesOption = Annotated[
    int | None,
    typer.Option("--num-frames", metavar="NUMBER", help="Number of frames; the nearest number that the model makes."),
]
SecondsOption = Annotated[
    float | None, typer.Option("--seconds", metavar="NUMBER", help="Length, when --num-frames is not given.")
]
FpsOption = Annotated[int | None, typer.Option("--fps", metavar="NUMBER", help="Frames per second.")]
StepsOption = Annotated[
    int | None, typer.Option("--steps", "--num-inference-steps", metavar="NUMBER", help="Denoising steps.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        "--guidance-scale",
        metavar="NUMBER",
        help="How closely the video follows the prompt; 1 or less turns guidance off.",
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="NAME[=SCALE]", help="A LoRA of the model, and its strength; up to four, each with its flag."
    ),
]
TierOption = Annotated[
    str | None, typer.Option("--tier", metavar="NAME", help="A tier of the model: a named set of its values and LoRAs.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="NUMBER", help="The same seed makes the same video.")]
NegativePromptOption = Annotated[
    str | None, typer.Option("--negative-prompt", metavar="TEXT", help="What the video should not show.")
]
