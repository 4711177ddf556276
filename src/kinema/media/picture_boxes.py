"""The boxes of an AVIF or HEIC: what its main picture says of itself; ISO/IEC 23008-12 and 14496-12, section 8.11."""

from __future__ import annotations

from collections.abc import Iterator

# Before the one that describes the pictures there is the list of brands, and maybe free space.
_MAX_BOXES = 4
# The size and the name of a box.
_HEAD = 8


def head_of_boxes(data: bytes) -> bytes:
    """The first bytes of an AVIF or HEIC, up to the end of the box that describes its pictures."""
    at = 0
    for _ in range(_MAX_BOXES):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        at += size
        if name == b"meta" or size < _HEAD:
            break
    return data[:at]


def main_property(data: bytes, name: bytes) -> bytes | None:
    """The first property of that name that the main picture has, without its head; the others may have their own."""
    meta = next((body for kind, body in _boxes(head_of_boxes(data)) if kind == b"meta"), b"")
    described = dict(_boxes(meta[4:]))
    parts = dict(_boxes(described.get(b"iprp", b"")))
    main = _Numbers(described.get(b"pitm", b""))
    item = main.take(4 if main.version else 2)
    properties = list(_boxes(parts.get(b"ipco", b"")))
    for place in _places(_Numbers(parts.get(b"ipma", b"")), item):
        if 1 <= place <= len(properties) and properties[place - 1][0] == name:
            return properties[place - 1][1]
    return None


class _Numbers:
    """The numbers of a box with a version and flags, one after another; behind its end all are 0."""

    def __init__(self, body: bytes) -> None:
        self._body, self._at = body, 4
        self.version, self.flags = int.from_bytes(body[:1], "big"), int.from_bytes(body[1:4], "big")

    def take(self, size: int) -> int:
        self._at += size
        return int.from_bytes(self._body[self._at - size : self._at], "big")

    @property
    def is_over(self) -> bool:
        return self._at >= len(self._body)


def _places(associations: _Numbers, wanted: int) -> Iterator[int]:
    """The places of an item's properties, from 1."""
    count, width = associations.take(4), 2 if associations.flags & 1 else 1
    while count and not associations.is_over:
        count -= 1
        item = associations.take(4 if associations.version else 2)
        for _ in range(associations.take(1)):
            place = associations.take(width) & (0x7FFF if width == 2 else 0x7F)  # the upper bit: it is essential
            if item == wanted:
                yield place


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + _HEAD <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size < _HEAD:
            return
        yield data[at + 4 : at + _HEAD], data[at + _HEAD : at + size]
        at += size
