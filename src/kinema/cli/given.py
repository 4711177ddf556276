"""What a person gives with a flag beyond a plain value: files, read whole, and LoRAs with their strengths.

What is in files is checked by whoever takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kinema.errors import InvalidRequest
from kinema.request.options import Given, LoraAsk

# One byte more than any input may have, so that a larger file is refused without reading all of it.
_MOST_BYTES = 128 * 1024 * 1024 + 1
_PICTURE, _FILM = "a PNG, JPEG, WebP, AVIF, GIF or HEIC file", "an MP4, MOV or WebM file"


@dataclass(frozen=True, slots=True)
class InputPaths:
    """The files of ``--image``, ``--last-frame`` and ``--video``, those of ``--control-video`` and
    ``--reference-image`` in their order, and ``--conditioning FRAME=FILE`` as typed; None for a flag that is not given.
    """

    image: Path | None = None
    last_frame: Path | None = None
    video: Path | None = None
    control_video: Sequence[Path] | None = None
    reference_images: Sequence[Path] | None = None
    conditioning: Sequence[str] | None = None

    def check_exclusive(self) -> None:
        """Raises InvalidRequest when a picture and a video are given."""
        others = {
            "--image": self.image,
            "--last-frame": self.last_frame,
            "--control-video": self.control_video,
            "--reference-image": self.reference_images,
            "--conditioning": self.conditioning,
        }
        for flag, given in others.items():
            if given and self.video is not None:
                raise InvalidRequest(f"{flag} and --video exclude each other: an edit begins with the video alone")

    def read(self) -> Given:
        """Their bytes; the video is the one to edit. Raises InvalidRequest."""
        return Given(
            image=_read(self.image, "--image", _PICTURE),
            last_frame=_read(self.last_frame, "--last-frame", _PICTURE),
            edits=_read(self.video, "--video", _FILM),
            control_video=tuple(_bytes(path, "--control-video", _FILM) for path in self.control_video or ()),
            reference_images=tuple(_bytes(path, "--reference-image", _PICTURE) for path in self.reference_images or ()),
            conditioning=tuple(sorted(map(_frame, self.conditioning or ()))),
        )


def read_loras(texts: Sequence[str]) -> tuple[LoraAsk, ...]:
    """The LoRAs of ``--lora NAME[=SCALE]``. Raises InvalidRequest."""
    return tuple(_lora(*text.partition("=")) for text in texts)


def _lora(name: str, equals: str, scale: str) -> LoraAsk:
    try:
        return LoraAsk(name=name.strip(), scale=float(scale) if equals else None)
    except ValueError as exc:
        raise InvalidRequest(f"--lora {name}={scale}: the strength is no number; give NAME or NAME=0.8") from exc


def _frame(text: str) -> tuple[int, bytes]:
    frame, _, path = text.partition("=")
    if not (frame.isascii() and frame.isdigit() and path):
        raise InvalidRequest(f"--conditioning {text}: no number of a frame with a file; give for instance 40=FILE")
    return int(frame), _bytes(Path(path), f"--conditioning {frame}", _PICTURE)


def _read(path: Path | None, flag: str, kinds: str) -> bytes | None:
    return None if path is None else _bytes(path, flag, kinds)


def _bytes(path: Path, flag: str, kinds: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as exc:
        raise InvalidRequest(f"{flag} {path}: {exc.strerror}; give {kinds}") from exc
