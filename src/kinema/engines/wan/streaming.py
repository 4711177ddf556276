"""Blocks that lie elsewhere, mostly in the host's memory, and are whole on the device while they compute.

The blocks of a network have equal shapes and come in the same order at every pass. While one computes, the next ones
come to the device on a stream of their own, so a pass takes no longer than with all blocks on the device as long as a
block computes longer than it comes. The numbers are the same bytes, so every bit of a result is too. On a CPU nothing
runs beside the rest, so that all of this can be seen without a GPU. ``ranks/shard.py`` has another place for blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kinema.engines.wan.pinned import HostMemory

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# One computes and two are ahead.
NUM_SLOTS = 3
# The device reads whole lines of its cache, and matrices by kernels that want such an address.
_ALIGNMENT = 256


class Layers(Protocol[T_co]):
    """The layers of a network in their order: a tuple, or ``StreamedBlocks``. A layer may be used until the next one is
    asked for."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[T_co]: ...


class Rows(Protocol):
    """Where blocks lie: each is a row of bytes. All rows are stored, in their order, before one is brought."""

    @property
    def row_bytes(self) -> int:
        """The size of a row on the device: a block's bytes, and what fills them up."""

    @property
    def device_bytes(self) -> int:
        """What they take of the device's memory."""

    @property
    def is_own(self) -> bool:
        """Whether a row may be brought at any time. Else it takes all ranks, in the same order, and only in a pass."""

    def __len__(self) -> int: ...

    def store(self, index: int, write: Callable[[Tensor], None]) -> None:
        """Keep what is written into the bytes (row_bytes,) of this row, in the host's memory."""

    def finish(self) -> None:
        """Called when all rows are stored."""

    def bring(self, index: int, data: Tensor) -> None:
        """Launch, on the current stream, what writes the row into ``data`` (row_bytes,) on the device."""


class HostRows:
    """``Rows`` in the host's memory."""

    is_own = True
    device_bytes = 0

    def __init__(self, count: int, row_bytes: int, device: torch.device) -> None:
        self.row_bytes = row_bytes
        self._memory = HostMemory(count * row_bytes, device)
        self._rows = self._memory.data.view(count, row_bytes)

    def __len__(self) -> int:
        return len(self._rows)

    def store(self, index: int, write: Callable[[Tensor], None]) -> None:
        """See ``Rows``."""
        write(self._rows[index])

    def finish(self) -> None:
        """See ``Rows``. Raises ConfigError as ``HostMemory.pin`` does."""
        self._memory.pin()

    def bring(self, index: int, data: Tensor) -> None:
        """See ``Rows``."""
        data.copy_(self._rows[index], non_blocking=True)


# Makes room for so many rows of so many bytes, for this device.
NewRows = Callable[[int, int, torch.device], Rows]


class StreamedBlocks(Generic[T]):
    """``Layers`` that come by a ``stream``, which says where they lie.

    ``blocks`` are frozen dataclasses of tensors, also nested ones, with the same shapes each. They may be on any
    device, and are let go one after the other. Passes over the blocks of one ``stream`` follow each other.
    """

    def __init__(self, blocks: Iterator[T], count: int, stream: BlockStream) -> None:
        self._stream = stream
        first = next(blocks)
        self._layout = _Layout(first)
        self._rows = stream.new_rows(count, self._layout.num_bytes, stream.device)
        self._rows.store(0, partial(self._layout.store, first))
        del first
        for index, block in zip(range(1, count), blocks, strict=True):
            self._rows.store(index, partial(self._layout.store, block))
        self._rows.finish()

    @property
    def device_bytes(self) -> int:
        """What they take of the device's memory between two passes, without the stream's."""
        return self._rows.device_bytes

    def reserve(self) -> None:
        """Take the stream's memory for the next pass. Raises torch.OutOfMemoryError."""
        self._stream.reserve(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[T]:
        for data in self._stream.run(self._rows):
            block: T = self._layout.view(data)
            yield block


class BlockStream:
    """The memory of a device for the block that computes and for those that come next, from ``new_rows``.

    With ``is_kept`` it stays after a pass, and the first blocks of the next pass come at once if the rows ``is_own``.
    """

    def __init__(self, device: torch.device, *, is_kept: bool, new_rows: NewRows = HostRows) -> None:
        self.device = device
        self.new_rows = new_rows
        self._is_kept = is_kept
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._slots: list[_Slot] = []
        # The blocks of which the first ones have come, or are coming, for the next pass, and the slot of the first.
        self._ahead: Rows | None = None
        self._first = 0

    @property
    def num_bytes(self) -> int:
        """What it holds of the device's memory."""
        return sum(slot.data.numel() for slot in self._slots)

    def drop(self) -> None:
        """Free the device's memory until the next pass."""
        if self._copies is not None:
            self._copies.synchronize()
        self._slots, self._ahead = [], None

    def reserve(self, rows: Rows) -> None:
        """Take the memory for a pass over such rows. Raises torch.OutOfMemoryError."""
        size, count = rows.row_bytes, min(NUM_SLOTS, len(rows))
        if [slot.data.numel() for slot in self._slots] != [size] * count:
            self.drop()
            self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=self.device)) for _ in range(count)]

    def run(self, rows: Rows) -> Iterator[Tensor]:
        """Yield each row as bytes (row_bytes,) on the device, valid until the next one is asked for."""
        if self._ahead is not rows:
            self._begin(rows)
        self._ahead = None  # a pass that is given up leaves slots in disorder
        slots, count, goes_on = self._slots, len(rows), self._is_kept and rows.is_own
        for index in range(count):
            slot = slots[(self._first + index) % len(slots)]
            slot.wait()
            yield slot.data
            following = index + len(slots)
            if following < count or goes_on:
                slot.request(rows, following % count, self._copies)
        if goes_on:
            self._ahead, self._first = rows, (self._first + count) % len(slots)
        elif not self._is_kept:
            self.drop()

    def _begin(self, rows: Rows) -> None:
        self.reserve(rows)
        self._first = 0
        for index, slot in enumerate(self._slots):
            slot.request(rows, index, self._copies)


class _Slot:
    """``data`` (n,) uint8 on the device."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self._has_come: torch.cuda.Event | None = None

    def request(self, rows: Rows, index: int, copies: torch.cuda.Stream | None) -> None:
        """Bring the row here when all that was launched before, which may read the block here, has been computed."""
        if copies is None:
            rows.bring(index, self.data)
            return
        copies.wait_stream(torch.cuda.current_stream(self.data.device))
        with torch.cuda.stream(copies):
            rows.bring(index, self.data)
            self._has_come = copies.record_event()

    def wait(self) -> None:
        """Let what is launched from now on wait for the row."""
        if self._has_come is not None:
            torch.cuda.current_stream(self.data.device).wait_event(self._has_come)


class _Layout:
    """Where each tensor of a block lies in its bytes."""

    def __init__(self, example: Any) -> None:  # noqa: ANN401 - any dataclass of tensors
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []
        self.num_bytes = 0

        def add(tensor: Tensor) -> Tensor:
            self._places.append((self.num_bytes, tensor.shape, tensor.dtype))
            size = tensor.numel() * tensor.dtype.itemsize
            self.num_bytes += size + -size % _ALIGNMENT
            return tensor.new_empty(0)

        # The tree of the block, without its numbers.
        self._tree = map_tensors(example, add)

    def store(self, block: Any, row: Tensor) -> None:  # noqa: ANN401 - as above
        """Write the block's tensors into its bytes (n,)."""
        views = iter(self._views(row))

        def copy(tensor: Tensor) -> Tensor:
            return next(views).copy_(tensor)

        map_tensors(block, copy)

    def view(self, data: Tensor) -> Any:  # noqa: ANN401 - as above
        """The block whose tensors are these bytes (n,)."""
        views = iter(self._views(data))
        return map_tensors(self._tree, lambda _tensor: next(views))

    def _views(self, data: Tensor) -> list[Tensor]:
        return [
            data[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for start, shape, dtype in self._places
        ]


def map_tensors(part: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401 - any dataclass of tensors
    """The same frozen dataclass with each tensor changed, also in those that it contains."""
    if isinstance(part, Tensor):
        return change(part)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    return replace(part, **{field.name: map_tensors(getattr(part, field.name), change) for field in fields(part)})


def move(block: T, device: torch.device) -> T:
    """The block with its tensors on this device."""
    moved: T = map_tensors(block, lambda tensor: tensor.to(device))
    return moved


def layers_of(blocks: Iterator[T], count: int, stream: BlockStream | None, device: torch.device) -> Layers[T]:
    """The blocks on the device, or where the ``stream`` keeps them."""
    if stream is not None:
        return StreamedBlocks(blocks, count, stream)
    return tuple(move(block, device) for block in blocks)
