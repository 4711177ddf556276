"""What ``kinema jobs`` shows: tables for people, tab-separated lines for other programs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kinema.client import ProgressEvent, StartedEvent, Usage, Video, VideoEvent

# The last digits of an id are random: eight are enough to tell one's own videos apart.
SHORT_ID = 8
_COLOURS = {"queued": "cyan", "in_progress": "yellow", "completed": "green", "failed": "red", "cancelled": "dim"}
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def show_list(videos: Sequence[Video], out: Console) -> None:
    """A table in a terminal; elsewhere a tab-separated line for each video, with its whole id and prompt."""
    if not out.is_terminal:
        for video in videos:
            print_plain("\t".join(_plain_row(video)))
        return
    if not videos:
        out.print("[dim]no videos[/]")
        return
    now = time.time()
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for name in ("id", "status", "progress", "model", "size", "age"):
        table.add_column(name, no_wrap=True, justify="right" if name in {"progress", "age"} else "left")
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", ratio=1)
    for video in videos:
        table.add_row(*_row(video, now))
    out.print(table, soft_wrap=False)


def show_video(video: Video, out: Console) -> None:
    """Print everything about one video, a line for each fact. Lines are not broken, so that a URL can be copied."""
    for name, value in _facts(video):
        if out.is_terminal:
            out.print(Text.assemble((f"{name:<17}", "bold"), value), soft_wrap=True)
        else:
            print_plain(f"{name}\t{value.plain}")


def show_days(days: Sequence[Usage], out: Console) -> None:
    """A table in a terminal; elsewhere a tab-separated line for each day and key."""
    if not out.is_terminal:
        for one in days:
            print_plain(f"{one.day}\t{one.key or ''}\t{one.videos}\t{one.device_s}\t{one.bytes}")
        return
    if not days:
        out.print("[dim]nothing was made[/]")
        return
    table = Table("day", "key", "videos", "seconds of a device", "MB", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    for one in days:
        table.add_row(str(one.day), one.key, f"{one.videos:,}", f"{one.device_s:,.0f}", f"{one.bytes / 1e6:,.1f}")
    out.print(table)


def print_plain(line: str) -> None:
    """Print a line without any change to it."""
    typer.echo(line)


def status_of(video: Video) -> str:
    """The status, with a word of its own for a cancelled video."""
    return "cancelled" if video.is_cancelled else video.status


def coloured(status: str) -> Text:
    return Text(status, style=_COLOURS.get(status, ""))


class Watching:
    """A bar that follows a video's events."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def show(self, event: VideoEvent) -> None:
        self._bar.update(self._task, completed=event.progress, description=_news(event))


def _news(event: VideoEvent) -> str:
    if isinstance(event, ProgressEvent):
        return f"{event.stage} {event.step}/{event.total}"
    return "starting" if isinstance(event, StartedEvent) else event.type


@contextmanager
def watching(video: Video, err: Console) -> Iterator[Watching]:
    """Show a bar; it stays on the screen when the block ends."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=err) as bar:
        yield Watching(bar, bar.add_task(outlook_of(video), total=100, completed=video.progress))


def outlook_of(video: Video) -> str:
    """The status in words, the place in the queue and the time to the end."""
    return _outlook(video, status_of(video).replace("_", " "))


def _outlook(video: Video, first: str) -> str:
    """``first``, then the place in the queue and the time to the end."""
    words = [first]
    if video.queue_position is not None:
        words.append(f"number {video.queue_position} in the queue")
    if video.eta_s is not None:
        words.append(f"done in about {_span(video.eta_s)}" if video.eta_s >= 1 else "nearly done")
    return ", ".join(words)


def _row(video: Video, now: float) -> Iterator[Text]:
    yield Text(video.id[-SHORT_ID:])
    yield coloured(status_of(video))
    yield Text(f"{video.progress}%")
    yield Text(_clean(video.model))
    yield Text(video.size)
    yield Text(_span(now - video.created_at))
    yield Text(_clean(video.prompt or ""))


def _plain_row(video: Video) -> tuple[str, ...]:
    made = datetime.fromtimestamp(video.created_at, UTC).isoformat()
    return (
        video.id,
        status_of(video),
        str(video.progress),
        _clean(video.model),
        video.size,
        made,
        _clean(video.prompt or ""),
    )


def _facts(video: Video) -> Iterator[tuple[str, Text]]:
    """What is known of the video, the most interesting first."""
    yield "id", Text(video.id)
    yield "status", coloured(status_of(video))
    if video.error is not None and not video.is_cancelled:
        yield "error", Text(_clean(f"{video.error.message} ({video.error.code})"))
    if not video.is_over:
        yield "progress", Text(_outlook(video, f"{video.progress}%"))
    yield "prompt", Text(_clean(video.prompt or ""))
    if video.negative_prompt:
        yield "negative prompt", Text(_clean(video.negative_prompt))
    yield "model", Text(_clean(video.model))
    yield "video", Text(f"{video.size}, {video.seconds} s, {video.num_frames} frames at {video.fps} fps")
    yield "made with", Text(f"{video.num_inference_steps} steps, guidance {video.guidance_scale:g}, seed {video.seed}")
    if video.tier:
        yield "tier", Text(_clean(video.tier))
    if video.solver:
        yield "solver", Text(_clean(video.solver))
    if video.timesteps:
        yield "timesteps", Text(", ".join(f"{time:g}" for time in video.timesteps))
    if video.loras:
        yield "LoRAs", Text(_clean(", ".join(map(str, video.loras))))
    yield from _times(video)
    if video.remixed_from_video_id:
        yield "remix of", Text(video.remixed_from_video_id)
    if video.data and video.data[0].url:
        yield "url", Text(video.data[0].url)
    for warning in video.warnings:
        yield "note", Text(_clean(warning), style="yellow")


def _times(video: Video) -> Iterator[tuple[str, Text]]:
    yield "created", Text(_moment(video.created_at))
    if video.completed_at is not None:
        took = f" ({video.inference_time_s:.1f} s on the device)" if video.inference_time_s is not None else ""
        yield "ended", Text(_moment(video.completed_at) + took)
    if video.expires_at is not None:
        yield "kept until", Text(_moment(video.expires_at))
    if video.starred:
        yield "kept", Text("while it has its star")


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(" ")


def _span(seconds: float) -> str:
    """The time in the largest unit that is not larger than it, for instance 3 h."""
    for length, unit in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "0 s"


def _clean(text: str) -> str:
    """The text as one line, without characters that control a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
