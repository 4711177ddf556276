"""The pictures of a video that are shown before it plays: one thumbnail, and a sheet of frames from start to end.

They are made from the frames on their way to the encoder, and only small copies are kept. So a video of any length
takes little memory, and no file is read again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from PIL import Image

from kinema.media.planes import to_rgb
from kinema.request.shapes import Size

UInt8Array = npt.NDArray[np.uint8]

# Longer sides in pixels; a smaller video keeps its size. Enough for a card in a list, and for four tiles in a row.
_THUMBNAIL_SIDE = 512
_TILE_SIDE = 320
# Frames of a sheet that fill their grid: 4x4, 4x3, 3x3, 3x2, 2x2, 2x1 and 1x1.
_FULL_GRIDS = (16, 12, 9, 6, 4, 2, 1)
# Pillow's own recommendations for pictures that people look at.
_WEBP_QUALITY = 80
_JPEG_QUALITY = 85


class Previews:
    """Takes the frames of one video in order; ``num_frames`` is the expected number.

    When fewer frames come, the pictures are made from these. The work is done on threads of its own. ``thumbnail`` and
    ``spritesheet`` wait for it, and raise its errors. ``close`` ends it.
    """

    def __init__(self, size: Size, num_frames: int) -> None:
        self._size = size
        self._middle = (num_frames - 1) // 2
        self._wanted = sheet_frames(num_frames)
        self._num_seen = 0
        # The first frame, until the middle one has come.
        self._chosen: Image.Image | None = None
        self._thumbnail: Future[bytes] | None = None
        self._tiles: list[Image.Image] = []
        self._sheet: Future[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, "previews")
        self._added: list[Future[None]] = []

    def add(self, frames: UInt8Array) -> None:
        """Take the next frames: RGB (f, h, w, 3) uint8, or planes (f, h * 3/2, w) as in ``planes.py``. Returns at once,
        and needs them for a while."""
        self._added.append(self._thread.submit(self._add, frames))

    def close(self) -> None:
        """End the work. What was not asked for yet is not made."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _add(self, frames: UInt8Array) -> None:
        for pixels in frames:
            if self._num_seen in (0, self._middle):
                self._chosen = chosen = _small(pixels, self._size, _THUMBNAIL_SIDE)
                if self._num_seen == self._middle:
                    self._thumbnail = _saved_thumbnail(chosen)
            if self._num_seen in self._wanted:
                self._tiles.append(_small(pixels, self._size, _TILE_SIDE))
                if self._num_seen == self._wanted[-1]:
                    self._sheet = _saved_sheet(self._tiles)
            self._num_seen += 1

    def thumbnail(self) -> bytes:
        """The middle frame of the video as a WebP file. Raises ValueError when no frame came."""
        self._settle()
        if self._chosen is None:
            raise ValueError("a film needs at least one frame")
        if self._thumbnail is None:
            self._thumbnail = _saved_thumbnail(self._chosen)
        return self._thumbnail.result()

    def spritesheet(self) -> bytes:
        """Up to 16 frames, evenly spaced from the first to the last, in rows from the top left, as a JPEG file.

        Raises ValueError when no frame came.
        """
        self._settle()
        if not self._tiles:
            raise ValueError("a film needs at least one frame")
        if self._sheet is None:
            self._sheet = _saved_sheet(self._tiles)
        return self._sheet.result()

    def _settle(self) -> None:
        """Wait for the frames that came."""
        for added in self._added:
            added.result()


def sheet_frames(num_frames: int) -> list[int]:
    """The numbers of the frames on a video's sheet: as many as fill a grid."""
    count = next(count for count in _FULL_GRIDS if count <= num_frames)
    return [round(number * (num_frames - 1) / max(count - 1, 1)) for number in range(count)]


def _small(pixels: UInt8Array, size: Size, side: int) -> Image.Image:
    scale = min(side / max(size.width, size.height), 1.0)
    small = (max(round(size.width * scale), 1), max(round(size.height * scale), 1))
    if pixels.ndim == 2:
        # A tile of 832x480 takes 0.9 ms; through RGB, 7 ms.
        return Image.fromarray(to_rgb(pixels, *small))
    picture = Image.fromarray(pixels)
    if scale == 1.0:
        return picture.copy()  # fromarray shares, and so would keep, the memory of a whole chunk
    return picture.resize(small, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _saved_thumbnail(picture: Image.Image) -> Future[bytes]:
    return _beside(lambda: _saved(picture, "WEBP", _WEBP_QUALITY))


def _saved_sheet(tiles: list[Image.Image]) -> Future[bytes]:
    width, height = tiles[0].size
    columns = math.ceil(math.sqrt(len(tiles)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    return _beside(lambda: _saved(sheet, "JPEG", _JPEG_QUALITY))


def _beside(save: Callable[[], bytes]) -> Future[bytes]:
    """Run it on a thread of its own: a picture of noise takes a tenth of a second, and the next frames do not wait."""
    pool = ThreadPoolExecutor(1, "previews")
    made = pool.submit(save)
    pool.shutdown(wait=False)
    return made


def _saved(picture: Image.Image, kind: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=quality)
    return buffer.getvalue()
