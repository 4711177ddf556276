"""From the device to the host: planes are copied to pinned memory while the device goes on.

Frames count until the last array of them is dropped, and so the memory of those on their way to the encoder is bounded.
The pinned memory itself is torch's, which keeps it for the next frames.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kinema.engines.base import UInt8Array

log = logging.getLogger(__name__)

# 445 frames of 832x480 or 193 of 1280x720: more than most films have, and no more of a host's memory than that.
_ROOM_BYTES = 256 * 2**20
# An encoder that is so far behind has stopped, or works on something else, and all generations wait meanwhile.
_PATIENCE_S = 0.5


class _HostMemory:
    """A tensor's memory for numpy; every array of it, and every part of one, keeps this object alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.__array_interface__ = tensor.numpy().__array_interface__


@dataclass(frozen=True, eq=False)
class Transfer:
    """A copy to the host that has begun: planes (f, h * 3/2, w) uint8 and a sum float32 of the numbers behind them."""

    planes: _HostMemory
    total: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> UInt8Array | None:
        """The planes, when they have arrived; None when the sum is not finite, so that they show nothing."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return np.asarray(self.planes) if math.isfinite(self.total.item()) else None


class Outbox:
    """The transfers of one engine. They begin on its device thread; their arrays may be dropped on any thread."""

    def __init__(self, room_bytes: int = _ROOM_BYTES, patience_s: float = _PATIENCE_S) -> None:
        self._room_bytes = room_bytes
        self._patience_s = patience_s
        self._held_bytes = 0
        self._changed = threading.Condition()
        self._has_warned = False

    @property
    def held_bytes(self) -> int:
        """The memory of all planes that were sent and are still in use."""
        return self._held_bytes

    def send(self, planes: Tensor, total: Tensor) -> Transfer:
        """Begin to copy both to the host, behind what the device was asked before.

        When too much memory is in use, wait for room, but at most ``patience_s`` seconds.
        """
        size = planes.numel()
        self._wait_for_room(size)
        is_cuda = planes.is_cuda
        host = torch.empty(planes.shape, dtype=planes.dtype, pin_memory=is_cuda).copy_(planes, non_blocking=is_cuda)
        host_total = torch.empty((), dtype=total.dtype, pin_memory=is_cuda).copy_(total, non_blocking=is_cuda)
        arrived = None
        if is_cuda:
            # A thread that waits for such an event sleeps, and leaves its core to the encoder.
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrived.record()
        self._hold(size)
        held = _HostMemory(host)
        weakref.finalize(held, self._hold, -size)
        return Transfer(held, host_total, arrived)

    def _hold(self, size_bytes: int) -> None:
        with self._changed:
            self._held_bytes += size_bytes
            self._changed.notify_all()

    def _wait_for_room(self, size_bytes: int) -> None:
        with self._changed:
            has_room = self._changed.wait_for(
                lambda: not self._held_bytes or self._held_bytes + size_bytes <= self._room_bytes, self._patience_s
            )
        if not has_room and not self._has_warned:
            self._has_warned = True
            log.warning("the encoder is behind: %d MB of decoded frames wait for it", self._held_bytes // 2**20)
