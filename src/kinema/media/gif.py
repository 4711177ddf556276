"""Writes an animated GIF while its frames arrive; a ``FileWriter``.

A GIF has 256 colours a frame, hundredths of a second and no sound. It repeats for ever. Its viewers get an H.264
encoding of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import av.filter

from kinema.media.file_writer import FileWriter
from kinema.media.fragments import Packet
from kinema.media.live_view import LiveView, Viewers
from kinema.media.patient_file import Repeat

_TICK = Fraction(1, 100)
# Browsers show a frame of less than two ticks for ten.
_LEAST_TICKS = 2
# Each frame has the 256 colours that fit it. Ordered dithering does not flicker where nothing moves.
_PALETTE, _DITHER = "stats_mode=single", "new=1:dither=bayer:bayer_scale=3"


def encoder_facts() -> dict[str, str]:
    """The libraries and options that decide the bytes of a file."""
    return {"av": av.__version__, "ffmpeg": av.ffmpeg_version_info, "gif options": f"{_PALETTE}, {_DITHER}"}


class GifWriter(FileWriter):
    """A ``FileWriter`` of GIF."""

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: int | Fraction,
        metadata: Mapping[str, str] | None = None,  # noqa: ARG002 - there is no place for tags
        viewers: Viewers | None = None,
        has_sound: bool = False,  # noqa: ARG002 - nor for sound
        repeat: Repeat | None = None,
    ) -> None:
        """As ``Mp4Writer``; tags and sound are left out."""
        super().__init__(path, "gif", {}, (width, height), fps, None, repeat)
        self._stream = self._container.add_stream("gif", rate=100, options={"flags": "+bitexact"})
        context = self._stream.codec_context
        context.width, context.height, context.pix_fmt, context.time_base = width, height, "pal8", _TICK
        self._graph = _colours(width, height)
        self._last = -_LEAST_TICKS
        if viewers is not None:
            self._live = LiveView(viewers, self._size, self._time_base, encodes=True)

    def _encode(self, picture: av.VideoFrame | None) -> Sequence[Packet]:
        """The picture in 256 colours, at its tick; nothing for one that comes too soon after the one before."""
        if picture is None:
            return self._stream.encode(None)
        assert picture.pts is not None, "writers number their pictures"
        tick, end = (round(number * self._time_base / _TICK) for number in (picture.pts, picture.pts + 1))
        if tick - self._last < _LEAST_TICKS:
            return []
        self._last = tick
        self._graph.push(picture)
        reduced = self._graph.vpull()
        reduced.pts, reduced.time_base = tick, _TICK
        packets = self._stream.encode(reduced)
        for packet in packets:  # of the last one; the others end where the next begins
            packet.duration = max(end - tick, _LEAST_TICKS)
        return packets


def _colours(width: int, height: int) -> av.filter.Graph:
    """Gives a picture of 256 colours for each that goes in."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("yuv420p"), time_base=_TICK)
    split, palette = graph.add("split"), graph.add("palettegen", _PALETTE)
    use, sink = graph.add("paletteuse", _DITHER), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph
