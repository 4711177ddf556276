"""``kinema jobs``: the videos of a running service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from kinema.cli.jobs_view import coloured, print_plain, show_list, show_video, status_of, watching
from kinema.client import Client, ClientError, ConnectionFailed, EndEvent, InvalidApiKey, Video
from kinema.errors import InvalidRequest
from kinema.settings import ClientSettings
from kinema.shell import EXIT_FAILED, ConfigOption, err, fail, out, run, settings_from

app = typer.Typer(help="See to the videos of a running service.", no_args_is_help=True)

# A whole id: video_ and 32 digits.
_ID_LENGTH = 38
_SEARCHED = 1000
# A person waits at the other end: soon again, and soon given up.
_MAX_RETRIES = 2
_BACKOFF_S = 0.2

UrlOption = Annotated[str | None, typer.Option("--url", help="Address of the service.")]
KeyOption = Annotated[str | None, typer.Option("--api-key", help="API key of the service.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The video's id, or its last characters.")]
Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of videos, or their last characters.")]


class Variant(StrEnum):
    """The files of a video, and how their names end."""

    VIDEO = "video"
    THUMBNAIL = "thumbnail"
    SPRITESHEET = "spritesheet"

    @property
    def suffix(self) -> str:
        return {"video": ".mp4", "thumbnail": ".webp", "spritesheet": ".jpg"}[self.value]


@app.command("list")
def list_videos(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, the newest first.")] = 20,
    url: UrlOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Show the newest videos; into a pipe as tab-separated lines with whole ids."""
    _with_client(
        url, api_key, config, lambda client: show_list(list(islice(client.list(page_size=min(limit, 100)), limit)), out)
    )


@app.command()
def show(video_id: Id, url: UrlOption = None, api_key: KeyOption = None, config: ConfigOption = None) -> None:
    """Show everything about a video."""
    _with_client(url, api_key, config, lambda client: show_video(client.get(_whole_id(client, video_id)), out))


@app.command()
def watch(video_id: Id, url: UrlOption = None, api_key: KeyOption = None, config: ConfigOption = None) -> None:
    """Follow a video to its end; exit code 0 if it was completed, 1 if not. Ctrl-C stops watching, not the video."""

    def follow(client: Client) -> None:
        video = client.get(_whole_id(client, video_id))
        with watching(video, err) as bar:
            for event in client.events(video):
                bar.show(event)
                if isinstance(event, EndEvent):
                    video = event.video
        _end_as(video)

    _with_client(url, api_key, config, follow)


@app.command()
def events(
    video_id: Id,
    is_following: Annotated[bool, typer.Option("--follow/--no-follow", help="To the end, or what was so far.")] = True,
    url: UrlOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Print a video's events, one JSON object a line; the last one has the whole video."""

    def follow(client: Client) -> None:
        for event in client.events(_whole_id(client, video_id), is_following=is_following):
            print_plain(event.model_dump_json())

    _with_client(url, api_key, config, follow)


@app.command()
def cancel(video_ids: Ids, url: UrlOption = None, api_key: KeyOption = None, config: ConfigOption = None) -> None:
    """Stop videos; those that have ended stay as they are."""

    def stop(client: Client, video_id: str) -> None:
        video = client.cancel(video_id)
        out.print(Text(f"{video.id} "), coloured(status_of(video)), sep="")

    _with_each(video_ids, url, api_key, config, stop)


@app.command()
def delete(video_ids: Ids, url: UrlOption = None, api_key: KeyOption = None, config: ConfigOption = None) -> None:
    """Forget videos and their files; those in progress are stopped."""

    def forget(client: Client, video_id: str) -> None:
        client.delete(video_id)
        print_plain(f"{video_id} deleted")

    _with_each(video_ids, url, api_key, config, forget)


@app.command()
def download(
    video_id: Id,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where it goes; by default ./ID.mp4.")] = None,
    variant: Annotated[Variant, typer.Option(help="The video, one frame of it, or frames side by side.")] = (
        Variant.VIDEO
    ),
    url: UrlOption = None,
    api_key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Save a finished video and print its path."""

    def save(client: Client) -> None:
        whole_id = _whole_id(client, video_id)
        path = output or Path(whole_id + variant.suffix)
        try:
            client.download(whole_id, path, variant=variant.value)
        except OSError as exc:
            raise InvalidRequest(f"--output {path} cannot be written: {exc.strerror}; give another path") from exc
        print_plain(str(path.resolve()))

    _with_client(url, api_key, config, save)


def _with_client(url: str | None, api_key: str | None, config: Path | None, work: Callable[[Client], None]) -> None:
    """Run the work with a client of the service that the flags and settings mean."""
    settings = settings_from({"client.url": url, "client.api_key": api_key}, config).settings.client

    def command() -> None:
        with _explained(settings), _client(settings) as client:
            work(client)

    run(command)


def _with_each(
    video_ids: list[str], url: str | None, api_key: str | None, config: Path | None, work: Callable[[Client, str], None]
) -> None:
    """The work for each id; one that it fails for does not keep it from the others."""

    def each(client: Client) -> None:
        failures: list[ClientError | InvalidRequest] = []
        for video_id in video_ids:
            try:
                work(client, _whole_id(client, video_id))
            except ConnectionFailed:
                raise
            except (ClientError, InvalidRequest) as exc:
                failures.append(exc)
                err.print("[bold red]error:[/] ", Text(exc.message), sep="")
        if failures:
            raise typer.Exit(EXIT_FAILED)

    _with_client(url, api_key, config, each)


def _client(settings: ClientSettings) -> Client:
    key = settings.api_key.get_secret_value() if settings.api_key else None
    return Client(settings.url, api_key=key, max_retries=_MAX_RETRIES, backoff_s=_BACKOFF_S)


@contextmanager
def _explained(settings: ClientSettings) -> Iterator[None]:
    """Says what a person can do about a server that does not answer, or does not know them."""
    try:
        yield
    except ConnectionFailed as exc:
        fail(ConnectionFailed(f"{exc}; is `kinema serve` running? --url says where"))
    except InvalidApiKey as exc:
        fail(ClientError(f"{settings.url}: {exc} Here: --api-key KEY, or KINEMA_CLIENT_API_KEY."))


def _whole_id(client: Client, given: str) -> str:
    """The id that ends so, as the list shows it. Raises InvalidRequest when that is none or several."""
    if len(given) >= _ID_LENGTH or not given:
        return given
    found = [video.id for video in islice(client.list(), _SEARCHED) if video.id.endswith(given)]
    if len(found) != 1:
        how_many = "no video" if not found else f"{len(found)} videos"
        raise InvalidRequest(f"{how_many} of the newest {_SEARCHED:,} end in {given!r}; `kinema jobs list` shows them")
    return found[0]


def _end_as(video: Video) -> None:
    """Say how a video has ended, as an exit code too."""
    if video.status == "completed":
        err.print("[green]completed[/]; ", Text(f"kinema jobs download {video.id}"), " saves it", sep="")
        return
    why = "" if video.error is None or video.is_cancelled else f": {video.error.message}"
    err.print(coloured(status_of(video)), Text(why), sep="")
    raise typer.Exit(EXIT_FAILED)
