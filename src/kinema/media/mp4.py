"""Writes an H.264 video into an MP4 file while its frames arrive.

The file plays everywhere: yuv420p, BT.709 with limited range and a tag that says so, and the index at the front, so
that a browser can start at once. The same frames give the same bytes on every machine with the same libraries. Viewers
can watch the video while it is written, as a fragmented MP4 (``fragments.py``). This file knows nothing of jobs.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Protocol

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import ThreadType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from kinema.media.fragments import Fragments, Packet
from kinema.media.planes import as_yuv, planes_shape, to_yuv

UInt8Array = npt.NDArray[np.uint8]

# Measured on two CPU cores at crf 18, 832x480x81 and 128x128x33: veryfast 0.48 s and 0.03 s, medium 0.83 s and 0.07 s;
# slower presets save a tenth of the bytes, but the device's own CPU work needs the cores.
_PRESET = "veryfast"
# Visually lossless for most eyes (x264's own words for 17 to 18).
_CRF = "18"
# Encode frames in parallel, not slices of one frame, which wait for the slowest slice: 832x480x81 on two cores takes
# 1.0 s instead of 1.5 s, and 5 % fewer bytes. The number is fixed because the bytes depend on it; by default it follows
# the cores. When frames come as a GPU decodes them, on 16 cores, the time from the last frame to the file is 45 to
# 65 ms, for noise 75 to 103; with eight slices 37 to 53, for noise 178 to 181. More than eight threads gain nothing.
_THREADS = 8
# x264 (core 165) reads memory that it never wrote when it propagates costs through its macroblock tree: the same frames
# gave 67 different files in 150 runs. Without the tree it also delays fewer frames.
# A lookahead in a thread of its own, and one for frame rates that vary, begin a frame five frames later; the pictures
# are the same without them. When the last frames come, less is then left to do: 46 to 60 % of the CPU time.
_X264_PARAMS = "mbtree=0:sync-lookahead=0:force-cfr=1"
# Every other frame refers to a later one. With up to three of them in a row, as this preset has it, two frames more
# wait, and x264's quick way to choose how many takes time itself: for noise on 16 cores the file is ready 70 ms after
# the last frame in place of 45. At equal PSNR the file has 10 % fewer bytes (a fast pan) to 12 % more (a slow zoom).
_FILE_PARAMS = f"{_X264_PARAMS}:bframes=1:b-adapt=0"
# These settings hold eight frames back, as x264 works on eight at once and needs one for the frame that refers to it;
# without such frames the file is a quarter larger. So viewers who wait for the first frame get an encoding of their
# own, which holds nothing back. 832x480 takes 7 ms a frame beside the 10 to 15 ms of the file, with a third more bytes
# and 1 dB less. With ultrafast it would take 4 ms, with twice the bytes and 4 dB less.
_LIVE_PRESET, _LIVE_CRF = "superfast", "20"
# Slices: frames in parallel would be held back. More than four gain nothing at these sizes.
_LIVE_THREADS = 4


@cache
def encoder_facts() -> dict[str, str]:
    """The libraries and options that decide the bytes of a video file."""
    options = f"{_PRESET}, crf {_CRF}, {_FILE_PARAMS}, {_THREADS} frames at once"
    return {"av": av.__version__, "ffmpeg": av.ffmpeg_version_info, "x264": _x264_version(), "x264 options": options}


def _x264_version() -> str:
    """The version of x264. PyAV does not have it, but x264 writes it into the first picture of a video."""
    codec = av.CodecContext.create("libx264", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 16, 16, "yuv420p", Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.zeros((24, 16), np.uint8), format="yuv420p")
    film = b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])
    found = re.search(rb"x264 - ([ -~]{1,60}?) - H", film)
    return "unknown" if found is None else found[1].decode()


class Viewers(Protocol):
    """Those who watch a video while it is made."""

    @property
    def is_any(self) -> bool:
        """Whether somebody waits for it."""

    def show(self, data: bytes) -> None:
        """Take the head or a fragment of the video. Must return soon."""


class Mp4Writer:
    """Takes frames and writes them to a file at ``path``. Not for several threads at once.

    The file exists from the start, but it is a video only after ``close``.
    """

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: int | Fraction,
        metadata: Mapping[str, str] | None = None,
        viewers: Viewers | None = None,
    ) -> None:
        """``metadata`` are MP4 tags, for instance title and comment. Raises ValueError for an odd width or height.

        ``viewers`` get the video as a fragmented MP4. If there is any now, each ``add`` gives them its frames at once,
        in an encoding of their own; otherwise they get the packets of the file, as late as x264 makes them.
        """
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"{width}x{height}: yuv420p needs an even width and height")
        self._path = path
        self._shape = (height, width, 3)
        self._time_base = 1 / Fraction(fps)
        self._num_frames = 0
        # bitexact omits library versions and dates, so that the same frames give the same bytes.
        # The clock of the file is a multiple of the frame rate. With the usual 1/1000 s, durations would be rounded.
        options = {
            "movflags": "+faststart",
            "fflags": "+bitexact",
            "movie_timescale": str(1000 * Fraction(fps).numerator),
        }
        self._container = av.open(str(path), "w", format="mp4", options=options)
        self._container.metadata.update(metadata or {})
        self._stream = self._container.add_stream(
            "libx264",
            rate=Fraction(fps),
            options={"crf": _CRF, "preset": _PRESET, "x264-params": _FILE_PARAMS, "flags": "+bitexact"},
        )
        self._context = self._stream.codec_context
        self._context.thread_type, self._context.thread_count = ThreadType.FRAME, _THREADS
        _describe(self._context, width, height, self._time_base)
        self._viewers = viewers
        self._fragments: Fragments | None = None
        self._live = _live_encoder(width, height, self._time_base) if viewers is not None and viewers.is_any else None

    def add(self, frames: UInt8Array) -> None:
        """Encode frames: RGB (f, h, w, 3) uint8, or planes (f, h * 3/2, w) as in ``planes.py``.

        The encoder starts, and delays some frames until later ones have come.
        Raises ValueError for another shape or type.
        """
        if frames.shape[1:] not in (self._shape, planes_shape(*self._shape[:2])) or frames.dtype != "uint8":
            expected = ("f", *self._shape)
            raise ValueError(f"frames are {frames.shape} {frames.dtype}; expected {expected} uint8, or its planes")
        pictures: Iterable[av.VideoFrame] = map(self._picture, frames)
        if self._live is not None:
            pictures = list(pictures)
            self._show(self._live, [packet for picture in pictures for packet in self._live.encode(picture)])
        self._write([packet for picture in pictures for packet in self._stream.encode(picture)])

    def close(self) -> None:
        """Finish the file. Raises ValueError when no frame was added; then there is no file."""
        if not self._num_frames:
            self.abort()
            raise ValueError("a film needs at least one frame")
        if self._live is not None:
            self._show(self._live, self._live.encode(None))
        self._write(self._stream.encode(None))
        self._container.close()

    def _picture(self, pixels: UInt8Array) -> av.VideoFrame:
        picture = to_yuv(pixels) if pixels.ndim == 3 else as_yuv(pixels)
        picture.pts, picture.time_base = self._num_frames, self._time_base
        self._num_frames += 1
        return picture

    def _write(self, packets: Sequence[Packet]) -> None:
        if self._live is None:
            self._show(self._context, packets)
        self._container.mux(packets)  # this takes the data out of the packets

    def _show(self, context: av.VideoCodecContext, packets: Sequence[Packet]) -> None:
        if self._viewers is None or not packets:
            return
        if self._fragments is None:
            self._fragments = Fragments(context, 1 / self._time_base, packets[0])
            self._viewers.show(self._fragments.head)
        self._viewers.show(self._fragments.make(packets))

    def abort(self) -> None:
        """Give up and remove the file. May be called after an error, and twice."""
        with contextlib.suppress(av.error.FFmpegError):  # closing writes the index, which may fail like the frames
            self._container.close()
        self._path.unlink(missing_ok=True)


def _live_encoder(width: int, height: int, time_base: Fraction) -> av.VideoCodecContext:
    """An encoder that gives a packet for each frame at once."""
    context = av.CodecContext.create("libx264", "w")
    assert isinstance(context, av.VideoCodecContext), "x264 encodes pictures"
    context.options = {
        "crf": _LIVE_CRF,
        "preset": _LIVE_PRESET,
        "tune": "zerolatency",
        "x264-params": _X264_PARAMS,
        "flags": "+bitexact+global_header",
    }
    context.thread_type, context.thread_count = ThreadType.SLICE, _LIVE_THREADS
    context.framerate = 1 / time_base
    _describe(context, width, height, time_base)
    context.open()
    return context


def _describe(context: av.VideoCodecContext, width: int, height: int, time_base: Fraction) -> None:
    context.width, context.height, context.pix_fmt, context.time_base = width, height, "yuv420p", time_base
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
