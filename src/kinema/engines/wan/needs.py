"""Learns how many bytes a kind of work takes, from what was measured of it. Plain arithmetic, without torch."""

from __future__ import annotations

from kinema.request.memory import Need

# More sizes than a service makes in a day; the oldest is forgotten.
_REMEMBERED = 64


class MeasuredNeed:
    """The most bytes that were measured at each number of units, and a line that lies below none of them."""

    def __init__(self) -> None:
        self._most: dict[float, float] = {}

    def observe(self, units: float, num_bytes: float) -> bool:
        """Learn from one turn; True when that changes the line. A turn that took less than another one of its units
        says nothing: its memory was there."""
        if units <= 0 or num_bytes <= self._most.get(units, 0.0):
            return False
        self._most.pop(units, None)
        self._most[units] = num_bytes
        if len(self._most) > _REMEMBERED:
            del self._most[next(iter(self._most))]
        return True

    def line(self) -> Need | None:
        """What any number of units is taken to need; None before anything was measured.

        Proportional after one point; then the line of least squares with neither part negative, raised to the highest
        point above it.
        """
        if not self._most:
            return None
        slope = self._slope()
        return Need(base_bytes=max(y - slope * x for x, y in self._most.items()), bytes_per_unit=slope)

    def _slope(self) -> float:
        points = list(self._most.items())
        mean_x, mean_y = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        through_zero = sum(x * y for x, y in points) / sum(x * x for x, _ in points)
        if not spread:
            return through_zero
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
        return min(max(slope, 0.0), through_zero)
