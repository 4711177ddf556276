"""Shows a video to its viewers while its file is written: H.264 in a fragmented MP4, whatever the file is.

It has pictures alone; the sound comes with the finished file.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import av
from av.codec.context import ThreadType

from kinema.media.fragments import Fragments, Packet
from kinema.media.planes import describe
from kinema.request.shapes import Size

# The encoder of a file holds frames back, as it works on several at once. So viewers who wait for the first frame get
# an encoding of their own, which holds nothing back. 832x480 takes 7 ms a frame beside the 10 to 15 ms of the file,
# with a third more bytes and 1 dB less. With ultrafast it would take 4 ms, with twice the bytes and 4 dB less.
_PRESET, _CRF = "superfast", "20"
# Slices: frames in parallel would be held back. More than four gain nothing at these sizes.
_THREADS = 4
# x264 (core 165) reads memory that it never wrote when it propagates costs through its macroblock tree: the same frames
# gave 67 different files in 150 runs. Without the tree it also delays fewer frames.
# A lookahead in a thread of its own, and one for frame rates that vary, begin a frame five frames later; the pictures
# are the same without them. When the last frames come, less is then left to do: 46 to 60 % of the CPU time.
X264_PARAMS = "mbtree=0:sync-lookahead=0:force-cfr=1"


class Viewers(Protocol):
    """Those who watch a video while it is made."""

    @property
    def is_any(self) -> bool:
        """Whether somebody waits for it."""

    def show(self, data: bytes) -> None:
        """Take the head or a fragment of the video. Must return soon."""


class LiveView:
    """What the viewers of one video are shown.

    With ``encodes`` it makes its own packets of the pictures, and otherwise is given those of the file.
    """

    def __init__(self, viewers: Viewers, size: Size, time_base: Fraction, *, encodes: bool) -> None:
        self.encodes = encodes
        self._viewers = viewers
        self._time_base = time_base
        self._fragments: Fragments | None = None
        self._encoder = _encoder(size, time_base) if encodes else None

    def add(self, pictures: Sequence[av.VideoFrame]) -> Sequence[av.VideoFrame]:
        """Encode and show pictures, each at its time; the same are returned."""
        assert self._encoder is not None, "it encodes"
        self.show(self._encoder, [packet for picture in pictures for packet in self._encoder.encode(picture)])
        return pictures

    def show(self, context: av.VideoCodecContext, packets: Sequence[Packet]) -> None:
        """Show packets of an H.264 encoder."""
        if not packets:
            return
        if self._fragments is None:
            self._fragments = Fragments(context, 1 / self._time_base, packets[0])
            self._viewers.show(self._fragments.head)
        self._viewers.show(self._fragments.make(packets))

    def close(self) -> None:
        """Show what the encoder still holds."""
        if self._encoder is not None:
            self.show(self._encoder, self._encoder.encode(None))


def _encoder(size: Size, time_base: Fraction) -> av.VideoCodecContext:
    """An encoder that gives a packet for each frame at once."""
    context = av.CodecContext.create("libx264", "w")
    assert isinstance(context, av.VideoCodecContext), "x264 encodes pictures"
    context.options = {
        "crf": _CRF,
        "preset": _PRESET,
        "tune": "zerolatency",
        "x264-params": X264_PARAMS,
        "flags": "+bitexact+global_header",
    }
    context.thread_type, context.thread_count = ThreadType.SLICE, _THREADS
    context.framerate = 1 / time_base
    describe(context, size, time_base)
    context.open()
    return context
