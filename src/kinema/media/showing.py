"""How the frames of a film are to be shown: what the file says beside their numbers, taken as players take it.

A frame is deinterlaced, cropped to its clean aperture, stretched by the shape of its pixels, brought to sRGB, laid on
white where it is transparent, and turned or mirrored, in this order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np
import numpy.typing as npt
from av.error import BlockingIOError as NotYet
from av.error import EOFError as AtEnd
from av.filter import Graph
from av.sidedata.sidedata import SideData, Type
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace

from kinema.media.colours import BT2020, PEAK_NITS, DeepArray, Encoding, to_srgb
from kinema.request.shapes import Size

UInt8Array = npt.NDArray[np.uint8]

# ITU-T H.273, table 4, and what swscale calls the same matrix.
_RGB, _UNSPECIFIED = 0, 2
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
# Players choose one of these for a video without a tag, by its height.
_HD_HEIGHT = 720
# libavutil's ``stereo3d.h`` and ``spherical.h``: what is no more than flat.
_FLAT_STEREO, _FLAT_SPHERE = 0, 4


class UnfitFrame(ValueError):
    """The text says what is wrong, as the end of a sentence about the film."""


@dataclass(frozen=True, slots=True)
class Crop:
    """Pixels that are not to be shown, at each side of the stored frame."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


@dataclass(frozen=True, slots=True)
class Showing:
    """What the container says of all frames. ``aspect`` is the width of a pixel by its height; ``is_top_first`` says
    of frames with two fields which of them comes first, and is None when the container names no fields, or when the
    frames say it themselves."""

    crop: Crop = Crop()
    aspect: Fraction = Fraction(1)
    is_top_first: bool | None = None

    def shown(self, frame: VideoFrame, size: Size | None = None) -> UInt8Array:
        """The frame (h, w, 3) uint8 sRGB as it is to be shown; with ``size``, maybe smaller, but not below twice that.

        Raises UnfitFrame.
        """
        encoding = _encoding(frame)
        width = max(round(frame.width * self.aspect), 1)
        small = 1 if encoding.is_srgb or size is None else _factor(frame, size)
        width, height = max(width // small, 1), max(frame.height // small, 1)
        kinds = ("rgb24", "rgba") if encoding.is_srgb else ("rgb48le", "rgba64le")
        rgb = frame.reformat(
            width=width,
            height=height,
            format=kinds[has_alpha(frame)],
            src_colorspace=_matrix(frame),
            dst_color_range=ColorRange.JPEG,
        )
        pixels = self._cropped(cast(DeepArray, rgb.to_ndarray()), frame)
        colours = pixels[..., :3]
        upright = cast(UInt8Array, colours) if encoding.is_srgb else to_srgb(colours, encoding)
        if has_alpha(frame):
            upright = _on_white(upright, pixels[..., 3:] / float(np.iinfo(pixels.dtype).max))
        return np.ascontiguousarray(_turned(upright, _matrix_of_display(frame)))

    def _cropped(self, pixels: DeepArray, frame: VideoFrame) -> DeepArray:
        if self.crop == Crop():
            return pixels
        height, width = pixels.shape[:2]
        x, y = Fraction(width, frame.width), Fraction(height, frame.height)
        left, right = round(self.crop.left * x), round((frame.width - self.crop.right) * x)
        top, bottom = round(self.crop.top * y), round((frame.height - self.crop.bottom) * y)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            return pixels  # players ignore one that leaves nothing
        return pixels[top:bottom, left:right]

    def size_of(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height that ``shown`` takes before it turns the frame."""
        return max(round(frame.width * self.aspect), 1), frame.height


def has_alpha(frame: VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def showing_notes(frame: VideoFrame, showing: Showing) -> Iterator[str]:
    """One sentence for each way in which the first frame of a film is not shown as it was meant."""
    if frame.interlaced_frame or showing.is_top_first is not None:
        yield "the video is interlaced; its frames were deinterlaced"
    encoding = _encoding(frame)
    if encoding.is_bright:
        yield "the video has a high dynamic range; it was tone-mapped to that of an ordinary screen"
    if has_alpha(frame):
        yield "the video is transparent; it was laid on white"
    if _number(frame, Type.STEREO3D, _FLAT_STEREO) != _FLAT_STEREO:
        yield "the video is stereoscopic; its frames were taken as they are stored, as flat pictures"
    if _number(frame, Type.SPHERICAL, _FLAT_SPHERE) != _FLAT_SPHERE:
        yield "the video is a panorama; its frames were taken as they are stored, as flat pictures"
    a, b, c, d = _matrix_of_display(frame)
    if not (a == d == 0 or b == c == 0):
        yield "the video is turned by an odd angle; it was turned by the nearest quarter of a circle"


def deinterlaced(frames: Iterator[VideoFrame], is_top_first: bool | None = None) -> Iterator[VideoFrame]:
    """The frames, one for one; those whose two halves were taken at two times are made whole.

    ``is_top_first`` is that of ``Showing``.
    """
    graph: Graph | None = None
    kind = None
    for frame in frames:
        its_kind = frame.width, frame.height, frame.format.name
        if graph is not None and its_kind != kind:
            yield from _filtered(graph, None)
            graph = None
        if graph is None and (frame.interlaced_frame or is_top_first is not None):
            graph, kind = _deinterlacer(frame, is_top_first), its_kind
        if graph is None:
            yield frame
        else:
            yield from _filtered(graph, frame)
    if graph is not None:
        yield from _filtered(graph, None)


def _deinterlacer(frame: VideoFrame, is_top_first: bool | None) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    filters = [graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")]
    if is_top_first is not None:
        filters.insert(0, graph.add("setfield", "tff" if is_top_first else "bff"))
    graph.link_nodes(source, *filters)
    graph.configure()
    return graph


def _filtered(graph: Graph, frame: VideoFrame | None) -> Iterator[VideoFrame]:
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (NotYet, AtEnd):
            return


def _encoding(frame: VideoFrame) -> Encoding:
    light = _struct(frame, Type.CONTENT_LIGHT_LEVEL, "=I")
    peak = float(light[0]) if light and 100 <= light[0] <= 10_000 else PEAK_NITS
    return Encoding.of_codes(frame.color_primaries, frame.color_trc, peak)


def _matrix(frame: VideoFrame) -> Colorspace | None:
    """Raises UnfitFrame for a matrix that swscale would take for another one."""
    code = frame.colorspace
    if code == _RGB:
        return None
    if code == _UNSPECIFIED:
        if frame.color_primaries == BT2020:
            return Colorspace.BT2020
        return Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601
    if code not in _MATRICES:
        raise UnfitFrame(f"has its colours by matrix {code} of ITU-T H.273, which is not known here")
    return _MATRICES[code]


def _factor(frame: VideoFrame, size: Size) -> int:
    sides = sorted((frame.width, frame.height)), sorted((size.width, size.height))
    return max(1, min(sides[0][0] // (2 * sides[1][1]), sides[0][1] // (2 * sides[1][1])))


def _on_white(colours: UInt8Array, alpha: npt.NDArray[np.float64]) -> UInt8Array:
    return np.rint(255 - (255.0 - colours) * alpha).astype(np.uint8)


def _matrix_of_display(frame: VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c and d of ISO/IEC 14496-12: a point (x, y) is shown at (a x + c y, b x + d y)."""
    values = _struct(frame, Type.DISPLAYMATRIX, "=9i")
    if not values:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = values
    return a, b, c, d


def _turned(pixels: UInt8Array, matrix: tuple[int, int, int, int]) -> UInt8Array:
    """The pixels by the nearest of the eight ways to turn and mirror them."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, x, y = pixels.transpose(1, 0, 2), c, b
    else:
        x, y = a, d
    return pixels[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1]


def _number(frame: VideoFrame, kind: Type, default: int) -> int:
    values = _struct(frame, kind, "=i")
    return int(values[0]) if values else default


def _struct(frame: VideoFrame, kind: Type, layout: str) -> tuple[int, ...]:
    # It is typed as one, and is a sequence of all.
    all_data = cast(Iterable[SideData], frame.side_data)
    data = next((bytes(one) for one in all_data if one.type == kind), b"")
    return struct.unpack_from(layout, data) if len(data) >= struct.calcsize(layout) else ()
