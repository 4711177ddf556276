"""Video files that a client sent or that we stored: from bytes to frames of the right size and rate.

ffmpeg gets an open file and a demuxer that the first bytes choose, never a path or a playlist. So nothing in a file
can make it open another file or a URL. Only known codecs are decoded, the size is checked before a frame is
allocated, and frames come one at a time: however long a video is, only one of its frames is in memory.
"""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar, cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from kinema.errors import InvalidRequest
from kinema.media.boxes import UnfitBoxes, only_pictures
from kinema.media.elements import UnfitElements, check_elements
from kinema.media.images import cover, fit_note
from kinema.request.shapes import FilmShape, Size

UInt8Array = npt.NDArray[np.uint8]
T = TypeVar("T")

# Two minutes of 4K from a phone. Over HTTP the limit of the body applies first.
MAX_BYTES = 128 * 1024 * 1024
# A 4K frame of a cinema camera, in landscape or portrait format.
MAX_PIXELS = 4096 * 2304
# Models make only some seconds. This bounds the counting of frames, and a video that is extended again and again.
MAX_SECONDS = 120
MAX_FRAMES = 60 * MAX_SECONDS
_ACCEPTED = (
    "an MP4, MOV or WebM film of at most 128 MiB, 120 seconds and 4096x2304 pixels is accepted, "
    "in H.264, H.265, VP8, VP9, AV1, MPEG-4, ProRes or Motion JPEG"
)
_CODECS = ("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "prores", "mjpeg")
_DEMUXER_OPTIONS = {
    "codec_whitelist": ",".join(_CODECS),
    "protocol_whitelist": "none",  # in case a demuxer tries to open something itself
    "enable_drefs": "0",  # MOV files may not refer to media in other files
    "max_streams": "32",
}
# Box types that a QuickTime or MP4 file begins with; ISO/IEC 14496-12 and Apple's QuickTime File Format.
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_EBML = b"\x1a\x45\xdf\xa3"
# Part of a target frame. WebM rounds times to milliseconds, so a frame may come a little late.
_LATE = Fraction(1, 4)
# ITU-T H.273. Players choose one of these for a video without a tag, by its height.
_HD_HEIGHT = 720


@dataclass(frozen=True, slots=True)
class FittedFilm:
    """Frames (f, h, w, 3) uint8 RGB, and a sentence about the changes to them, or None when there were none."""

    frames: UInt8Array
    note: str | None


@dataclass(frozen=True, slots=True)
class InputFilm:
    """A video within the limits. ``shape`` is its shape after rotation; ``start`` is the time of its first frame.

    Every method reads the video from its beginning, and raises InvalidRequest when a frame cannot be decoded.
    """

    source: bytes | Path
    shape: FilmShape
    start: Fraction

    def frames(self, size: Size, fps: int, num_frames: int | None = None) -> Iterator[UInt8Array]:
        """Yield frames (h, w, 3) uint8 RGB: the pictures at 0, 1/fps, 2/fps ... seconds, fitted as images are.

        ``num_frames`` is their number, by default the number of frames that the video has at that rate. A video that
        ends early holds its last frame.
        """
        count = self.shape.num_frames_at(fps) if num_frames is None else num_frames
        yield from _fitted(_sampled(self._decoded(), fps, count), size)

    def fit(self, size: Size, fps: int, num_frames: int) -> FittedFilm:
        """The frames of ``frames`` in one array."""
        return fit_frames(self, size, fps, num_frames)

    def last_frame(self) -> UInt8Array:
        """The last frame (h, w, 3) uint8 RGB, in the video's own size."""
        last = deque(self._decoded(), maxlen=1)
        if not last:
            raise refused("has no frame")
        return _to_rgb(last[0][1])

    def _decoded(self) -> Iterator[tuple[Fraction, VideoFrame]]:
        """Yield every frame with its time in seconds after the first one."""
        with _opened(self.source) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if frame.pts is None or frame.time_base is None:
                    yield number / self.shape.fps, frame
                else:
                    yield frame.pts * frame.time_base - self.start, frame


class Frames(Protocol):
    """What has a shape and frames, as ``InputFilm`` has."""

    @property
    def shape(self) -> FilmShape: ...
    def frames(self, size: Size, fps: int, num_frames: int | None = None) -> Iterator[UInt8Array]: ...


def fit_frames(film: Frames, size: Size, fps: int, num_frames: int) -> FittedFilm:
    """The frames of the film at that rate in one array."""
    frames = np.empty((num_frames, size.height, size.width, 3), np.uint8)
    for number, pixels in enumerate(film.frames(size, fps, num_frames)):
        frames[number] = pixels
    return FittedFilm(frames, fit_note("video", film.shape.size, size))


def open_film(source: bytes | Path) -> InputFilm:
    """Read the times of a video and decode its first frame.

    Raises InvalidRequest for anything but an MP4, MOV or WebM video within the limits. Whatever ffmpeg raises on
    hostile bytes, the client gets one sentence.
    """
    _check_size(source)
    with _opened(source) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise refused("has no frame")
        height, width = _to_rgb(first).shape[:2]
    with _opened(source) as (container, stream):
        times, interval = _times(container, stream)
    shape = FilmShape(Size(width=width, height=height), len(times), 1 / interval)
    if shape.seconds > MAX_SECONDS:
        raise refused(f"is {float(shape.seconds):.0f} seconds long")
    return InputFilm(source, shape, times[0])


def read_comment(source: bytes | Path) -> str | None:
    """The comment tag of the file. Raises InvalidRequest as ``open_film``."""
    _check_size(source)
    with _opened(source) as (container, _stream):
        return container.metadata.get("comment")


def digest_pictures(source: Path) -> str:
    """SHA-256 of the encoded pictures, without the tags of the file. Raises InvalidRequest."""
    digest = hashlib.sha256()
    with _opened(source) as (container, stream):
        digest.update(stream.codec_context.extradata or b"")
        for packet in container.demux(stream):
            digest.update(bytes(packet))
    return digest.hexdigest()


@contextmanager
def _opened(source: bytes | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the file and its first video stream. Every error becomes one sentence for the client."""
    try:
        with _demuxer(_bytes(source)) as container:
            yield container, _first_video(container)
    except InvalidRequest:
        raise
    except (UnfitBoxes, UnfitElements) as exc:
        raise refused(str(exc)) from exc
    except Exception as exc:
        raise refused("is damaged or cannot be read") from exc


def _check_size(source: bytes | Path) -> None:
    size_bytes = source.stat().st_size if isinstance(source, Path) else len(source)
    if size_bytes > MAX_BYTES:
        raise refused(f"is {size_bytes} bytes")
    if not size_bytes:
        raise refused("is empty")


def _bytes(source: bytes | Path) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _demuxer(data: bytes) -> InputContainer:
    if data[4:8] in _MP4_BOXES:
        name, data = "mov", only_pictures(data)
    elif data.startswith(_EBML):
        check_elements(data)
        name = "matroska"
    else:
        raise refused("is not a film of a known kind")
    file = io.BytesIO(data)
    return av.open(file, "r", format=name, container_options=_DEMUXER_OPTIONS, metadata_errors="replace")


def _first_video(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:  # a cover picture
            continue
        context = stream.codec_context
        if context is None or context.name not in _CODECS:
            raise refused("is in another codec")
        if stream.width * stream.height > MAX_PIXELS:
            raise refused(f"is {stream.width}x{stream.height}")
        # The size in the header may be wrong. This limit holds for each decoded frame.
        context.options = {"max_pixels": str(MAX_PIXELS)}
        context.thread_count = 2
        return stream
    raise refused("has no pictures")


def _times(container: InputContainer, stream: VideoStream) -> tuple[list[Fraction], Fraction]:
    """When each frame is shown, in order, and the mean time between two; read from the packets, without decoding."""
    times: list[Fraction] = []
    interval = Fraction(0)
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue
        times.append(packet.pts * packet.time_base)
        interval = (packet.duration or 0) * packet.time_base
        if len(times) > MAX_FRAMES:
            raise refused(f"has more than {MAX_FRAMES} frames")
    times.sort()
    if len(times) > 1:
        interval = (times[-1] - times[0]) / (len(times) - 1)
    if interval <= 0:
        raise refused("has no times")
    return times, interval


def _sampled(decoded: Iterator[tuple[Fraction, VideoFrame]], fps: int, count: int) -> Iterator[VideoFrame]:
    """Yield the pictures at 0, 1/fps, 2/fps ... seconds, ``count`` of them."""

    def samples() -> Iterator[VideoFrame]:
        shown, number = None, 0
        for time, frame in decoded:
            while shown is not None and Fraction(number, fps) < time - _LATE / fps:
                yield shown
                number += 1
            shown = frame
        if shown is None:
            raise refused("has no frame")
        while True:
            yield shown

    return islice(samples(), count)


def _fitted(frames: Iterator[VideoFrame], size: Size) -> Iterator[UInt8Array]:
    """Yield pixels in that size. A frame that is shown several times is converted once."""
    for frame, is_new in _with_news(frames):
        if is_new:
            pixels = cover(_to_rgb(frame), size)
        yield pixels


def _with_news(items: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item, and whether it differs from the one before."""
    last: T | None = None
    for item in items:
        yield item, item is not last
        last = item


def _to_rgb(frame: VideoFrame) -> UInt8Array:
    """The upright frame (h, w, 3) uint8 RGB."""
    if frame.width * frame.height > MAX_PIXELS:
        raise refused(f"is {frame.width}x{frame.height}")
    is_tagged = frame.colorspace in (Colorspace.ITU709, Colorspace.ITU601, Colorspace.SMPTE170M, Colorspace.BT2020)
    guess = Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=frame.colorspace if is_tagged else guess,
        dst_color_range=ColorRange.JPEG,
    )
    pixels = cast(UInt8Array, rgb.to_ndarray())
    # The display matrix rotates counterclockwise, like rot90.
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))


def refused(problem: str) -> InvalidRequest:
    """The error of a film that is not accepted; the problem follows the word video."""
    return InvalidRequest(f"video {problem}; {_ACCEPTED}", param="video")
