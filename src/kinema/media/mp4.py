"""Writes an H.264 video into an MP4 file while its frames arrive.

The file plays everywhere: yuv420p, BT.709 with limited range and a tag that says so, and the index at the front, so
that a browser can start at once. The same frames give the same bytes on every machine with the same libraries. Viewers
can watch the video while it is written (``live_view.py``). Sound is AAC. This file knows nothing of jobs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from av.codec.context import ThreadType

from kinema.media.file_writer import FileWriter
from kinema.media.fragments import Packet
from kinema.media.live_view import X264_PARAMS, LiveView, Viewers
from kinema.media.patient_file import Repeat
from kinema.media.planes import describe
from kinema.media.soundtrack import Soundtrack

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
# Every other frame refers to a later one. With up to three of them in a row, as this preset has it, two frames more
# wait, and x264's quick way to choose how many takes time itself: for noise on 16 cores the file is ready 70 ms after
# the last frame in place of 45. At equal PSNR the file has 10 % fewer bytes (a fast pan) to 12 % more (a slow zoom).
_FILE_PARAMS = f"{X264_PARAMS}:bframes=1:b-adapt=0"


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


class Mp4Writer(FileWriter):
    """A ``FileWriter`` of MP4."""

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: int | Fraction,
        metadata: Mapping[str, str] | None = None,
        viewers: Viewers | None = None,
        has_sound: bool = False,
        repeat: Repeat | None = None,
    ) -> None:
        """``metadata`` are tags, for instance title and comment. Raises ValueError for an odd width or height.

        If there is a viewer now, each ``add`` gives them its frames at once, in an encoding of their own; otherwise
        they get the packets of the file, as late as x264 makes them.

        ``repeat`` repeats a write that finds no space (``patient_file.py``); without it the disk's error is raised.
        """
        # The clock of the file is a multiple of the frame rate. With the usual 1/1000 s, durations would be rounded.
        options = {"movflags": "+faststart", "movie_timescale": str(1000 * Fraction(fps).numerator)}
        super().__init__(path, "mp4", options, (width, height), fps, metadata, repeat)
        self._stream = self._container.add_stream(
            "libx264",
            rate=Fraction(fps),
            options={"crf": _CRF, "preset": _PRESET, "x264-params": _FILE_PARAMS, "flags": "+bitexact"},
        )
        context = self._stream.codec_context
        context.thread_type, context.thread_count = ThreadType.FRAME, _THREADS
        describe(context, self._size, self._time_base)
        if has_sound:
            self._sound = Soundtrack(self._container, "aac", fps)
        if viewers is not None:
            self._live = LiveView(viewers, self._size, self._time_base, encodes=viewers.is_any)

    def _encode(self, picture: av.VideoFrame | None) -> Sequence[Packet]:
        packets = self._stream.encode(picture)
        if self._live is not None and not self._live.encodes:
            self._live.show(self._stream.codec_context, packets)
        return packets
