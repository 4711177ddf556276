"""Writes an H.264 video into an MP4 file while its frames arrive.

The file plays everywhere: yuv420p, BT.709 with limited range and a tag that says so, and the index at the front, so
that a browser can start at once. The same frames give the same bytes on every machine with the same libraries. This
file knows nothing of jobs.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import ThreadType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

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
_X264_PARAMS = "mbtree=0"


@cache
def encoder_facts() -> dict[str, str]:
    """The libraries and options that decide the bytes of a video file."""
    options = f"{_PRESET}, crf {_CRF}, {_X264_PARAMS}, {_THREADS} frames at once"
    return {"av": av.__version__, "ffmpeg": av.ffmpeg_version_info, "x264": _x264_version(), "x264 options": options}


def _x264_version() -> str:
    """The version of x264. PyAV does not have it, but x264 writes it into the first picture of a video."""
    codec = av.CodecContext.create("libx264", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 16, 16, "yuv420p", Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.zeros((24, 16), np.uint8), format="yuv420p")
    film = b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])
    found = re.search(rb"x264 - ([ -~]{1,60}?) - H", film)
    return "unknown" if found is None else found[1].decode()


class Mp4Writer:
    """Takes frames and writes them to a file at ``path``. Not for several threads at once.

    The file exists from the start, but it is a video only after ``close``.
    """

    def __init__(
        self, path: Path, *, width: int, height: int, fps: int | Fraction, metadata: Mapping[str, str] | None = None
    ) -> None:
        """``metadata`` are MP4 tags, for instance title and comment. Raises ValueError for an odd width or height."""
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
            options={"crf": _CRF, "preset": _PRESET, "x264-params": _X264_PARAMS, "flags": "+bitexact"},
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        context = self._stream.codec_context
        context.thread_type, context.thread_count = ThreadType.FRAME, _THREADS
        context.time_base = self._time_base
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG

    def add(self, frames: UInt8Array) -> None:
        """Encode frames: RGB (f, h, w, 3) uint8, or planes (f, h * 3/2, w) as in ``planes.py``.

        The encoder starts, and delays some frames until later ones have come.
        Raises ValueError for another shape or type.
        """
        if frames.shape[1:] not in (self._shape, planes_shape(*self._shape[:2])) or frames.dtype != "uint8":
            expected = ("f", *self._shape)
            raise ValueError(f"frames are {frames.shape} {frames.dtype}; expected {expected} uint8, or its planes")
        for pixels in frames:
            frame = to_yuv(pixels) if frames.ndim == 4 else as_yuv(pixels)
            frame.pts, frame.time_base = self._num_frames, self._time_base
            self._container.mux(self._stream.encode(frame))
            self._num_frames += 1

    def close(self) -> None:
        """Finish the file. Raises ValueError when no frame was added; then there is no file."""
        if not self._num_frames:
            self.abort()
            raise ValueError("a film needs at least one frame")
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abort(self) -> None:
        """Give up and remove the file. May be called after an error, and twice."""
        with contextlib.suppress(av.error.FFmpegError):  # closing writes the index, which may fail like the frames
            self._container.close()
        self._path.unlink(missing_ok=True)
