"""H.264 packets as a fragmented MP4, which a player can play while it grows.

A head says what the video is; each fragment after it has a few pictures (a CMAF chunk, ISO/IEC 23000-19). The names,
fields and sizes of the boxes are those of ISO/IEC 14496-12 and 14496-15. The same packets give the same bytes. This
file encodes nothing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

import av

Packet: TypeAlias = "av.Packet[av.VideoStream]"

# Fragments of one track, with times of their own.
_BRANDS = b"iso6cmfc"
# The video's clock is this many times its frame rate. Some players do not like a clock of a few ticks a second.
_TICKS = 1000
_TRACK = 1
_MATRIX = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
# Shown at the usual 72 dots an inch, one picture a sample, with no name of a compressor, in 24 bits.
_SHOWN = struct.pack(">IIIH32sHh", 0x480000, 0x480000, 0, 1, b"", 24, -1)
# BT.709 in all three, limited range, as ``mp4.py`` encodes.
_COLOURS = b"nclx" + struct.pack(">HHHB", 1, 1, 1, 0)
# A picture that needs no other, and one that does.
_SYNC, _OTHER = 0x02000000, 0x01010000
_START_CODE = re.compile(rb"\x00\x00+\x01")
_SPS, _PPS = 7, 8
# Profiles below this number say nothing of chroma and depth.
_HIGH_PROFILE = 100


class Fragments:
    """The fragments of one video, in the order of its packets."""

    def __init__(self, context: av.VideoCodecContext, fps: Fraction, first: Packet) -> None:
        """``context`` is an open H.264 encoder with a global header, whose packets count frames in their times.
        ``first`` is its first packet.
        """
        self._ticks = _TICKS * fps.denominator
        # Decoding begins at 0. The first frame may be shown later than that; an edit takes this time away.
        self._began = _number(first.dts)
        waits = (_number(first.pts) - self._began) * self._ticks
        self._num_made = 0
        nals = _nals(bytes(context.extradata or b""))
        (sps,) = (nal for nal in nals if nal[0] & 31 == _SPS)
        (pps,) = (nal for nal in nals if nal[0] & 31 == _PPS)
        self.head = _head(context.width, context.height, _TICKS * fps.numerator, waits, _avcc(sps, pps))

    def make(self, packets: Sequence[Packet]) -> bytes:
        """One fragment of these packets, at least one."""
        self._num_made += 1
        start = struct.pack(">Q", (_number(packets[0].dts) - self._began) * self._ticks)
        samples = [b"".join(map(_sized, _nals(bytes(packet)))) for packet in packets]
        entries = b"".join(map(self._entry, packets, samples))
        moof = self._moof(start, len(packets), entries, 0)
        moof = self._moof(start, len(packets), entries, len(moof) + 8)
        return moof + _box(b"mdat", *samples)

    def _entry(self, packet: Packet, sample: bytes) -> bytes:
        waits = (_number(packet.pts) - _number(packet.dts)) * self._ticks
        return struct.pack(">III", len(sample), _SYNC if packet.is_keyframe else _OTHER, waits)

    def _moof(self, start: bytes, count: int, entries: bytes, data_offset: int) -> bytes:
        return _box(
            b"moof",
            _full(b"mfhd", 0, 0, struct.pack(">I", self._num_made)),
            _box(
                b"traf",
                # Offsets begin at the moof; every sample has the same duration.
                _full(b"tfhd", 0, 0x020008, struct.pack(">II", _TRACK, self._ticks)),
                _full(b"tfdt", 1, 0, start),
                # The offset of the data; of each sample its size, flags and the time from decoding to showing.
                _full(b"trun", 0, 0x000E01, struct.pack(">Ii", count, data_offset), entries),
            ),
        )


def codecs_of(head: bytes) -> str:
    """The name of the codec in a head, as ``codecs`` of a media type has it (RFC 6381)."""
    at = head.index(b"avcC") + 5
    return f"avc1.{head[at : at + 3].hex()}"


def _head(width: int, height: int, clock: int, waits: int, avcc: bytes) -> bytes:
    picture = struct.pack(">6xH16xHH", 1, width, height) + _SHOWN
    table = _box(
        b"stbl",
        _full(b"stsd", 0, 0, struct.pack(">I", 1), _box(b"avc1", picture, avcc, _box(b"colr", _COLOURS))),
        _full(b"stts", 0, 0, bytes(4)),
        _full(b"stsc", 0, 0, bytes(4)),
        _full(b"stsz", 0, 0, bytes(8)),
        _full(b"stco", 0, 0, bytes(4)),
    )
    data = _box(b"dinf", _full(b"dref", 0, 0, struct.pack(">I", 1), _full(b"url ", 0, 1)))
    media = _box(
        b"mdia",
        # 0x55c4: no language.
        _full(b"mdhd", 0, 0, struct.pack(">IIIIHH", 0, 0, clock, 0, 0x55C4, 0)),
        _full(b"hdlr", 0, 0, struct.pack(">4x4s12x", b"vide"), b"VideoHandler\0"),
        _box(b"minf", _full(b"vmhd", 0, 1, bytes(8)), data, table),
    )
    track = _full(
        *(b"tkhd", 0, 3, struct.pack(">IIIII8xhhhh", 0, 0, _TRACK, 0, 0, 0, 0, 0, 0)),
        *(_MATRIX, struct.pack(">II", width << 16, height << 16)),
    )
    movie = _full(
        *(b"mvhd", 0, 0, struct.pack(">IIIIIH10x", 0, 0, clock, 0, 0x10000, 0x100)),
        *(_MATRIX, bytes(24), struct.pack(">I", _TRACK + 1)),
    )
    edit = _box(b"edts", _full(b"elst", 0, 0, struct.pack(">IIiI", 1, 0, waits, 0x10000)))
    defaults = _box(b"mvex", _full(b"trex", 0, 0, struct.pack(">IIIII", _TRACK, 1, 0, 0, 0)))
    return _box(b"ftyp", b"iso6", bytes(4), _BRANDS) + _box(b"moov", movie, _box(b"trak", track, edit, media), defaults)


def _avcc(sps: bytes, pps: bytes) -> bytes:
    """The parameter sets, and that a length of four bytes stands before each unit."""
    high = b"\xfd\xf8\xf8\x00" if sps[1] >= _HIGH_PROFILE else b""  # 4:2:0 in 8 bits
    sets = [struct.pack(">H", len(one)) + one for one in (sps, pps)]
    return _box(b"avcC", b"\x01", sps[1:4], b"\xff\xe1", sets[0], b"\x01", sets[1], high)


def _nals(data: bytes) -> list[bytes]:
    """The units of a stream with start codes (Annex B of H.264)."""
    return [nal for nal in _START_CODE.split(data) if nal]


def _sized(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _number(time: int | None) -> int:
    assert time is not None, "an encoder gives its packets times"
    return time


def _box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def _full(name: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return _box(name, struct.pack(">I", version << 24 | flags), *parts)
