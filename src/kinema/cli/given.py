"""Files that a person names with a flag, read whole. What is in them is checked by whoever takes them."""

from __future__ import annotations

from pathlib import Path

from kinema.errors import InvalidRequest

# One byte more than any input may have, so that a larger file is refused without reading all of it.
_MOST_BYTES = 128 * 1024 * 1024 + 1


def read_image(path: Path | None) -> bytes | None:
    """The bytes of ``--image``. Raises InvalidRequest."""
    return None if path is None else _read(path, "--image ", "a PNG, JPEG or WebP file")


def read_video(path: Path | None) -> bytes | None:
    """The bytes of ``--video``. Raises InvalidRequest."""
    return None if path is None else _read(path, "--video ", "an MP4, MOV or WebM file")


def check_exclusive(image: Path | None, video: Path | None) -> None:
    """Raises InvalidRequest when both are given."""
    if image is not None and video is not None:
        raise InvalidRequest("--image and --video exclude each other: an edit begins with the video alone")


def _read(path: Path, flag: str, kinds: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as exc:
        raise InvalidRequest(f"{flag}{path}: {exc.strerror}; give {kinds}") from exc
