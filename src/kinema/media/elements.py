"""The elements of a WebM or Matroska file, checked against the bytes that are there before a demuxer reads them.

A demuxer keeps every element outside of the clusters, which hold the pictures, in memory: up to fifty times its bytes.
So their number is bounded, and each must fit into the element around it. Ids, sizes and the order of elements are those
of RFC 8794 (EBML) and RFC 9559 (Matroska). This file does not know what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass

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
