"""A header of a GGUF file is believed only where it is true, and takes no time or memory for what it claims."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest

from kinema.engines.wan.fingerprint import sample_weights
from kinema.engines.wan.gguf_header import read_gguf_header
from kinema.engines.wan.safetensors_header import DamagedFile, Entry


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def value(key: str, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def tensor(name: str, sides: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


def header(
    *tensors: bytes, values: tuple[bytes, ...] = (), version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    counted = struct.pack("<QQ", *(counts or (len(tensors), len(values))))
    return b"GGUF" + struct.pack("<I", version) + counted + b"".join([*values, *tensors])


def write(path: Path, head: bytes, data: bytes = bytes(64), alignment: int = 32) -> Path:
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path


def test_a_true_header_is_read(tmp_path: Path) -> None:
    """Values of each kind are passed over, shapes are turned round, and places begin at the alignment."""
    values = (
        value("general.name", 8, text("wan")),
        value("list", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
        value("numbers", 9, struct.pack("<IQ9H", 2, 9, *range(9))),
        value("rate", 12, struct.pack("<d", 0.5)),
        value("general.alignment", 4, struct.pack("<I", 64)),
        value("comfy.gguf.orig_shape.c", 9, struct.pack("<IQ3i", 5, 3, 2, 1, 2)),
    )
    head = header(
        tensor("a", (3, 2)), tensor("b", (32, 1), kind=8, offset=64), tensor("c", (4,), offset=128), values=values
    )
    path = write(tmp_path / "a.gguf", head, bytes(range(144)), alignment=64)
    found, start = read_gguf_header(path), -(-len(head) // 64) * 64
    assert found.entries == {
        "a": Entry("F32", (2, 3), start, 24),
        "b": Entry("Q8_0", (1, 32), start + 64, 34),
        "c": Entry("F32", (2, 1, 2), start + 128, 16),
    }
    assert found.metadata["general.name"] == "wan"
    assert found.raw == head
    assert list(sample_weights(path)) == [head, bytes(range(24)), bytes(range(64, 98)), bytes(range(128, 144))]


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"", "no GGUF file"),
        (b"GGML" + bytes(20), "no GGUF file"),
        (header(version=1), "has the version 1 of GGUF"),
        (header(counts=(2**60, 0)), "is cut off, or its header has more than 16 MiB"),
        (header(counts=(0, 2**60)), "is cut off"),
        (header(values=(text("a" * 200)[:10],)), "is cut off"),
        (header(values=(value("a", 9, struct.pack("<IQ", 0, 2**60)),)), "is cut off"),
        (header(values=(value("a", 9, struct.pack("<IQ", 8, 2**60)),)), "is cut off"),
        (header(values=(value("a", 9, struct.pack("<IQ", 9, 2)),)), "has a value of the type 9"),
        (header(values=(value("a", 77, b""),)), "has a value of the type 77"),
        (header(values=(value("general.alignment", 4, bytes(4)),)), "has an alignment that is no number"),
        (header(tensor("a", (2,) * 9)), "a has 9 dimensions"),
        (header(tensor("a", (2,), kind=24)), "a has the type 24 of GGUF, which is not read; give one of F32"),
        (header(tensor("a", (33,), kind=8)), r"rows of \[33\] are not made of blocks of 32"),
        (header(tensor("a", (), kind=8)), r"rows of \[\] are not made of blocks"),
        (header(tensor("a", (2,)), tensor("a", (2,), offset=32)), "has a twice"),
        (header(tensor("a", (9,)), tensor("b", (2,), offset=32)), "b overlaps the tensor before it"),
        (header(tensor("a", (17,))), "is cut off"),
        (header(tensor("a", (2**60, 2**60))), "is cut off"),
        (header(tensor("a", (2,), offset=2**63)), "is cut off"),
    ],
)
def test_a_header_that_is_not_true_is_refused(head: bytes, reason: str, tmp_path: Path) -> None:
    """By one sentence, without memory for what it claims."""
    path = write(tmp_path / "a.gguf", head)
    tracemalloc.start()
    with pytest.raises(DamagedFile, match=reason):
        read_gguf_header(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
