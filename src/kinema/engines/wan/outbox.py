"""From the device to the host: planes into pinned memory, while the device goes on.

What was handed out counts until the last who holds it lets go, and so the frames in flight are bounded; the pinned
memory itself is torch's, which keeps it for the next.
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
from kinema.errors import EngineFailed

log = logging.getLogger(__name__)

# 445 frames of 832x480 or 193 of 1280x720: a film that is never waited for, and no more of a host's memory than that.
_ROOM_BYTES = 256 * 2**20
# An encoder that is so far behind has stopped, or works on something else; all others wait for the device meanwhile.
_PATIENCE_S = 0.5


class _Held:
    """A tensor's memory as numpy sees it; every array of it, and every part of one, keeps this alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.__array_interface__ = tensor.numpy().__array_interface__


@dataclass(frozen=True, eq=False)
class Parcel:
    """Planes (f, h * 3/2, w) uint8 and one number of float32, on their way."""

    planes: _Held
    total: Tensor
    arrived: torch.cuda.Event | None

    def open(self) -> UInt8Array:
        """The planes, once they are there. Raises EngineFailed when they were made of what are not numbers."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if not math.isfinite(self.total.item()):
            raise EngineFailed("The decoder's numbers left their range; another engine.vae_dtype has a larger one.")
        return np.asarray(self.planes)


class Outbox:
    """Of one engine; parcels are sent on its device thread and dropped on any."""

    def __init__(self, room_bytes: int = _ROOM_BYTES, patience_s: float = _PATIENCE_S) -> None:
        self._room_bytes = room_bytes
        self._patience_s = patience_s
        self._held_bytes = 0
        self._changed = threading.Condition()
        self._has_warned = False

    @property
    def held_bytes(self) -> int:
        """Of what was sent and is still held by somebody."""
        return self._held_bytes

    def send(self, planes: Tensor, total: Tensor) -> Parcel:
        """Copy both to the host, after what the device does before. When too much is held, wait, but not for ever."""
        size = planes.numel()
        self._wait_for_room(size)
        is_cuda = planes.is_cuda
        host = torch.empty(planes.shape, dtype=planes.dtype, pin_memory=is_cuda).copy_(planes, non_blocking=is_cuda)
        host_total = torch.empty((), dtype=total.dtype, pin_memory=is_cuda).copy_(total, non_blocking=is_cuda)
        arrived = None
        if is_cuda:
            # A thread that waits for it sleeps, and leaves its core to the encoder.
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrived.record()
        self._hold(size)
        held = _Held(host)
        weakref.finalize(held, self._hold, -size)
        return Parcel(held, host_total, arrived)

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
