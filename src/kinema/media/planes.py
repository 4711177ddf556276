"""Pictures as an encoder takes them, yuv420p, and as people and Pillow do, RGB.

Planes of a picture are one array (h * 3/2, w) uint8: the luma (h, w), then the blue and the red difference (h/2, w/2)
each, row after row. BT.709 with limited range, as ``mp4.py`` tags a film.
"""

from __future__ import annotations

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from kinema.request.capabilities import Size

UInt8Array = npt.NDArray[np.uint8]


def planes_shape(height: int, width: int) -> tuple[int, int]:
    """Of a picture of an even height and width."""
    return height * 3 // 2, width


def size_of(frames: UInt8Array) -> Size:
    """Of each of them: RGB (f, h, w, 3), or planes (f, h * 3/2, w)."""
    height, width = frames.shape[1:3]
    return Size(width=width, height=height if frames.ndim == 4 else height * 2 // 3)


def to_yuv(pixels: UInt8Array) -> av.VideoFrame:
    """Pixels (h, w, 3) uint8 RGB for an encoder."""
    return av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        # Chroma is the mean of its four pixels: 12 dB closer on sharp edges than the default, and no slower.
        interpolation=Interpolation.AREA,
    )


def as_yuv(planes: UInt8Array) -> av.VideoFrame:
    """Planes for an encoder, in the memory where they are."""
    frame = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(planes), format="yuv420p")
    frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
    return frame


def to_rgb(planes: UInt8Array, width: int | None = None, height: int | None = None) -> UInt8Array:
    """Planes as pixels (h, w, 3) uint8 RGB; in a smaller size, when one is given, each the mean of those it covers."""
    frame = as_yuv(planes).reformat(
        width, height, "rgb24", dst_color_range=ColorRange.JPEG, interpolation=Interpolation.AREA
    )
    return np.asarray(frame.to_ndarray(), dtype=np.uint8)
