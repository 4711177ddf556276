"""The size of a picture and the shape of a film.

Without pydantic, because the process that decodes a stranger's input needs nothing else of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from kinema.errors import InvalidRequest

# A 4K frame. Larger sides of a video are typing errors, whatever the model; input images may be larger.
MAX_SIDE = 4096
# Two sides, and room for spaces and zeros around them.
_MAX_SIZE_CHARS = 100


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels. Raises ValueError when one of them is no whole number above 0."""

    width: int
    height: int

    def __post_init__(self) -> None:
        for side in (self.width, self.height):
            if not isinstance(side, int) or side <= 0:
                raise ValueError(f"a side of {side!r} pixels: must be a whole number above 0")

    @classmethod
    def parse(cls, text: str, example: Size | None = None) -> Size:
        """Read ``"WIDTHxHEIGHT"``, for instance ``"832x480"``; errors name the ``example``, a size that is made.

        Raises InvalidRequest when the text is not two whole numbers from 1 to 4096 joined by an x.
        """
        width, _, height = text.strip().lower().partition("x") if len(text) <= _MAX_SIZE_CHARS else ("", "", "")
        if not (_is_whole(width) and _is_whole(height)):
            raise InvalidRequest(
                f"size {_shorten(text)!r} is not WIDTHxHEIGHT, for instance '{example or '832x480'}'", param="size"
            )
        if not (0 < int(width) <= MAX_SIDE and 0 < int(height) <= MAX_SIDE):
            raise InvalidRequest(f"size {_shorten(text)!r}: both sides must be from 1 to {MAX_SIDE}", param="size")
        return cls(width=int(width), height=int(height))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class FilmShape:
    """The size, the number of frames, the usual frame rate and the length of a film that a client sent.

    A frame may be shown for longer than usual, so the length is not the number of frames at that rate.
    """

    size: Size
    num_frames: int
    fps: Fraction
    seconds: Fraction

    def num_frames_at(self, fps: int) -> int:
        """Return the number of frames that the film has at another rate; at least one."""
        return max(round(self.seconds * fps), 1)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."
