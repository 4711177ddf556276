"""Whether the device gets a step before the host has waited for the one before it.

When a step is done, the host wakes up, reports it and launches the next one. Meanwhile the device has nothing to do:
for about a millisecond, and for longer while other threads hold Python. So the next step is launched ahead where it
costs nobody much: a generation that is alone on its device, with steps that are recorded, so that they are launched at
once, and short, because a cancel, or a generation that comes now, waits for both.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

# Of a longer step the host's millisecond is less than half a percent.
_MAX_STEP_S = 0.25
# Kinds of steps whose time is known; then all are forgotten, and learned again.
_MAX_KINDS = 256


class LaunchAhead:
    """Counts the generations that are open on one device, and learns how long their steps take.

    ``is_possible`` says whether the engine's steps can be launched ahead at all.
    """

    def __init__(self, *, is_possible: bool) -> None:
        self._is_possible = is_possible
        self._num_open = 0
        self._seconds: dict[Hashable, float] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around a generation that has begun, until it ends."""
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def allows(self, kind: Hashable) -> bool:
        """Whether a step of this kind may be launched before the one before it is done."""
        return self._is_possible and self._num_open == 1 and self._seconds.get(kind, _MAX_STEP_S) < _MAX_STEP_S

    def note(self, kind: Hashable, seconds: float) -> None:
        """A step of this kind was done so many seconds after its launch. The least of them is what it takes alone."""
        if kind not in self._seconds and len(self._seconds) == _MAX_KINDS:
            self._seconds.clear()
        self._seconds[kind] = min(seconds, self._seconds.get(kind, seconds))
