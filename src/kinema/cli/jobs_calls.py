"""What each command of ``kinema jobs`` does: calls of the client, and what is printed of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from errno import EISDIR
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer
from rich.text import Text

from kinema.cli.given import InputPaths, read_loras
from kinema.cli.jobs_view import (
    coloured,
    outlook_of,
    print_plain,
    show_days,
    show_list,
    show_video,
    status_of,
    watching,
)
from kinema.client import BadRequest, Client, ClientError, ConnectionFailed, EndEvent, InvalidApiKey, Video
from kinema.errors import InvalidRequest
from kinema.masking import masked
from kinema.settings import ClientSettings
from kinema.shell import EXIT_FAILED, as_flags, err, fail, out, run, settings_from

# A whole id: video_ and 32 digits.
_ID_LENGTH = 38
# How many of the newest videos are searched for the end of an id.
_NUM_SEARCHED = 1000
# The list's pages are as large as the API allows.
_PAGE_SIZE = 100
# A person is waiting: try again soon, and give up soon.
_MAX_RETRIES = 2
_BACKOFF_S = 0.2
_SUFFIXES = {
    "thumbnail": ".webp",
    "spritesheet": ".jpg",
    "manifest": ".json",
    "preview": ".preview.jpg",
}


@dataclass(frozen=True)
class Service:
    """The service that the flags name; what they leave out comes from the settings."""

    url: str | None
    api_key: str | None
    config: Path | None

    def run(self, command: Callable[[Client], None]) -> None:
        """Run the command with a client of the service; errors end it with a sentence and an exit code."""
        flags: dict[str, object] = {"client.url": self.url, "client.api_key": self.api_key}
        settings = settings_from(flags, self.config).settings.client

        def connected() -> None:
            with _explained(settings), _client(settings) as client:
                command(client)

        run(connected)

    def run_each(self, video_ids: list[str], command: Callable[[Client, str], None]) -> None:
        """Run the command for each id. A video for which it fails does not stop the others."""

        def each(client: Client) -> None:
            has_failed = False
            for video_id in video_ids:
                try:
                    command(client, _whole_id(client, video_id))
                except ConnectionFailed:
                    raise
                except (ClientError, InvalidRequest) as exc:
                    has_failed = True
                    err.print("[bold red]error:[/] ", Text(exc.message), sep="")
            if has_failed:
                raise typer.Exit(EXIT_FAILED)

        self.run(each)


def create(
    service: Service,
    prompt: str,
    asked: Mapping[str, Any],
    loras: Sequence[str],
    inputs: InputPaths,
    output: Path | None,
    *,
    is_waiting: bool,
) -> None:
    """Create a video, and print its id or, with ``output``, where it was saved.

    ``asked`` has the API's fields; what is None is the model's default. ``loras`` are as typed.
    """

    def submit(client: Client) -> None:
        if output is not None:
            _check_writable(output)
        named = [ask.model_dump(exclude_none=True) for ask in read_loras(loras)]
        made = _submit(client, prompt, {**asked, "loras": named or None}, inputs)
        for warning in made.warnings:
            err.print("[yellow]note:[/] ", Text(as_flags(warning)), sep="")
        if output is None:
            print_plain(made.id)
        if output is None and not is_waiting:
            err.print(Text(f"{outlook_of(made)}; kinema jobs watch {made.id} follows it"))
            return
        ended = _follow(client, made)
        if output is not None and ended.status == "completed":
            _save(client, ended.id, output, "video")
        else:
            _end_as(ended)

    service.run(submit)


def show_newest(service: Service, limit: int, looked: Mapping[str, Any]) -> None:
    """Show up to ``limit`` videos, the newest first, all or those that are looked for."""
    given: Any = {name: value for name, value in looked.items() if value}

    def show_found(client: Client) -> None:
        found = client.list(page_size=min(limit, _PAGE_SIZE), **given)
        try:
            show_list(list(islice(found, limit)), out)
        except BadRequest as exc:
            raise InvalidRequest(exc.message) from exc

    service.run(show_found)


def show(service: Service, video_id: str) -> None:
    """Show one video."""
    service.run(lambda client: show_video(client.get(_whole_id(client, video_id)), out))


def watch(service: Service, video_id: str) -> None:
    """Follow a video to its end, and end with the exit code that tells how it ended."""
    service.run(lambda client: _end_as(_follow(client, client.get(_whole_id(client, video_id)))))


def print_events(service: Service, video_id: str, *, is_following: bool) -> None:
    """Print a video's events, one JSON object per line."""

    def follow(client: Client) -> None:
        for event in client.events(_whole_id(client, video_id), is_following=is_following):
            print_plain(event.model_dump_json())

    service.run(follow)


def cancel(service: Service, video_ids: list[str]) -> None:
    """Stop each video."""

    def stop(client: Client, video_id: str) -> None:
        video = client.cancel(video_id)
        out.print(Text(f"{video.id} "), coloured(status_of(video)), sep="")

    service.run_each(video_ids, stop)


def star(service: Service, video_ids: list[str], *, is_starred: bool) -> None:
    """Give each video a star, or take it."""

    def keep(client: Client, video_id: str) -> None:
        (client.star if is_starred else client.unstar)(video_id)
        print_plain(f"{video_id} {'starred' if is_starred else 'not starred'}")

    service.run_each(video_ids, keep)


def delete(service: Service, video_ids: list[str]) -> None:
    """Delete each video and its files."""

    def forget(client: Client, video_id: str) -> None:
        client.delete(video_id)
        print_plain(f"{video_id} deleted")

    service.run_each(video_ids, forget)


def show_usage(service: Service, first: datetime | None, last: datetime | None) -> None:
    """What the key has made on each of these days."""
    days = [None if one is None else one.date() for one in (first, last)]

    def show(client: Client) -> None:
        try:
            show_days(client.usage(*days), out)
        except BadRequest as exc:
            raise InvalidRequest(exc.message) from exc

    service.run(show)


def download(service: Service, video_id: str, output: Path | None, variant: str) -> None:
    """Save one of a video's files, by default under the video's id."""

    def save(client: Client) -> None:
        whole_id = _whole_id(client, video_id)
        _save(client, whole_id, output or Path(whole_id + _suffix(client, whole_id, variant)), variant)

    service.run(save)


def _suffix(client: Client, video_id: str, variant: str) -> str:
    return f".{client.get(video_id).output_format}" if variant == "video" else _SUFFIXES[variant]


def _submit(client: Client, prompt: str, asked: Mapping[str, Any], inputs: InputPaths) -> Video:
    """Raises InvalidRequest, so that what the service refuses is told in the words of the flags."""
    inputs.check_exclusive()
    given = inputs.read()
    options: Any = {name: value for name, value in asked.items() if value is not None}
    try:
        if given.edits is not None:
            return client.edit(given.edits, prompt, **options)
        pictures: Any = {
            "input_reference": given.image,
            "last_frame": given.last_frame,
            "control_video": given.control_video or None,
            "reference_images": given.reference_images or None,
            "conditioning": dict(given.conditioning) or None,
        }
        return client.create(prompt, **pictures, **options)
    except BadRequest as exc:
        raise InvalidRequest(exc.message) from exc


def _follow(client: Client, video: Video) -> Video:
    """Show a bar until the video has ended, and give it back as it is then."""
    with watching(video, err) as bar:
        for event in client.events(video):
            bar.show(event)
            if isinstance(event, EndEvent):
                video = event.video
    return video


def _save(client: Client, video_id: str, path: Path, variant: str) -> None:
    try:
        client.download(video_id, path, variant=variant)
    except OSError as exc:
        raise _not_writable(path, exc) from exc
    print_plain(str(path.resolve()))


def _check_writable(path: Path) -> None:
    """Refuse a path that cannot be written before a video is made for it. Raises InvalidRequest."""
    try:
        if path.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        TemporaryDirectory(dir=path.resolve().parent).cleanup()
    except OSError as exc:
        raise _not_writable(path, exc) from exc


def _not_writable(path: Path, exc: OSError) -> InvalidRequest:
    return InvalidRequest(f"--output {path} cannot be written: {exc.strerror}; give another path")


def _client(settings: ClientSettings) -> Client:
    key = settings.api_key.get_secret_value() if settings.api_key else None
    return Client(settings.url, api_key=key, max_retries=_MAX_RETRIES, backoff_s=_BACKOFF_S)


@contextmanager
def _explained(settings: ClientSettings) -> Iterator[None]:
    """Say what a person can do when the server does not answer, or does not accept the key."""
    try:
        yield
    except ConnectionFailed as exc:
        fail(ConnectionFailed(f"{exc}; is `kinema serve` running? --url gives its address"))
    except InvalidApiKey as exc:
        fail(ClientError(f"{masked(settings.url)}: {exc} Here: --api-key KEY, or KINEMA_CLIENT_API_KEY."))


def _whole_id(client: Client, given: str) -> str:
    """The id that ends with ``given``. Raises InvalidRequest when no video, or more than one, has such an id."""
    if len(given) >= _ID_LENGTH or not given:
        return given
    found = [video.id for video in islice(client.list(), _NUM_SEARCHED) if video.id.endswith(given)]
    if len(found) != 1:
        how_many = "no ids end" if not found else f"{len(found)} ids end"
        raise InvalidRequest(
            f"{how_many} in {given!r} among the newest {_NUM_SEARCHED:,} videos; `kinema jobs list` shows them"
        )
    return found[0]


def _end_as(video: Video) -> None:
    """Say how a video has ended, and exit with the code that says it too."""
    if video.status == "completed":
        err.print("[green]completed[/]; ", Text(f"kinema jobs download {video.id}"), " saves it", sep="")
        return
    why = "" if video.error is None or video.is_cancelled else f": {video.error.message}"
    err.print(coloured(status_of(video)), Text(why), sep="")
    raise typer.Exit(EXIT_FAILED)
