"""Writes a VP9 video with Opus sound into a WebM file while its frames arrive; a ``FileWriter``.

Its viewers always get an H.264 encoding of their own, which every browser plays while it grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
from av.codec.context import ThreadType

from kinema.media.file_writer import FileWriter
from kinema.media.fragments import Packet
from kinema.media.live_view import LiveView, Viewers
from kinema.media.patient_file import Repeat
from kinema.media.planes import describe
from kinema.media.soundtrack import Soundtrack

# Of libvpx: quality alone decides the bits; 20 is near what x264 gives at the quality of ``mp4.py``.
# Of the speeds of "good" the second fastest. Frames that are kept back are as many as ``mp4.py`` keeps.
_OPTIONS = {
    "crf": "20",
    "b": "0",
    "deadline": "good",
    "cpu-used": "4",
    "row-mt": "1",
    "lag-in-frames": "8",
    "flags": "+bitexact",
}
# The bytes do not depend on the threads, which share the rows of a frame.
_THREADS = 8


def encoder_facts() -> dict[str, str]:
    """The libraries and options that decide the bytes of a file."""
    options = ", ".join(f"{name} {value}" for name, value in _OPTIONS.items() if name != "flags")
    return {"av": av.__version__, "ffmpeg": av.ffmpeg_version_info, "vp9 options": options}


class WebmWriter(FileWriter):
    """A ``FileWriter`` of WebM."""

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
        """As ``Mp4Writer``."""
        super().__init__(path, "webm", {"cues_to_front": "1"}, (width, height), fps, metadata, repeat)
        self._stream = self._container.add_stream("libvpx-vp9", rate=Fraction(fps), options=_OPTIONS)
        context = self._stream.codec_context
        context.thread_type, context.thread_count = ThreadType.SLICE, _THREADS
        context.bit_rate = 0
        describe(context, self._size, self._time_base)
        if has_sound:
            self._sound = Soundtrack(self._container, "libopus", fps)
        if viewers is not None:
            self._live = LiveView(viewers, self._size, self._time_base, encodes=True)

    def _encode(self, picture: av.VideoFrame | None) -> Sequence[Packet]:
        return self._stream.encode(picture)
