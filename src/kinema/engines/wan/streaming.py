"""Blocks that stay in the host's memory and are on the device while they compute.

The blocks of a network have equal shapes and come in the same order at every pass. While one computes, the next ones
cross to the device on a stream of their own, so a pass takes no longer than with all blocks on the device as long as a
block computes longer than it crosses. The numbers are the same bytes, so every bit of a result is too. On a CPU a block
is copied when its turn comes, so that all of this can be seen without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
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


class StreamedBlocks(Generic[T]):
    """``Layers`` in the host's memory.

    ``blocks`` are frozen dataclasses of tensors, also nested ones, with the same shapes each. They may be on any
    device, and are let go one after the other. Passes over the blocks of one ``stream`` follow each other.
    """

    def __init__(self, blocks: Iterator[T], count: int, stream: BlockStream) -> None:
        self._count = count
        self._stream = stream
        first = next(blocks)
        self._layout = _Layout(first)
        self._memory = HostMemory(count * self._layout.num_bytes, stream.device)
        self._rows = self._memory.data.view(count, self._layout.num_bytes)
        self._layout.store(first, self._rows[0])
        del first
        for row, block in zip(self._rows[1:], blocks, strict=True):
            self._layout.store(block, row)
        self._memory.pin()

    @property
    def num_bytes(self) -> int:
        """What they take of the host's memory."""
        return self._rows.numel()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        for data in self._stream.run(self._rows):
            block: T = self._layout.view(data)
            yield block


class BlockStream:
    """The memory of a device for the block that computes and for those that come next.

    With ``is_kept`` it stays after a pass, and the first blocks of the next pass come at once.
    """

    def __init__(self, device: torch.device, *, is_kept: bool) -> None:
        self.device = device
        self._is_kept = is_kept
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._slots: list[_Slot] = []
        # The blocks of which the first ones have come, or are coming, for the next pass, and the slot of the first.
        self._ahead: Tensor | None = None
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

    def run(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield each of ``rows`` (blocks, bytes) as bytes (n,) on the device, valid until the next one is asked for."""
        if self._ahead is not rows:
            self._prepare(rows)
        self._ahead = None  # a pass that is given up leaves slots in disorder
        slots, count = self._slots, len(rows)
        for index in range(count):
            slot = slots[(self._first + index) % len(slots)]
            slot.wait()
            yield slot.data
            following = index + len(slots)
            if following < count or self._is_kept:
                slot.request(rows[following % count], self._copies)
        if self._is_kept:
            self._ahead, self._first = rows, (self._first + count) % len(slots)
        else:
            self.drop()

    def _prepare(self, rows: Tensor) -> None:
        size, count = rows.shape[1], min(NUM_SLOTS, len(rows))
        if [slot.data.numel() for slot in self._slots] != [size] * count:
            self.drop()
            self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=self.device)) for _ in range(count)]
        self._first = 0
        for slot, row in zip(self._slots, rows, strict=False):
            slot.request(row, self._copies)


class _Slot:
    """``data`` (n,) uint8 on the device."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self._has_come: torch.cuda.Event | None = None

    def request(self, row: Tensor, copies: torch.cuda.Stream | None) -> None:
        """Copy the row here when all that was launched before, which may read the block here, has been computed."""
        if copies is None:
            self.data.copy_(row)
            return
        copies.wait_stream(torch.cuda.current_stream(self.data.device))
        with torch.cuda.stream(copies):
            self.data.copy_(row, non_blocking=True)
            self._has_come = copies.record_event()

    def wait(self) -> None:
        """Let what is launched from now on wait for the copy."""
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
    """The blocks on the device, or in the host's memory where there is a ``stream`` for them."""
    if stream is not None:
        return StreamedBlocks(blocks, count, stream)
    return tuple(move(block, device) for block in blocks)
