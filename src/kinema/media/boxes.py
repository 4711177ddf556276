"""The boxes of an MP4 or MOV file, checked against the bytes that are there before a demuxer reads them.

A demuxer takes memory for as many samples as a table says, and some tables need no byte for a sample: 2,600 bytes can
ask for gigabytes. So each table must fit into its box, each box into the box around it, and the number of samples is
bounded. Boxes are followed as ffmpeg follows them (libavformat/mov.c), which looks for every table in every box that
may hold others. Names, fields and sizes are those of ISO/IEC 14496-12 and Apple's QuickTime File Format. This file does
not know what the tables mean.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

# ffmpeg follows ten.
_MAX_DEPTH = 10
# Two minutes in fragments of one frame are 58,000 boxes, and as many for the sound.
_MAX_BOXES = 200_000
# Two minutes of pictures at 60 a second are 7,200, and a camera adds tracks with its own measurements. A sample takes
# some 100 bytes of a demuxer.
_MAX_SAMPLES = 100_000
# Those that are there and those that an index names. Two minutes in fragments of one frame and one of its sound are
# 13,000. A demuxer keeps up to 3 kB for a fragment.
_MAX_FRAGMENTS = 20_000
# A demuxer keeps a sample again for each edit that shows it. Cameras write one or two edits for a track.
_MAX_EDITED_SAMPLES = 1_000_000
# What a compressed header may become. The tables of 100,000 samples are 4 MB.
_MAX_HEADER_BYTES = 8 * 1024 * 1024

_HEAD = struct.Struct(">I4s")
_CLEAN_APERTURE = re.compile(rb"\x00\x00\x00\x28clap(.{32})", re.DOTALL)
_FIELDS = re.compile(rb"\x00\x00\x00\x0afiel\x02(.)", re.DOTALL)
# Which field is shown first when they are stored apart, and when their lines alternate; the others begin at the bottom.
_TOP_FIRST = {b"\x01", b"\x0e"}
_CONTAINERS = frozenset(
    (
        *(b"moov", b"mdia", b"minf", b"stbl", b"dinf", b"edts", b"udta", b"ilst", b"tref", b"gmhd"),
        *(b"mvex", b"moof", b"traf", b"mfra", b"sinf", b"schi", b"iprp", b"ipco", b"wave"),
    )
)
# ffmpeg reads a box of the first two as a header when it begins with one of the others.
_FREE, _HEADERS = (b"free", b"hoov"), (b"mvhd", b"cmov")


_SOUND = {b"soun"}


class UnfitBoxes(ValueError):
    """The text says what is wrong, as the end of a sentence about the film."""


@dataclass(frozen=True, slots=True)
class _Table:
    """The number of entries that a table says, where they start, and what they take and ask for."""

    count: int
    start: int
    bits: int = 0
    num_samples: int = 0
    num_fragments: int = 0
    num_edits: int = 0


def only_pictures(data: bytes) -> bytes:
    """The file as a demuxer may read it: checked, and with its tracks of sound marked as free space.

    Two minutes of sound may be millions of samples, which nobody needs. Everything stays at its place in the file, and
    a fragment that is cut short at its end is left out. Raises UnfitBoxes.
    """
    return _only(data, lambda handlers: handlers != _SOUND)


def only_sound(data: bytes) -> bytes:
    """The file with its tracks of anything but sound marked, checked in the same way. Raises UnfitBoxes."""
    return _only(data, lambda handlers: handlers == _SOUND)


def has_sound(data: bytes) -> bool:
    """Whether ``only_pictures`` would mark a track of sound. Raises UnfitBoxes."""
    walk = _Walk(data, lambda handlers: handlers != _SOUND)
    walk.follow(0, len(data), b"", depth=0)
    return bool(walk.left_out)


def _only(data: bytes, is_kept: Callable[[set[bytes]], bool]) -> bytes:
    """The file with the tracks marked whose handlers are not kept. Raises UnfitBoxes."""
    walk = _Walk(data, is_kept)
    walk.follow(0, len(data), b"", depth=0)
    if walk.num_samples > _MAX_SAMPLES:
        raise UnfitBoxes(f"has {walk.num_samples} samples; at most {_MAX_SAMPLES} are accepted")
    if walk.num_samples * walk.num_edits > _MAX_EDITED_SAMPLES:
        raise UnfitBoxes(f"has {walk.num_edits} edits of {walk.num_samples} samples, which is too much")
    data = data[: walk.end]
    if not walk.left_out:
        return data
    marked = bytearray(data)
    for at in walk.left_out:
        marked[at + 4 : at + 8] = b"skip"
    return bytes(marked)


def is_cut_short(data: bytes) -> bool:
    """Whether the last box goes on behind the end of the file."""
    end = max((end for _, _, end in _outermost(data)), default=0)
    return end > len(data) or (len(data) - end < 8 and any(data[end:]))


def _outermost(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The name of each box that lies in no other, where it begins, and where it says that it ends."""
    at = 0
    while at + 8 <= len(data):
        size, name = _HEAD.unpack_from(data, at)
        size = _number(data, at + 8, 8) if size == 1 else size or len(data) - at
        if size < 8:
            return
        yield name, at, at + size
        at += size


def _in_header(data: bytes, pattern: re.Pattern[bytes]) -> bytes | None:
    """What the group of the pattern matches in the header; None when there is no match, or there are different ones."""
    headers = [data[start:end] for name, start, end in _outermost(data) if name == b"moov"]
    found = {match[1] for header in headers for match in pattern.finditer(header)}
    return found.pop() if len(found) == 1 else None


def clean_aperture(data: bytes) -> tuple[Fraction, Fraction, Fraction, Fraction] | None:
    """Width, height, and how far to the right and down the middle lies, of the part of a frame that is to be shown.

    None when the file names no such part, or different ones for its tracks.
    """
    found = _in_header(data, _CLEAN_APERTURE)
    numbers = struct.unpack(">IIIIiIiI", found) if found else (0, 0)
    if not all(numbers[1::2]):
        return None
    width, height, right, down = (Fraction(*numbers[at : at + 2]) for at in (0, 2, 4, 6))
    return width, height, right, down


def is_top_first(data: bytes) -> bool | None:
    """Whether the upper field of each frame comes first; None when the file does not say that frames have fields."""
    found = _in_header(data, _FIELDS)
    return None if found is None else found in _TOP_FIRST


@dataclass(slots=True)
class _Walk:
    """The boxes that were seen so far. ``left_out`` are the places of tracks that are not kept, and not counted, and
    ``end`` is where a fragment begins that is cut short."""

    data: bytes
    # Whether a track with these handlers is kept.
    is_kept: Callable[[set[bytes]], bool]
    is_compressed: bool = False
    num_boxes: int = 0
    num_samples: int = 0
    num_fragments: int = 0
    num_edits: int = 0
    handlers: set[bytes] = field(default_factory=set)
    left_out: list[int] = field(default_factory=list)
    end: int | None = None

    def follow(self, start: int, end: int, parent: bytes, depth: int) -> None:
        """Check the boxes from ``start`` to ``end``."""
        if depth > _MAX_DEPTH:
            raise UnfitBoxes(f"has more than {_MAX_DEPTH} boxes inside each other")
        at = start
        while at + 8 <= end:
            self.num_boxes += 1
            if self.num_boxes > _MAX_BOXES or self.num_fragments > _MAX_FRAGMENTS:
                raise UnfitBoxes(f"has more than {_MAX_BOXES} boxes or {_MAX_FRAGMENTS} fragments")
            size, name = _HEAD.unpack_from(self.data, at)
            body = at + 8
            if size == 1 and body + 8 <= end:
                size, body = _number(self.data, body, 8), body + 8
            elif size == 0:
                size = end - at
            if size < body - at:
                return  # a demuxer goes no further, either
            # A file may be cut short in its pictures, and something else may follow its last box.
            if at + size > end and depth == 0 and name in _IN_FRAGMENTS:
                self.end = at
                return
            if at + size > end and (depth > 0 or name in _FOLLOWED):
                raise UnfitBoxes(f"has a box {_shown(name)} that is larger than what is around it")
            self._check(name, body, min(at + size, end), parent, depth)
            if name == b"trak" and self._is_left_out(depth):
                self.left_out.append(at)
            at += size

    def _check(self, name: bytes, body: int, end: int, parent: bytes, depth: int) -> None:
        self.num_fragments += name == b"moof"
        if name in _CONTAINERS:
            self.follow(body, end, name, depth + 1)
        elif name == b"trak":
            self._track(body, end, depth)
        elif name == b"meta":
            self.follow(_start_of_meta(self.data, body, end), end, name, depth + 1)
        elif name == b"hdlr" and parent == b"mdia":
            self.handlers.add(self.data[body + 8 : body + 12])
        elif name == b"cmov":
            self._compressed(body, end, depth)
        elif name in _TABLES:
            self._table(name, body, end)
        elif name in _FREE and self.data[body + 4 : min(body + 8, end)] in _HEADERS:
            raise UnfitBoxes("has a header in free space")

    def _track(self, body: int, end: int, depth: int) -> None:
        before = self.num_samples
        self.handlers = set()
        self.follow(body, end, b"trak", depth + 1)
        if self._is_left_out(depth):
            self.num_samples = before

    def _is_left_out(self, depth: int) -> bool:
        """Whether the track that was seen last is not kept and can be marked."""
        return depth == 1 and not self.is_compressed and not self.is_kept(self.handlers)

    def _table(self, name: bytes, body: int, end: int) -> None:
        table = _TABLES[name](self.data, body)
        if table.start + (table.count * table.bits + 7) // 8 > end:
            raise UnfitBoxes(f"has a table {_shown(name)} of {table.count} entries, which its bytes cannot hold")
        if name == b"stsd" and _TABLE_NAMES.search(self.data, body, end):
            raise UnfitBoxes("has a table among the descriptions of its samples")
        self.num_samples += table.num_samples
        self.num_fragments += table.num_fragments
        self.num_edits += table.num_edits

    def _compressed(self, body: int, end: int, depth: int) -> None:
        """Check a compressed header: a box that names the method, and a box with its size and its bytes."""
        if self.is_compressed:
            raise UnfitBoxes("has more than one compressed header")
        self.is_compressed = True
        data = body + _number(self.data, body, 4) + 8
        try:
            header = zlib.decompressobj().decompress(self.data[data + 4 : end], _MAX_HEADER_BYTES + 1)
        except zlib.error:
            raise UnfitBoxes("has a compressed header that is damaged") from None
        if max(_number(self.data, data, 4), len(header)) > _MAX_HEADER_BYTES:
            raise UnfitBoxes(f"has a compressed header of more than {_MAX_HEADER_BYTES} bytes")
        inner = _Walk(header, self.is_kept, is_compressed=True)
        inner.follow(0, len(header), b"moov", depth + 1)
        self.num_boxes += inner.num_boxes
        self.num_samples += inner.num_samples
        self.num_fragments += inner.num_fragments
        self.num_edits += inner.num_edits


def _number(data: bytes, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "big")


def _shown(name: bytes) -> str:
    return repr(name.decode("latin-1"))


def _start_of_meta(data: bytes, body: int, end: int) -> int:
    """Where the boxes of ``meta`` begin: four bytes later than in MOV files. Like ffmpeg, this looks for a ``hdlr``."""
    at = data.find(b"hdlr", body, end)
    while at != -1 and (at - body) % 4:
        at = data.find(b"hdlr", at + 1, end)
    return end if at < body + 4 else at - 4


def _listed(entry_bytes: int) -> Callable[[bytes, int], _Table]:
    """Tables with a version, flags, the number of entries, and the entries."""
    return lambda data, body: _Table(_number(data, body + 4, 4), body + 8, 8 * entry_bytes)


def _sizes(data: bytes, body: int) -> _Table:
    """``stsz``: one size for all samples, or one for each."""
    count = _number(data, body + 8, 4)
    return _Table(count, body + 12, 0 if _number(data, body + 4, 4) else 32, num_samples=count)


def _small_sizes(data: bytes, body: int) -> _Table:
    count = _number(data, body + 8, 4)
    return _Table(count, body + 12, _number(data, body + 7, 1), num_samples=count)


def _edits(data: bytes, body: int) -> _Table:
    count = _number(data, body + 4, 4)
    return _Table(count, body + 8, 160 if _number(data, body, 1) else 96, num_edits=count)


def _run(data: bytes, body: int) -> _Table:
    """``trun``: the flags say which fields each sample has; it may have none."""
    flags, count = _number(data, body + 1, 3), _number(data, body + 4, 4)
    start = body + 8 + 4 * bool(flags & 1) + 4 * bool(flags & 4)
    return _Table(count, start, 32 * (flags & 0xF00).bit_count(), num_samples=count)


def _segments(data: bytes, body: int) -> _Table:
    at = body + (30 if _number(data, body, 1) else 22)
    count = _number(data, at, 2)
    return _Table(count, at + 2, 96, num_fragments=count)


def _random_access(data: bytes, body: int) -> _Table:
    """``tfra``: a time and a place, and three numbers of one to four bytes each."""
    lengths, count = _number(data, body + 8, 4), _number(data, body + 12, 4)
    numbers = sum(1 + (lengths >> shift & 3) for shift in (0, 2, 4))
    return _Table(count, body + 16, 8 * (numbers + (16 if _number(data, body, 1) else 8)), num_fragments=count)


def _auxiliary_sizes(data: bytes, body: int) -> _Table:
    """``saiz``: one size for all samples, or one for each."""
    at = body + 4 + 8 * (_number(data, body + 1, 3) & 1)
    count = _number(data, at + 1, 4)
    return _Table(count, at + 5, 0 if _number(data, at, 1) else 8, num_samples=count)


def _auxiliary_places(data: bytes, body: int) -> _Table:
    at = body + 4 + 8 * (_number(data, body + 1, 3) & 1)
    return _Table(_number(data, at, 4), at + 4, 64 if _number(data, body, 1) else 32)


def _encrypted_samples(data: bytes, body: int) -> _Table:
    """``senc``: other boxes say how long an entry is; it may have no byte."""
    count = _number(data, body + 4, 4)
    return _Table(count, body + 8, num_samples=count)


def _groups(data: bytes, body: int) -> _Table:
    at = body + (12 if _number(data, body, 1) else 8)
    return _Table(_number(data, at, 4), at + 4, 64)


def _group_descriptions(data: bytes, body: int) -> _Table:
    at = body + 8 + 4 * min(_number(data, body, 1), 2)
    count = _number(data, at, 4)
    return _Table(count, at + 4, num_samples=count)


_TABLES: dict[bytes, Callable[[bytes, int], _Table]] = {
    b"stsd": _listed(16),
    b"stts": _listed(8),
    b"ctts": _listed(8),
    b"stss": _listed(4),
    b"stps": _listed(4),
    b"stsc": _listed(12),
    b"stco": _listed(4),
    b"co64": _listed(8),
    b"dref": _listed(12),
    b"keys": _listed(8),
    b"stsz": _sizes,
    b"stz2": _small_sizes,
    b"elst": _edits,
    b"trun": _run,
    b"sidx": _segments,
    b"tfra": _random_access,
    b"saiz": _auxiliary_sizes,
    b"saio": _auxiliary_places,
    b"senc": _encrypted_samples,
    b"sbgp": _groups,
    b"sgpd": _group_descriptions,
}
# What may be cut short at the end of a file that was written in fragments.
_IN_FRAGMENTS = frozenset((b"moof", b"mfra", b"sidx"))
_FOLLOWED = frozenset((*_CONTAINERS, *_TABLES, b"trak", b"meta", b"cmov"))
# The descriptions of samples hold boxes at places that depend on the codec. These names have no business there.
_TABLE_NAMES = re.compile(b"stts|ctts|stsc|stco|co64|stsz|stz2|elst|trun|sidx|saiz|saio|senc|sgpd|cmov|trak|moof")
