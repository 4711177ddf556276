"""The one owner of a device's memory: what lies there between two turns, by name and size, and what leaves for others.

A resident comes back by itself when it is needed: a step is recorded again, a prompt is encoded again. What belongs to
a generation, its latents and the stream that decodes it, is no resident. Sizes are measured, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kinema.engines.wan.device_memory import DeviceMemory

# The part of the limit that the recorded decoder of the last film may hold, so that the next film finds it.
IDLE_SHARE = 0.1


@dataclass(frozen=True)
class Resident:
    """``size`` says how many bytes it takes now, and ``leave`` frees them; None for one that cannot leave."""

    name: str
    size: Callable[[], int]
    leave: Callable[[], None] | None


class Residents:
    """What lies on one device, whose allocator ``memory`` is; None where there is none to ask.

    It belongs to the thread of the device, and is asked between two turns.
    """

    def __init__(self, memory: DeviceMemory | None) -> None:
        self._memory = memory
        self._residents: list[Resident] = []

    def add(self, name: str, size: Callable[[], int], leave: Callable[[], None] | None = None) -> None:
        """Add a resident. Those that were added first leave first, and one without ``leave`` keeps its size."""
        if leave is None:
            num_bytes = size()
            size = lambda: num_bytes  # noqa: E731 - measured once: a model has thousands of tensors
        self._residents.append(Resident(name, size, leave))

    def sizes(self) -> dict[str, int]:
        """The bytes of each resident by its name."""
        return {resident.name: resident.size() for resident in self._residents}

    def fixed_bytes(self) -> int:
        """The bytes of all that cannot leave."""
        return sum(resident.size() for resident in self._residents if resident.leave is None)

    def make_room(self, wanted_bytes: int | None = None) -> None:
        """Let residents leave, one after the other, until so much is free; all that can leave when it is None."""
        if self._memory is not None and not self._has(wanted_bytes):
            self._memory.give_back()
        for resident in self._residents:
            if self._has(wanted_bytes):
                return
            if resident.leave is not None:
                resident.leave()
                if self._memory is not None:
                    self._memory.give_back()

    def _has(self, wanted_bytes: int | None) -> bool:
        return wanted_bytes is not None and self._memory is not None and self._memory.free_bytes() >= wanted_bytes
