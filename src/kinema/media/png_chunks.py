"""The chunks of a PNG: the picture, and what is said beside it.

Pillow refuses a whole file for one damaged chunk beside the picture. Browsers leave such a chunk out and show the
picture, and so it is done here: W3C PNG, third edition, sections 5.4 and 13.2.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The sizes of chunks that have only one.
_SIZES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4, b"pHYs": 9}
# The bytes of a transparent colour, by the kind of colour in the header: grey and RGB.
_CLEAR_SIZES = {0: 2, 2: 6}
# Where the header has this kind.
_COLOUR_AT = 25
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
# Pillow takes no larger text or profile.
_MAX_INFLATED = 2**20
_TEXTS = (b"zTXt", b"iTXt")
# Texts in which some programs write how a picture lies; Pillow looks for them. Nobody needs the other compressed ones.
_USED_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")


@dataclass(frozen=True, slots=True)
class CleanPng:
    """A file of one picture. ``damaged`` are the names of the chunks beside it that were left out for that reason, and
    ``is_animated`` says that there were further pictures."""

    data: bytes
    damaged: tuple[str, ...] = ()
    is_animated: bool = False


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind, the start and the size of each chunk of a PNG that is there as a whole."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            return
        yield data[at + 4 : at + 8], at + 8, size
        at += 12 + size


def cleaned(data: bytes) -> CleanPng:
    """Leave out the damaged chunks beside the picture, texts that nobody needs, and further pictures."""
    damaged: dict[str, None] = {}
    kept, start, is_animated, texts_left = [], 0, False, _MAX_INFLATED
    for kind, at, size in png_chunks(data):
        if not kind[:1].islower():  # a part of the picture
            continue
        is_animated |= kind == b"fdAT"
        is_needed = kind not in _ANIMATION
        if kind in _TEXTS:
            texts_left -= size
            is_needed = data.startswith(_USED_TEXTS, at) and texts_left > 0
        body, end = data[at : at + size] if is_needed else b"", at + size + 4
        if is_needed and _is_whole(kind, body, data[end - 4 : end]) and _fits(kind, body, data[_COLOUR_AT]):
            continue
        if is_needed:
            damaged[kind.decode("latin-1")] = None
        kept.append(data[start : at - 8])
        start = end
    return CleanPng(b"".join([*kept, data[start:]]) if kept else data, tuple(damaged), is_animated)


def _is_whole(kind: bytes, body: bytes, check: bytes) -> bool:
    is_written = zlib.crc32(body, zlib.crc32(kind)).to_bytes(4, "big") == check
    return is_written and len(body) == _SIZES.get(kind, len(body))


def _fits(kind: bytes, body: bytes, colour: int) -> bool:
    """Whether a chunk beside the picture can be used, by what its kind has in it."""
    match kind:
        case b"gAMA":
            return any(body)
        case b"cICP":  # the numbers are RGB, of the full or the narrow range
            return body[2] == 0 and body[3] <= 1
        case b"tRNS":
            return 0 < len(body) <= 256 and len(body) == _CLEAR_SIZES.get(colour, len(body))
        case b"iCCP" | b"zTXt":
            name, _, packed = body.partition(b"\0")
            return 1 <= len(name) <= 79 and packed[:1] == b"\0" and _is_packed(packed[1:])
        case b"iTXt":
            is_packed, _, text = body.partition(b"\0")[2].partition(b"\0")
            return is_packed != b"\1" or _is_packed(text.split(b"\0", 2)[-1])
    return True


def _is_packed(packed: bytes) -> bool:
    """Whether these bytes are one whole zlib stream of a size that is taken."""
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, _MAX_INFLATED)
    except zlib.error:
        return False
    return unpacker.eof
