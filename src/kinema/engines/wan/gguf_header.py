"""The header of a GGUF file, read with care and without torch: what it says is true, or the file is refused.

A file is its header (values by keys, then each tensor's name, shape, type and place) and the tensors' bytes. A
quantised type has blocks: so many numbers in so many bytes. Layout: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kinema.engines.wan.safetensors_header import DamagedFile, Entry, Header, foreign_kind

MAGIC = b"GGUF"
# The types that are read, by their numbers in the format.
_TYPES = dict(
    zip(
        (0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14),
        ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        strict=True,
    )
)
# How many numbers a block of each type has, and how many bytes.
_SMALL_BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
_LARGE_BLOCKS = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
BLOCKS = {
    **{name: (1, size) for name, size in {"F32": 4, "F16": 2, "BF16": 2}.items()},
    **{name: (32, size) for name, size in _SMALL_BLOCKS.items()},
    **{name: (256, size) for name, size in _LARGE_BLOCKS.items()},
}
# A header lies within so many first bytes; that of a 14B transformer has 100 kB.
_MAX_HEADER_BYTES = 16 * 2**20
_MAX_DIMENSIONS = 8
_START_BYTES = 64
_VERSIONS = (2, 3)
_ALIGNMENT = 32
# The values' types in struct's letters, by their numbers; 8 is a text, 9 a list.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
# ComfyUI's converter keeps the shape of a tensor of more than four dimensions here.
_SHAPE_KEY = "comfy.gguf.orig_shape."


def read_gguf_header(path: Path) -> Header:
    """Read the header of a file. Raises OSError, or DamagedFile for one that does not describe the file's bytes."""
    with path.open("rb") as file:
        return _read(path, _Cursor(path.name, file, min(path.stat().st_size, _MAX_HEADER_BYTES)))


def _read(path: Path, cursor: _Cursor) -> Header:
    start = cursor.file.read(_START_BYTES)
    if start[: len(MAGIC)] != MAGIC:
        raise DamagedFile(f"{path.name} is {foreign_kind(start) or 'no GGUF file'}")
    cursor.file.seek(0)
    cursor.take(len(MAGIC))
    if (version := cursor.number("I")) not in _VERSIONS:
        raise DamagedFile(f"{path.name} has the version {version} of GGUF; 2 and 3 are read")
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    values = {cursor.text(): cursor.value() for _ in range(num_values)}
    found = [_tensor(cursor) for _ in range(num_tensors)]
    alignment = values.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
        raise DamagedFile(f"the header of {path.name} has an alignment that is no number from 1 to 65536")
    data_start = -(-cursor.place // alignment) * alignment
    entries: dict[str, Entry] = {}
    for name, shape, dtype, offset in found:
        if name in entries:
            raise DamagedFile(f"the header of {path.name} has {name[:100]} twice")
        numbers, size = BLOCKS[dtype]
        own = values.get(_SHAPE_KEY + name)
        if isinstance(own, list) and math.prod(own) == math.prod(shape):
            shape = tuple(own)  # noqa: PLW2901 - the tensor's own, of which the other is a flat form
        entries[name] = Entry(dtype, shape, data_start + offset, math.prod(shape) // numbers * size)
    _check_places(path, entries)
    cursor.file.seek(0)
    return Header(entries, values, cursor.file.read(cursor.place))


@dataclass
class _Cursor:
    """A header, read from its beginning. Raises DamagedFile at the byte ``end``."""

    name: str
    file: BinaryIO
    end: int
    place: int = 0

    def take(self, size: int) -> bytes:
        if size > self.end - self.place:
            raise DamagedFile(f"{self.name} is cut off, or its header has more than {_MAX_HEADER_BYTES // 2**20} MiB")
        self.place += size
        return self.file.read(size)

    def number(self, letter: str) -> int:
        found = self.scalar(letter)
        assert isinstance(found, int)
        return found

    def scalar(self, letter: str) -> int | float | bool:
        found: int | float | bool = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]
        return found

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self) -> object:
        """A value; None for a list of more numbers than a shape has."""
        kind = self.number("I")
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self.scalar(self._letter(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind == _TEXT:
            for _ in range(count):
                self.text()
            return None
        letter = self._letter(kind)
        if count <= _MAX_DIMENSIONS:
            return [self.scalar(letter) for _ in range(count)]
        self.take(count * struct.calcsize(f"<{letter}"))
        return None

    def _letter(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise DamagedFile(f"the header of {self.name} has a value of the type {kind}, which is not known")
        return _SCALARS[kind]


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    """A tensor's name, shape, type and place behind the header."""
    name, dimensions = cursor.text(), cursor.number("I")
    shown = f"{cursor.name}: {name[:100]}"
    if dimensions > _MAX_DIMENSIONS:
        raise DamagedFile(f"{shown} has {dimensions} dimensions; at most {_MAX_DIMENSIONS} are read")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    number, offset = cursor.number("I"), cursor.number("Q")
    if number not in _TYPES:
        raise DamagedFile(f"{shown} has the type {number} of GGUF, which is not read; give one of {', '.join(BLOCKS)}")
    in_block = BLOCKS[_TYPES[number]][0]
    if in_block > 1 and (not shape or shape[-1] % in_block):
        raise DamagedFile(f"{shown}: rows of {list(shape)} are not made of blocks of {in_block} numbers")
    return name, shape, _TYPES[number], offset


def _check_places(path: Path, entries: dict[str, Entry]) -> None:
    """Raises DamagedFile unless each tensor has bytes of its own in the file."""
    end, file_bytes = 0, path.stat().st_size
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start < end:
            raise DamagedFile(f"the header of {path.name} cannot be read: {name[:100]} overlaps the tensor before it")
        end = entry.start + entry.size
    if end > file_bytes:
        raise DamagedFile(f"{path.name} is cut off")
