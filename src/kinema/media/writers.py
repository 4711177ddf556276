"""The kinds of video files that are made, by the name that requests have for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from kinema.media import gif, mp4, webm
from kinema.media.file_writer import FileWriter
from kinema.media.live_view import Viewers
from kinema.media.patient_file import Repeat
from kinema.request.formats import OutputFormat
from kinema.request.shapes import Size


@dataclass(frozen=True, slots=True)
class _Kind:
    writer: Callable[..., FileWriter]
    facts: Callable[[], dict[str, str]]


_KINDS: dict[OutputFormat, _Kind] = {
    "mp4": _Kind(mp4.Mp4Writer, mp4.encoder_facts),
    "webm": _Kind(webm.WebmWriter, webm.encoder_facts),
    "gif": _Kind(gif.GifWriter, gif.encoder_facts),
}


def open_writer(
    kind: OutputFormat,
    path: Path,
    size: Size,
    fps: int | Fraction,
    tags: Mapping[str, str],
    viewers: Viewers | None = None,
    *,
    has_sound: bool = False,
    repeat: Repeat | None = None,
) -> FileWriter:
    """Open a writer for frames of that size and rate. Its ``viewers`` get them as well, and ``repeat`` waits for
    space."""
    return _KINDS[kind].writer(
        path,
        width=size.width,
        height=size.height,
        fps=fps,
        metadata=tags,
        viewers=viewers,
        has_sound=has_sound,
        repeat=repeat,
    )


def encoder_facts(kind: OutputFormat = "mp4") -> dict[str, str]:
    """The libraries and options that decide the bytes of such a file."""
    return _KINDS[kind].facts()
