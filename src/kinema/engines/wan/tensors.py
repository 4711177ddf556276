"""Read the tensors of safetensors and GGUF files, and write safetensors; threads read each tensor to where it stays.

``safetensors_header.py`` and ``gguf_header.py`` say what a file is. Quantised numbers are restored piece by piece, so a
file is never in memory twice. On the CPU a tensor that keeps its type is read into its own memory; all
others go through one small buffer per thread, which is pinned where a GPU takes the bytes from there.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from kinema.engines.wan.gguf_header import BLOCKS
from kinema.engines.wan.safetensors_header import DamagedFile, Entry
from kinema.engines.wan.weight_files import header_of

# Deep enough for an SSD or a network disk; a page cache is copied at the speed of memory by fewer.
_NUM_THREADS = 8
# A thread reads so many bytes of a tensor at a time.
_PIECE_BYTES = 32 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``size`` bytes that begin at ``start``.

    Its numbers are multiplied by ``scale``, where it has one. ``blocks`` is the type of GGUF whose blocks the bytes
    are, which are restored to ``dtype``.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    scale: float | None = None
    blocks: str | None = None

    @property
    def block(self) -> tuple[int, int]:
        """How many numbers lie together, and in how many bytes."""
        return (1, self.dtype.itemsize) if self.blocks is None else BLOCKS[self.blocks]


@dataclass(frozen=True)
class _Piece:
    """A part of a stored tensor, and the part of a tensor in memory (n,) that it fills."""

    stored: StoredTensor
    target: Tensor
    start: int
    size: int


def list_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The file's tensors by their names, and its metadata. Raises DamagedFile, also for a file that was cut off."""
    header = header_of(path)
    return {name: _stored(path, name, entry) for name, entry in header.entries.items()}, header.metadata


def _stored(path: Path, name: str, entry: Entry) -> StoredTensor:
    if entry.dtype in BLOCKS and entry.dtype not in DTYPES:
        return StoredTensor(path, torch.float32, entry.shape, entry.start, entry.size, blocks=entry.dtype)
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise DamagedFile(f"{path.name}: {name[:100]} has the type {entry.dtype}; give one of {', '.join(DTYPES)}")
    return StoredTensor(path, dtype, entry.shape, entry.start, entry.size)


def read_number(stored: StoredTensor) -> float:
    """The number in a tensor that has one. Raises OSError or DamagedFile."""
    if math.prod(stored.shape) != 1:
        raise DamagedFile(f"it has {math.prod(stored.shape)} numbers, and one is read")
    raw = torch.empty(stored.size, dtype=torch.uint8)
    _read_exactly(stored.path, _bytes_of(raw), stored.start)
    return float(raw.view(stored.dtype).float().item())


class PendingRead:
    """Reads that began together and run in the background."""

    def __init__(self, pieces: list[Future[None]]) -> None:
        self._pieces = pieces

    def wait(self) -> None:
        """Return when every tensor is filled. Raises the first DamagedFile or OSError, once all reads have ended."""
        wait(self._pieces)
        for piece in self._pieces:
            piece.result()


class TensorReader:
    """Fills tensors on one device, and in the host's memory, from files, by threads in the background. Use it in a
    ``with`` block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="weights")
        self._own = threading.local()
        if self._is_cuda:  # the threads have streams of their own, and memory may still be in use on this one
            torch.cuda.synchronize(device)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._is_cuda:
            self._own = threading.local()
            torch.cuda.empty_cache()

    def begin(
        self,
        sources: Mapping[str, StoredTensor],
        targets: Mapping[str, Tensor],
        on_read: Callable[[int], None] = lambda _size: None,
    ) -> PendingRead:
        """Begin to fill each of ``targets`` from the source of its name, which has the same shape. The threads call
        ``on_read`` with the number of bytes that they have read since the last call."""
        # In the order of the files, which a disk reads fastest.
        names = sorted(targets, key=lambda name: (str(sources[name].path), sources[name].start))
        pieces = (piece for name in names for piece in _cut(sources[name], targets[name]))
        return PendingRead([self._pool.submit(self._read_and_tell, piece, on_read) for piece in pieces])

    def _read_and_tell(self, piece: _Piece, on_read: Callable[[int], None]) -> None:
        self._read(piece)
        on_read(piece.size)

    def _read(self, piece: _Piece) -> None:
        stored = piece.stored
        is_same = piece.target.dtype == stored.dtype and stored.scale is None and stored.blocks is None
        is_plain = not piece.target.is_cuda and is_same
        raw = piece.target.view(torch.uint8) if is_plain else self._scratch()[: piece.size]
        _read_exactly(stored.path, _bytes_of(raw), piece.start)
        if is_plain:
            return
        values = raw.view(stored.dtype) if stored.blocks is None else _restored(raw, stored.blocks)
        if not piece.target.is_cuda:
            _fill(piece.target, values, stored.scale)
            return
        stream = self._stream()
        with torch.cuda.stream(stream):
            _fill(piece.target, values, stored.scale)
        stream.synchronize()  # the buffer is written to again

    def _scratch(self) -> Tensor:
        if not hasattr(self._own, "scratch"):
            self._own.scratch = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=self._is_cuda)
        scratch: Tensor = self._own.scratch
        return scratch

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._own.stream
        return stream


def _cut(stored: StoredTensor, target: Tensor) -> Iterator[_Piece]:
    numbers, size = stored.block
    # What is restored from a piece is no larger than a piece either.
    step = max(_PIECE_BYTES // max(size, numbers * stored.dtype.itemsize), 1) * numbers
    flat = target.view(-1)
    for first in range(0, flat.numel(), step):
        part = flat[first : first + step]
        yield _Piece(stored, part, stored.start + first // numbers * size, part.numel() // numbers * size)


def _fill(target: Tensor, values: Tensor, scale: float | None) -> None:
    """Put the values into ``target`` (n,), times the scale. They are rounded once: every type has those of FP8."""
    target.copy_(values, non_blocking=True)
    if scale is not None:
        target.mul_(scale)


def _restored(raw: Tensor, blocks: str) -> Tensor:
    """The numbers (n,) float32 of GGUF's blocks, whose bytes are ``raw`` (m,) uint8."""
    from gguf import GGMLQuantizationType, dequantize  # noqa: PLC0415 - only GGUF files need it

    return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[blocks]))


def _bytes_of(raw: Tensor) -> memoryview:
    """The memory of a tensor (n,) uint8 on the CPU, without a copy."""
    return memoryview(cast(Any, raw.numpy()))


def _read_exactly(path: Path, into: memoryview, start: int) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(into):
            count = os.preadv(file, [into[done:]], start + done)
            if count == 0:
                raise DamagedFile(f"{path.name} is cut off")
            done += count
    finally:
        os.close(file)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; its bytes are on the disk when this returns. Raises OSError."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    place = 0
    for name, tensor in tensors.items():
        end = place + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor.detach().reshape(-1).view(torch.uint8).cpu()))
        file.flush()
        os.fsync(file.fileno())


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """The number of bytes that all of them take together."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def checksums_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sum of each tensor's bytes, taken as 64-bit numbers; a changed byte changes it. The same on every device."""
    sums = [_sum(tensor) for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist(), strict=True)) if sums else {}


def _sum(tensor: Tensor) -> Tensor:
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    whole = len(raw) // 8 * 8
    return raw[:whole].view(torch.int64).sum() + raw[whole:].sum()
