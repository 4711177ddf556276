"""``kinema jobs``: the videos of a running service. Arguments in, one call out; ``jobs_calls.py`` has the calls."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kinema.cli import options as flag
from kinema.shell import ConfigOption, settings_from

app = typer.Typer(help="Create, follow, save and delete the videos of a running service.", no_args_is_help=True)

UrlOption = Annotated[str | None, typer.Option("--url", metavar="URL", help="Address of the service.")]
KeyOption = Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="API key for the service.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The video's id, or its last characters.")]
Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of videos, or their last characters.")]


class Variant(StrEnum):
    """The files of a video."""

    VIDEO = "video"
    THUMBNAIL = "thumbnail"
    SPRITESHEET = "spritesheet"
    MANIFEST = "manifest"
    PREVIEW = "preview"


class Status(StrEnum):
    """What a list may be asked for; failed has cancelled videos too."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Ended(StrEnum):
    """How a video ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Priority(StrEnum):
    """How soon a video is wanted."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class OutputFormat(StrEnum):
    """The kinds of files."""

    MP4 = "mp4"
    WEBM = "webm"
    GIF = "gif"


def _kind(asked: OutputFormat | None, output: Path | None) -> str | None:
    """The kind that was asked for, or that of the file to write; None for the service's own.

    Raises BadParameter for a file whose name is that of no kind of video, or of another one.
    """
    if output is None:
        return None if asked is None else asked.value
    kinds = list(OutputFormat) if asked is None else [asked]
    ending = output.suffix.lower().removeprefix(".")
    if ending not in kinds:
        endings = ", ".join(f".{kind}" for kind in kinds)
        raise typer.BadParameter(f"{output}: give a name that ends in {endings}", param_hint="--output")
    return ending


@app.command()
def create(
    prompt: flag.PromptArgument,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Wait for the video and save it to this file."),
    ] = None,
    is_waiting: Annotated[bool, typer.Option("--wait", help="Follow the video to its end.")] = False,
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
    output_format: Annotated[
        OutputFormat | None, typer.Option(help="The kind of file; default: that of --output, or mp4.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="A model that the service has.")] = None,
    priority: Annotated[Priority | None, typer.Option(help="Which videos go first; default: normal.")] = None,
    preview_every: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Make a preview after so many steps, again and again.")
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Ask the service for a video and print its id.

    With --output, print the path of the finished video instead. With --wait or --output, the exit code is 0 when the
    video was completed and 1 when it was not; Ctrl-C stops waiting, and the video goes on.
    """
    from kinema.cli import jobs_calls  # noqa: PLC0415 - imports the client, which --help does not need; so do all below
    from kinema.cli.given import InputPaths  # noqa: PLC0415

    asked = {
        "size": size,
        "num_frames": num_frames,
        "seconds": seconds,
        "fps": fps,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "strength": strength,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "tier": tier,
        "output_format": _kind(output_format, output),
        "model": model,
        "priority": None if priority is None else priority.value,
        "preview_every": preview_every,
    }
    service = jobs_calls.Service(url, api_key, config)
    inputs = InputPaths(image, last_frame, video, control_video, reference_image, conditioning)
    jobs_calls.create(service, prompt, asked, lora or [], inputs, output, is_waiting=is_waiting)


@app.command("list")
def list_videos(
    limit: Annotated[
        int, typer.Option("--limit", "-n", metavar="NUMBER", min=1, help="How many to show, the newest first.")
    ] = 20,
    status: Annotated[
        list[Status] | None, typer.Option("--status", help="Those with this status; may be repeated.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Those of this model.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Those with it in the prompt.")] = None,
    is_starred: Annotated[bool, typer.Option("--starred", help="Those with a star.")] = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Show the newest videos, all or those that are looked for.

    Into a pipe it prints a line for each: id, status, progress, model, size, time and prompt, separated by tabs.
    """
    from kinema.cli import jobs_calls  # noqa: PLC0415

    looked = {"status": [one.value for one in status or ()], "model": model, "prompt": prompt, "starred": is_starred}
    jobs_calls.show_newest(jobs_calls.Service(url, api_key, config), limit, looked)


@app.command()
def show(video_id: Id, url: UrlOption = None, api_key: KeyOption = None, config: ConfigOption = None) -> None:
    """Show everything about a video."""
    from kinema.cli import jobs_calls  # noqa: PLC0415

    jobs_calls.show(jobs_calls.Service(url, api_key, config), video_id)


@app.command()
def watch(video_id: Id, url: UrlOption = None, api_key: KeyOption = None, config: ConfigOption = None) -> None:
    """Follow a video to its end.

    The exit code is 0 when the video was completed and 1 when it was not. Ctrl-C stops watching, and the video goes on.
    """
    from kinema.cli import jobs_calls  # noqa: PLC0415

    jobs_calls.watch(jobs_calls.Service(url, api_key, config), video_id)


@app.command()
def events(
    video_id: Id,
    is_following: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Wait for further events, or print the past ones and stop.")
    ] = True,
    url: UrlOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Print a video's events as JSON, one object per line.

    The last event has the whole video.
    """
    from kinema.cli import jobs_calls  # noqa: PLC0415

    jobs_calls.print_events(jobs_calls.Service(url, api_key, config), video_id, is_following=is_following)


@app.command()
def cancel(video_ids: Ids, url: UrlOption = None, api_key: KeyOption = None, config: ConfigOption = None) -> None:
    """Stop videos; finished videos stay as they are."""
    from kinema.cli import jobs_calls  # noqa: PLC0415

    jobs_calls.cancel(jobs_calls.Service(url, api_key, config), video_ids)


@app.command()
def star(
    video_ids: Ids,
    is_taken: Annotated[bool, typer.Option("--remove", help="Take the stars away.")] = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Keep videos: while they have a star they do not expire."""
    from kinema.cli import jobs_calls  # noqa: PLC0415

    jobs_calls.star(jobs_calls.Service(url, api_key, config), video_ids, is_starred=not is_taken)


@app.command()
def delete(video_ids: Ids, url: UrlOption = None, api_key: KeyOption = None, config: ConfigOption = None) -> None:
    """Delete videos and their files; running videos are stopped."""
    from kinema.cli import jobs_calls  # noqa: PLC0415

    jobs_calls.delete(jobs_calls.Service(url, api_key, config), video_ids)


@app.command()
def usage(
    first: Annotated[
        datetime | None, typer.Option("--from", metavar="DAY", formats=["%Y-%m-%d"], help="The first day (UTC).")
    ] = None,
    last: Annotated[
        datetime | None, typer.Option("--to", metavar="DAY", formats=["%Y-%m-%d"], help="The last day (UTC).")
    ] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Show what the key has made on each day.

    By default in the last thirty days. Into a pipe it prints a line for each day and key: day, key, videos, seconds of
    a device, and bytes, separated by tabs.
    """
    from kinema.cli import jobs_calls  # noqa: PLC0415

    jobs_calls.show_usage(jobs_calls.Service(url, api_key, config), first, last)


@app.command()
def prune(
    older_than: Annotated[
        str,
        typer.Option("--older-than", metavar="TIME", help="Those that ended longer ago, for instance 36h or 30d."),
    ],
    status: Annotated[
        list[Ended] | None,
        typer.Option("--status", help="Those that ended so; may be repeated. By default all that ended."),
    ] = None,
    is_confirmed: Annotated[
        bool, typer.Option("--yes", help="Do it; without this flag the command only counts.")
    ] = False,
    data_dir: flag.DataDirOption = None,
    storage: flag.StorageOption = None,
    database: flag.DatabaseOption = None,
    config: ConfigOption = None,
) -> None:
    """Remove ended videos of all keys, with their files.

    It works on the machine of the service, and prints a line for each status: the status and the number of videos,
    separated by a tab. Without --yes nothing is removed. The service may run meanwhile: a hundred videos go in a
    transaction. `GET /v1/usage` still counts them.
    """
    from kinema.cli import prune as pruning  # noqa: PLC0415

    settings = settings_from({"data_dir": data_dir, "storage.url": storage, "jobs.database_url": database}, config)
    pruning.prune(settings.settings, older_than, [one.value for one in status or Ended], is_confirmed=is_confirmed)


@app.command()
def download(
    video_id: Id,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File to write; default: ./ID.mp4, or as its kind is."),
    ] = None,
    variant: Annotated[
        Variant,
        typer.Option(
            help="The video; one frame of it (WebP); frames side by side (JPEG); how it was made (JSON); the newest "
            "preview, also while the video is made (JPEG)."
        ),
    ] = Variant.VIDEO,
    url: UrlOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Save a file of a video and print its path."""
    from kinema.cli import jobs_calls  # noqa: PLC0415

    jobs_calls.download(jobs_calls.Service(url, api_key, config), video_id, output, variant.value)
