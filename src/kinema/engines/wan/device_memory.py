"""How much of a device's memory this process may take, and what the allocator has given of it.

The bound is torch's too, so a large device can play a small one. ``residents.py`` knows who has it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kinema.errors import ConfigError

log = logging.getLogger(__name__)

# What a process takes of a device beside torch's allocator: CUDA's context, and the code and buffers of its libraries,
# which come by and by. Some 500 MB on an H200 with cuBLAS, cuDNN and Triton's kernels, and a half more for the rest.
OUTSIDE_BYTES = 750 * 10**6


class DeviceMemory(Protocol):
    """What a device's allocator says, in bytes. ``CudaMemory``, or a stand-in for it."""

    @property
    def limit_bytes(self) -> int:
        """All that the allocator may hold."""

    def free_bytes(self) -> int:
        """What it could still get, without what it keeps for later."""

    def give_back(self) -> None:
        """Give back what the allocator keeps for later."""

    def allocated_bytes(self) -> int:
        """What tensors take now."""

    def begin_peak(self) -> None:
        """Forget the peak so far."""

    def peak_bytes(self) -> int:
        """The most that tensors took at once since ``begin_peak``."""

    def close(self) -> None:
        """Lift the bound, for whatever this process does next on the device."""


@dataclass(frozen=True)
class Peak:
    """The most bytes of a device that tensors took, and that torch held, at once."""

    allocated: int = 0
    held: int = 0


# torch has one peak for each device of a process. A turn that is measured begins it anew, so the one before is kept.
_highest: dict[int, Peak] = {}


def highest(device: torch.device) -> Peak:
    """The peak of a CUDA device since ``forget_highest``, whoever else measures meanwhile."""
    before, stats = _highest.get(_number(device), Peak()), _stats(device)
    allocated, held = stats["allocated_bytes"]["all"]["peak"], stats["reserved_bytes"]["all"]["peak"]
    return Peak(max(before.allocated, allocated), max(before.held, held))


def forget_highest(device: torch.device) -> None:
    """Begin the peak of a CUDA device anew."""
    _highest.pop(_number(device), None)
    torch.cuda.reset_peak_memory_stats(device)


def _stats(device: torch.device) -> dict[str, Any]:
    """torch's own numbers. Its functions for one of them sort all of them, at each call."""
    found: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(device)
    return found


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class CudaMemory:
    """The memory of a CUDA device for this process, from its start to ``close``.

    It is ``memory_gb`` with all that lies outside of torch; by default what is free now, with what this process holds
    already. Raises ConfigError when that is nothing, or more than the device has.
    """

    def __init__(self, device: torch.device, memory_gb: float | None = None) -> None:
        self._device = torch.device("cuda", _number(device))
        free, total = torch.cuda.mem_get_info(self._device)
        available = free + torch.cuda.memory_reserved(self._device)
        self.limit_bytes = limit_of(memory_gb, available, total)
        torch.cuda.set_per_process_memory_fraction(self.limit_bytes / total, self._device)
        log.info("memory of %s: %.1f of %.1f GB for tensors", self._device, self.limit_bytes / 1e9, total / 1e9)

    def free_bytes(self) -> int:
        """See ``DeviceMemory``: the least of what the bound leaves and what other processes leave."""
        left = self.limit_bytes - torch.cuda.memory_reserved(self._device)
        return max(min(left, torch.cuda.mem_get_info(self._device)[0]), 0)

    def give_back(self) -> None:
        """See ``DeviceMemory``."""
        torch.cuda.empty_cache()

    def allocated_bytes(self) -> int:
        """See ``DeviceMemory``."""
        allocated: int = _stats(self._device)["allocated_bytes"]["all"]["current"]
        return allocated

    def begin_peak(self) -> None:
        """See ``DeviceMemory``. What ``highest`` says is not changed by it."""
        _highest[_number(self._device)] = highest(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """See ``DeviceMemory``."""
        peak: int = _stats(self._device)["allocated_bytes"]["all"]["peak"]
        return peak

    def close(self) -> None:
        """See ``DeviceMemory``."""
        torch.cuda.set_per_process_memory_fraction(1.0, self._device)


def limit_of(memory_gb: float | None, available: int, total: int) -> int:
    """The bytes for tensors, of ``available`` bytes on a device of ``total`` bytes. Raises ConfigError."""
    if memory_gb is None:
        if available <= OUTSIDE_BYTES:
            raise ConfigError(
                f"{available / 1e9:.3g} GB of the device are free, and a process needs more than "
                f"{OUTSIDE_BYTES / 1e9:g} GB; end what else runs there, or give another engine.device"
            )
        return available - OUTSIDE_BYTES
    limit = int(memory_gb * 1e9)
    if not OUTSIDE_BYTES < limit <= total:
        raise ConfigError(
            f"engine.wan.memory_gb = {memory_gb:g} cannot be used: give more than {OUTSIDE_BYTES / 1e9:g}, which CUDA "
            f"and its libraries take, and at most {total / 1e9:.4g}, which the device has"
        )
    return limit - OUTSIDE_BYTES


def open_memory(device: torch.device, memory_gb: float | None) -> CudaMemory | None:
    """The memory of a CUDA device; None for another device, which has no bound here. Raises ConfigError."""
    return CudaMemory(device, memory_gb) if device.type == "cuda" else None


def check_bound(memory_gb: float | None, device: torch.device) -> None:
    """Raises ConfigError for a bound on a device that has none."""
    if memory_gb is not None and device.type != "cuda":
        raise ConfigError(
            f"engine.wan.memory_gb bounds the memory of a CUDA device, and engine.device is {device.type}; leave it out"
        )


def held_bytes(device: torch.device) -> int:
    """What torch holds of a CUDA device, after it gave back what it keeps for later."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def bytes_of(*holders: object, device: torch.device | None = None) -> int:
    """The memory of all tensors in these tensors, mappings, sequences and dataclasses, or of those on this kind of
    device. Shared memory counts once."""
    storages = {}
    for tensor in _tensors(holders):
        if device is None or tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(holder: object) -> Iterator[Tensor]:
    if isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, Mapping):
        yield from _tensors(list(holder.values()))
    elif isinstance(holder, (list, tuple)):
        for one in holder:
            yield from _tensors(one)
    elif is_dataclass(holder):
        for field in fields(holder):
            yield from _tensors(getattr(holder, field.name))
