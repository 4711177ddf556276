"""AVIF and HEIC files with a gain map by ISO 21496-1: an item `tmap`, made of the picture and the map.

No library writes them, so they are put together from the boxes of two files of one picture each.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

_PICTURE, _MAP, _DERIVED = 1, 2, 3
_HIDDEN = 1
# BT.2020 in PQ, and a number of bits for each of three colours.
_BRIGHT = struct.pack(">4sHHHB", b"nclx", 9, 16, 9, 0x80)


def box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def full_box(name: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(name, struct.pack(">I", version << 24 | flags), *parts)


def with_gain_map(picture: bytes, gain_map: bytes, *, is_bright_first: bool = False) -> bytes:
    """The picture with this map. With ``is_bright_first`` the colours of the brighter picture stand before its own."""
    parts = [_item(data) for data in (picture, gain_map)]
    ratios = [struct.pack(">2I", *ratio) for ratio in ((0, 1), (2, 1), (0, 1), (2, 1), (1, 1), (1, 64), (1, 64))]
    payloads = [parts[0][2], parts[1][2], b"\0" + bytes(4) + b"\x40" + b"".join(ratios)]
    bright = [one for one in parts[0][0] if one[4:8] == b"ispe"] + [box(b"colr", _BRIGHT)]
    stored: list[bytes] = []
    uses: dict[int, list[int]] = {}
    order = {_PICTURE: (parts[0][0], parts[0][1]), _MAP: (parts[1][0], parts[1][1]), _DERIVED: (bright, [1, 2])}
    for item in (_DERIVED, _PICTURE, _MAP) if is_bright_first else order:
        properties, places = order[item]
        uses[item] = [place + len(stored) for place in places]  # the upper bit says that it is essential
        stored += properties
    kind = picture[8:12].replace(b"avif", b"av01").replace(b"heix", b"hvc1")
    names = [(_PICTURE, kind, 0), (_MAP, kind, _HIDDEN), (_DERIVED, b"tmap", 0)]
    fixed = [
        full_box(b"hdlr", bytes(4), b"pict", bytes(13)),
        full_box(b"pitm", struct.pack(">H", _PICTURE)),
        full_box(
            b"iinf",
            struct.pack(">H", len(names)),
            *(
                full_box(b"infe", struct.pack(">HH4sB", item, 0, name, 0), version=2, flags=flags)
                for item, name, flags in names
            ),
        ),
        box(
            b"iprp",
            box(b"ipco", *stored),
            full_box(
                b"ipma", struct.pack(">I", len(uses)), *(_associations(item, uses[item]) for item in sorted(uses))
            ),
        ),
        full_box(b"iref", box(b"dimg", struct.pack(">4H", _DERIVED, 2, _PICTURE, _MAP))),
        box(b"grpl", full_box(b"altr", struct.pack(">4I", 100, 2, _DERIVED, _PICTURE))),
    ]
    head = box(b"ftyp", picture[8 : int.from_bytes(picture[:4], "big")], b"tmap")
    for offset in (0, len(head) + len(full_box(b"meta", *fixed, _locations(0, payloads))) + 8):
        meta = full_box(b"meta", *fixed, _locations(offset, payloads))
    return head + meta + box(b"mdat", *payloads)


def _associations(item: int, places: Sequence[int]) -> bytes:
    return struct.pack(">HB", item, len(places)) + bytes(places)


def _locations(offset: int, payloads: Sequence[bytes]) -> bytes:
    entries = b""
    for item, payload in enumerate(payloads, 1):
        entries += struct.pack(">3H2I", item, 0, 1, offset, len(payload))
        offset += len(payload)
    return full_box(b"iloc", b"\x44\0", struct.pack(">H", len(payloads)), entries)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at : at + size]
        at += size


def _item(data: bytes) -> tuple[list[bytes], list[int], bytes]:
    """The properties of the only picture of a file, their places from 1, and its bytes."""
    boxes = dict(_boxes(data))
    described = dict(_boxes(dict(_boxes(boxes[b"meta"][12:]))[b"iprp"][8:]))
    places = described[b"ipma"][19:]
    return [whole for _, whole in _boxes(described[b"ipco"][8:])], list(places), boxes[b"mdat"][8:]
