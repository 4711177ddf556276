"""Pictures in the form that an encoder takes (yuv420p), and in the form for people and Pillow (RGB).

The planes of a picture are one array (h * 3/2, w) uint8: the luma (h, w), then the blue and the red difference
(h/2, w/2) each, row after row. They are BT.709 with limited range, as the tags of ``mp4.py`` say.
"""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

from kinema.request.shapes import Size

UInt8Array = npt.NDArray[np.uint8]


def planes_shape(height: int, width: int) -> tuple[int, int]:
    """The shape of the planes of a picture with even height and width."""
    return height * 3 // 2, width


def check_even(width: int, height: int) -> None:
    """Raises ValueError for a size that has no planes."""
    if width < 2 or height < 2 or width % 2 or height % 2:
        raise ValueError(f"{width}x{height}: yuv420p needs an even width and height")


def check_frames(frames: UInt8Array, size: Size) -> None:
    """Raises ValueError unless they are RGB (f, h, w, 3) uint8 or planes (f, h * 3/2, w) of that size."""
    shape = (size.height, size.width, 3)
    if frames.shape[1:] not in (shape, planes_shape(size.height, size.width)) or frames.dtype != "uint8":
        raise ValueError(f"frames are {frames.shape} {frames.dtype}; expected {('f', *shape)} uint8, or its planes")


def describe(context: av.VideoCodecContext, size: Size, time_base: Fraction) -> None:
    """Tell an encoder what the planes are."""
    context.width, context.height, context.pix_fmt, context.time_base = size.width, size.height, "yuv420p", time_base
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG


def size_of(frames: UInt8Array) -> Size:
    """The size of each picture: RGB (f, h, w, 3), or planes (f, h * 3/2, w)."""
    height, width = frames.shape[1:3]
    return Size(width=width, height=height if frames.ndim == 4 else height * 2 // 3)


def to_yuv(pixels: UInt8Array, reformatter: VideoReformatter | None = None) -> av.VideoFrame:
    """Convert pixels (h, w, 3) uint8 RGB for an encoder.

    A reformatter is for pixels of one size and keeps its tables for the next frame. To make them takes 0.3 ms, and a
    frame 0.04 ms (64x64) to 1.4 ms (832x480).
    """
    return (reformatter or VideoReformatter()).reformat(
        av.VideoFrame.from_ndarray(pixels, format="rgb24"),
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        # Chroma is the mean of its four pixels: on sharp edges this is 12 dB closer than the default, and not slower.
        interpolation=Interpolation.AREA,
        threads=1,  # more of them take as long, and cores from others
    )


def as_yuv(planes: UInt8Array) -> av.VideoFrame:
    """Hand planes to an encoder without a copy."""
    frame = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(planes), format="yuv420p")
    frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
    return frame


def to_rgb(planes: UInt8Array, width: int | None = None, height: int | None = None) -> UInt8Array:
    """Convert planes to pixels (h, w, 3) uint8 RGB; in a smaller size, each pixel is the mean of those it covers."""
    frame = as_yuv(planes).reformat(
        width, height, "rgb24", dst_color_range=ColorRange.JPEG, interpolation=Interpolation.AREA
    )
    return np.asarray(frame.to_ndarray(), dtype=np.uint8)
