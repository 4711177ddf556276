"""The elements of a WebM or Matroska file, checked against the bytes that are there before a demuxer reads them.

A demuxer keeps every element outside of the clusters, which hold the pictures, in memory: up to fifty times its bytes.
So their number is bounded, and each must fit into the element around it. Ids, sizes and the order of elements are those
of RFC 8794 (EBML) and RFC 9559 (Matroska). Of some that the demuxer keeps to itself this file knows what they mean.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

# An index of two minutes with an entry for each picture has 29,000; tags and chapters have some hundreds.
_MAX_KEPT = 100_000
# Two minutes of pictures and sound, each in a group of its own with three elements, are 60,000.
_MAX_ELEMENTS = 400_000
_MAX_DEPTH = 16

_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_BLOCKS = frozenset((0xA0, 0xA1, 0xA3))
_VOID = 0xEC
# A file that was cut short ends in one of these.
_CUT_SHORT = frozenset((_SEGMENT, _CLUSTER, _VOID, *_BLOCKS))
_MASTERS = frozenset(
    (
        *(_SEGMENT, _CLUSTER, 0xA0),  # the last one is a group with one block
        *(0x114D9B74, 0x4DBB),  # what is where
        *(0x1549A966, 0x6924),  # the segment
        *(0x1654AE6B, 0xAE, 0xE0, 0x55B0, 0x55D0, 0x7670, 0xE1, 0xE2, 0xE3, 0xE4, 0xE8, 0xE9),  # tracks
        *(0x6D80, 0x6240, 0x5034, 0x5035, 0x47E7, 0x6624, 0x41E4),  # how a track is packed
        *(0x1C53BB6B, 0xBB, 0xB7, 0xDB),  # the index
        *(0x1941A469, 0x61A7),  # attached files
        *(0x1043A770, 0x45B9, 0xB6, 0x80, 0x8F, 0x6944, 0x6911),  # chapters
        *(0x1254C367, 0x7373, 0x63C0, 0x67C8),  # tags
    )
)
_LEVEL_1 = frozenset((0x114D9B74, 0x1549A966, 0x1654AE6B, _CLUSTER, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367))
_INFO, _TIMESTAMP_SCALE, _DURATION = 0x1549A966, 0x2AD7B1, 0x4489
_MILLISECOND = (10**6).to_bytes(3, "big")
_TRACKS, _TRACK, _VIDEO = 0x1654AE6B, 0xAE, 0xE0
_LEFT, _TOP, _RIGHT, _BOTTOM = 0x54CC, 0x54BB, 0x54DD, 0x54AA
_WIDTH, _HEIGHT, _SHOWN_WIDTH, _SHOWN_HEIGHT, _UNIT = 0xB0, 0xBA, 0x54B0, 0x54BA, 0x54B2
# The unit of the shown size: pixels, centimetres, inches, a ratio, and not known.
_NO_UNIT = 4
_INTERLACED, _FIELD_ORDER = 0x9A, 0x9D
# By RFC 9559, section 5.1.4.1.28.2: fields stored apart, and as alternate lines.
_BOTTOM_FIRST = (6, 14)


class UnfitElements(ValueError):
    """The text says what is wrong, as the end of a sentence about the film."""


@dataclass(frozen=True, slots=True)
class _Master:
    """An element that holds others. One without a size ends where the next one of its level begins."""

    end: int
    is_in_cluster: bool = False
    has_size: bool = True


def check_elements(data: bytes) -> None:
    """Go through all elements. Raises UnfitElements."""
    around = [_Master(len(data))]
    at = num_elements = num_kept = 0
    while at < len(data):
        name, body, size = _head(data, at)
        while len(around) > 1 and (at >= around[-1].end or (name in _LEVEL_1 and not around[-1].has_size)):
            if around[-1].end > at and not around[-1].is_in_cluster:
                break  # a segment without a size goes on
            around.pop()
        num_elements += 1
        num_kept += not around[-1].is_in_cluster
        if num_elements > _MAX_ELEMENTS or num_kept > _MAX_KEPT:
            raise UnfitElements(f"has more than {_MAX_KEPT} elements, or {_MAX_ELEMENTS} with those in clusters")
        end = _end(name, body, size, around[-1].end)
        if name not in _MASTERS:
            at = end
            continue
        if len(around) > _MAX_DEPTH:
            raise UnfitElements(f"has more than {_MAX_DEPTH} elements inside each other")
        around.append(_Master(end, around[-1].is_in_cluster or name == _CLUSTER, size is not None))
        at = body


def is_cut_short(data: bytes) -> bool:
    """Whether the segment goes on behind the end of the file. ``check_elements`` has checked it."""
    at = 0
    while at < len(data):
        name, body, size = _head(data, at)
        if size is None:
            return False
        if name == _SEGMENT:
            return body + size > len(data)
        at = body + size
    return False


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a file says of its pictures. ``crop`` has the pixels at left, top, right and bottom that are not shown, and
    ``aspect`` is the width of one that is shown by its height; ``is_top_first`` is None unless frames have fields."""

    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    aspect: Fraction = Fraction(1)
    is_top_first: bool | None = None


def pictures(data: bytes) -> Pictures:
    """What is said of pictures, where all tracks of a checked file say the same."""
    tracks = _inside(data, *_first(data, _TRACKS, *_segment(data)))
    videos = [_first(data, _VIDEO, start, end) for name, start, end in tracks if name == _TRACK]
    said = {_pictures(_fields(data, *video)) for video in videos if video[0] < video[1]}
    return said.pop() if len(said) == 1 else Pictures()


def stated_seconds(data: bytes) -> Fraction | None:
    """The length that a checked file says, from time 0 to the end of its last frame or sound."""
    fields = _fields(data, *_first(data, _INFO, *_segment(data)))
    length = fields.get(_DURATION, b"")
    ticks = struct.unpack(">f" if len(length) == 4 else ">d", length)[0] if len(length) in (4, 8) else 0.0
    scale = _unsigned(fields.get(_TIMESTAMP_SCALE, _MILLISECOND))
    return Fraction(ticks) * scale / 10**9 if math.isfinite(ticks) and ticks > 0 else None


def _pictures(fields: dict[int, bytes]) -> Pictures:
    numbers = {name: _unsigned(content) for name, content in fields.items()}
    left, top, right, bottom = (numbers.get(name, 0) for name in (_LEFT, _TOP, _RIGHT, _BOTTOM))
    is_top_first = numbers.get(_FIELD_ORDER) not in _BOTTOM_FIRST if numbers.get(_INTERLACED) == 1 else None
    return Pictures((left, top, right, bottom), _aspect(numbers, left + right, top + bottom), is_top_first)


def _aspect(numbers: dict[int, int], across: int, down: int) -> Fraction:
    """By the size in which the pixels that are left are to be shown; where it is missing it is their own."""
    width, height = numbers.get(_WIDTH, 0) - across, numbers.get(_HEIGHT, 0) - down
    if width <= 0 or height <= 0 or numbers.get(_UNIT) == _NO_UNIT:
        return Fraction(1)
    shown = Fraction(numbers.get(_SHOWN_WIDTH) or width, numbers.get(_SHOWN_HEIGHT) or height)
    return shown * height / width


def _segment(data: bytes) -> tuple[int, int]:
    return _first(data, _SEGMENT, 0, len(data))


def _first(data: bytes, wanted: int, start: int, end: int) -> tuple[int, int]:
    """Where the content of the first element of that name begins and ends; both are the same when there is none."""
    return next(((at, to) for name, at, to in _inside(data, start, end) if name == wanted), (end, end))


def _fields(data: bytes, start: int, end: int) -> dict[int, bytes]:
    return {name: data[at:to] for name, at, to in _inside(data, start, end)}


def _inside(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The elements from ``start`` to ``end``: the id of each, and where its content begins and ends."""
    while start < end:
        name, body, size = _head(data, start)
        start = end if size is None else min(body + size, end)
        yield name, body, start


def _unsigned(data: bytes) -> int:
    return int.from_bytes(data[:8], "big")


def _end(name: int, body: int, size: int | None, end_around: int) -> int:
    if size is None:
        if name not in (_SEGMENT, _CLUSTER):
            raise UnfitElements(f"has an element {name:X} without a size")
        return end_around
    if body + size > end_around and name not in _CUT_SHORT:
        raise UnfitElements(f"has an element {name:X} that is larger than what is around it")
    return min(body + size, end_around)


def _head(data: bytes, at: int) -> tuple[int, int, int | None]:
    """The id of an element, where its content begins, and the size of that, or None when it does not say."""
    id_bytes = 9 - data[at].bit_length()
    size_at = at + id_bytes
    size_bytes = 9 - data[size_at].bit_length() if size_at < len(data) else 9
    if id_bytes > 4 or size_bytes > 8:
        raise UnfitElements("has an element without an id or a size")
    body = size_at + size_bytes
    mask = (1 << 7 * size_bytes) - 1
    size = int.from_bytes(data[size_at:body], "big") & mask
    return int.from_bytes(data[at:size_at], "big"), body, None if size == mask else size
