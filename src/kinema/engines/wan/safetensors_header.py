"""The header of a safetensors file, read with care and without torch: what it says is true, or the file is refused.

A file is eight bytes with the length of a header, the header (JSON: each tensor's type, shape and place) and the
tensors' bytes, one after the other without a gap. Nothing here takes memory for what a header only claims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from kinema.errors import InvalidRequest
from kinema.request.json_text import parse_file

# The size of an item of each type of the format.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
# The header of a 14B transformer has 150 kB.
_MAX_HEADER_BYTES = 16 * 2**20
_MAX_DIMENSIONS = 8
_METADATA = "__metadata__"
# What torch.load reads: a program, which is never run. How its files end, and how they begin: a zip, as torch writes it
# today, and a pickle itself.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
# The start of a file that says what it is.
START_BYTES = 64
# How begins what is found in place of any file that was not really downloaded.
_IN_PLACE = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; fetch it with `git lfs pull`",
    b"<": "a page of HTML or XML in place of the file; download the file itself",
}
# How files begin that are found under the name of weights.
_FOREIGN = {
    **_IN_PLACE,
    _ZIP: "an archive of torch.save, a pickle, which is never opened; give a safetensors file",
    b"GGUF": "a GGUF file; give it a name that ends in .gguf",
    _PICKLE: "a pickle, which is never opened; give a safetensors file",
}


class DamagedFile(ValueError):
    """A file of weights does not hold what its header says."""


@dataclass(frozen=True)
class Entry:
    """A tensor as a header names it: ``size`` bytes that begin at the byte ``start`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """``entries`` are in the order of the header, whose bytes are ``raw``."""

    entries: dict[str, Entry]
    metadata: dict[str, Any]
    raw: bytes


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins with these bytes, eight at least, is what ``torch.load`` reads."""
    return start.startswith(_ZIP) or (start.startswith(_PICKLE) and start[4:8] != bytes(4))


def in_place_of_file(start: bytes) -> str | None:
    """What lies in place of a text or a tokenizer that begins with these bytes, and what to do; None for the file."""
    return next((kind for beginning, kind in _IN_PLACE.items() if start.lstrip().startswith(beginning)), None)


def foreign_kind(start: bytes) -> str | None:
    """What a file is that begins with these bytes and is none of weights, and what to do; None when nobody knows.

    A safetensors file begins with the length of its header, of which the last four of eight bytes are 0.
    """
    if start[4:8] == bytes(4):
        return None
    return next((kind for beginning, kind in _FOREIGN.items() if start.lstrip().startswith(beginning)), None)


def read_header(path: Path) -> Header:
    """Read the header of a file. Raises OSError, or DamagedFile for one that does not describe the file's bytes."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(START_BYTES)
        length = int.from_bytes(start[:8], "little")
        if not 0 < length <= file_bytes - 8:
            raise DamagedFile(f"{path.name} is {foreign_kind(start) or 'no safetensors file, or is cut off'}")
        file.seek(8)
        if length > _MAX_HEADER_BYTES:
            raise DamagedFile(f"the header of {path.name} has {length} bytes; at most {_MAX_HEADER_BYTES} are read")
        raw = file.read(length)
    try:
        values = parse_file(raw.decode())
        if not isinstance(values, dict):
            raise DamagedFile("it is not a JSON object")
        metadata = values.pop(_METADATA, {})
        entries = {name: _entry(name, entry, 8 + length) for name, entry in values.items()}
    except (InvalidRequest, ValueError) as exc:
        raise DamagedFile(f"the header of {path.name} cannot be read: {exc}") from exc
    _check_places(path, entries, 8 + length, file_bytes)
    return Header(entries, metadata if isinstance(metadata, dict) else {}, raw)


def _entry(name: str, entry: object, data_start: int) -> Entry:
    """Raises DamagedFile for an entry that says something else than type, shape and place."""
    shown = name[:100]
    if not isinstance(entry, dict):
        raise DamagedFile(f"{shown} has no type, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise DamagedFile(f"{shown} has the type {str(dtype)[:40]!r}, which is none of {', '.join(ITEM_BYTES)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise DamagedFile(
            f"{shown} has a shape that is not a list of at most {_MAX_DIMENSIONS} whole numbers from 0 on"
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise DamagedFile(f"{shown} has data_offsets that are not two whole numbers from 0 on, the smaller one first")
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise DamagedFile(f"{shown}: {shape} of {dtype} does not take {end - start} bytes")
    return Entry(dtype, tuple(shape), data_start + start, end - start)


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_places(path: Path, entries: dict[str, Entry], data_start: int, file_bytes: int) -> None:
    """Raises DamagedFile unless the tensors fill the file from the header to its end, each byte once."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "begins behind a gap"
            raise DamagedFile(f"the header of {path.name} cannot be read: {name[:100]} {what}")
        end += entry.size
    if end != file_bytes:
        raise DamagedFile(f"{path.name} is cut off" if end > file_bytes else f"{path.name} has bytes of no tensor")
