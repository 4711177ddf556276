"""A header of a safetensors file is believed only where it is true, and takes no memory for what it claims."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from kinema.engines.wan.fingerprint import sample_weights
from kinema.engines.wan.safetensors_header import DamagedFile, Entry, read_header


def one(start: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_true_header_is_read(tmp_path: Path) -> None:
    """In its own order, whatever the order of the bytes; with its metadata, and tensors without a byte."""
    header = {
        "__metadata__": {"format": "pt"},
        "second": one(8, 12, (2,), "BF16"),
        "none": one(8, 8, (0, 5)),
        "first": one(),
    }
    path = write(tmp_path / "a.safetensors", header, bytes(range(12)))
    start = 8 + len(json.dumps(header))
    found = read_header(path)
    assert list(found.entries) == ["second", "none", "first"]
    assert found.entries["second"] == Entry("BF16", (2,), start + 8, 4)
    assert found.metadata == {"format": "pt"}
    assert list(sample_weights(path)) == [found.raw, bytes(range(8, 12)), b"", bytes(range(8))]


def test_a_header_of_thousands_of_tensors_is_read(tmp_path: Path) -> None:
    """A 14B transformer has 1,095, and so many fields has no body of a client."""
    names = [f"blocks.{i}.weight" for i in range(3000)]
    path = write(tmp_path / "a.safetensors", {name: one(0, 0, (0,)) for name in names}, b"")
    assert list(read_header(path).entries) == names


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": one(-8, 0)}, "a has data_offsets that are not two whole numbers from 0 on"),
        ({"a": one(8, 0)}, "a has data_offsets that are not two whole numbers from 0 on, the smaller one first"),
        ({"a": one(0, 8), "b": one(0, 8)}, "b overlaps the tensor before it"),
        ({"a": one(0, 8), "b": one(4, 8, (1,))}, "b overlaps the tensor before it"),
        ({"a": one(4, 8, (1,))}, "a begins behind a gap"),
        ({"a": one(0, 16, (4,))}, "a.safetensors is cut off"),
        ({"a": one(0, 4, (1,))}, "a.safetensors has bytes of no tensor"),
        ({}, "a.safetensors has bytes of no tensor"),
        ({"a": one(0, 2**62, (2**60,))}, "is cut off"),
        ({"a": one(0, 8, (2**70, 2**70))}, "does not take 8 bytes"),
        ({"a": one(0, 8, (-1, -2))}, "a has a shape that is not a list of at most 8 whole numbers"),
        ({"a": one(0, 8, (2.0,))}, "a has a shape that is not"),
        ({"a": one(0, 8, (True, 2))}, "a has a shape that is not"),
        ({"a": one(0, 8, [1] * 9 + [2])}, "a has a shape that is not"),
        ({"a": one(0, 8, "2")}, "a has a shape that is not"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}, "a has data_offsets that are not"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}, "a has data_offsets that are not"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "a has data_offsets that are not"),
        ({"a": one(dtype="F31")}, "a has the type 'F31', which is none of"),
        ({"a": one(dtype=["F32"])}, "a has the type"),
        ({"a": 5}, "a has no type, shape and data_offsets"),
        ([], "it is not a JSON object"),
        (rb'{"__metadata__": {"trigger_words": "\ud83d"}}', "it is not valid Unicode: it has a lone surrogate"),
        (b"{", "it is not valid JSON"),
        (b"\xff\xff", "can't decode byte"),
        (b"[" * 50_000, "it is nested too deeply"),
        (b'{"a":' * 50_000, "it is nested too deeply"),
        (b"[" + b"0," * 150_000 + b"0]", "it has too many values"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_false_header_is_refused(header: object, reason: str, tmp_path: Path) -> None:
    """In a sentence that names the file, and the tensor where there is one; also where a digest of it is made."""
    path = write(tmp_path / "a.safetensors", header)
    with pytest.raises(DamagedFile) as refused:
        read_header(path)
    assert reason in str(refused.value)
    assert "a.safetensors" in str(refused.value)
    assert len(str(refused.value)) < 400
    with pytest.raises(DamagedFile):
        list(sample_weights(path))


@pytest.mark.parametrize("length", [0, 9, 2**40, 2**63])
def test_a_length_that_is_not_that_of_the_header_is_refused(length: int, tmp_path: Path) -> None:
    """Of the few bytes that the file has."""
    path = write(tmp_path / "a.safetensors", b"{}", bytes(6), length)
    with pytest.raises(DamagedFile, match=r"a\.safetensors"):
        read_header(path)


def test_a_header_that_is_a_whole_file_is_not_read(tmp_path: Path) -> None:
    """The file has a tebibyte, of which its first bytes say that it is a header."""
    path = tmp_path / "a.safetensors"
    with path.open("wb") as sparse:
        sparse.write((2**40 - 8).to_bytes(8, "little"))
        sparse.truncate(2**40)
    tracemalloc.start()
    with pytest.raises(DamagedFile, match="at most"):
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
