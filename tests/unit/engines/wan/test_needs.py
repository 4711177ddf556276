"""The line through what was measured: plain numbers."""

from __future__ import annotations

import pytest

from kinema.engines.wan.needs import MeasuredNeed


def learned(*points: tuple[float, float]) -> MeasuredNeed:
    need = MeasuredNeed()
    for units, num_bytes in points:
        need.observe(units, num_bytes)
    return need


def test_nothing_is_known_at_first() -> None:
    """Nor after a turn that took nothing."""
    assert learned().line() is None
    assert learned((100.0, 0.0), (0.0, 5.0)).line() is None


def test_one_point_is_proportional() -> None:
    """So after a trial video there is an estimate for any size."""
    line = learned((100, 700)).line()
    assert line is not None
    assert (line.bytes_for(100), line.bytes_for(1000)) == pytest.approx((700, 7000))


def test_points_on_a_line_give_it_back() -> None:
    """With what every turn takes."""
    line = learned((100, 1200), (300, 1600), (1000, 3000)).line()
    assert line is not None
    assert (line.base_bytes, line.bytes_per_unit) == pytest.approx((1000, 2))


@pytest.mark.parametrize(
    "points",
    [
        [(100, 1000), (200, 2500), (300, 2900)],
        [(100, 100), (200, 900)],  # steeper than proportional
        [(100, 900), (200, 100)],  # falling
        [(10, 50), (10.1, 49), (5000, 9000), (20000, 50000)],
    ],
)
def test_it_lies_below_no_point(points: list[tuple[float, float]]) -> None:
    """And neither of its parts is negative."""
    line = learned(*points).line()
    assert line is not None
    assert line.base_bytes >= 0
    assert line.bytes_per_unit >= 0
    assert all(line.bytes_for(units) >= num_bytes - 1e-6 for units, num_bytes in points)


def test_a_turn_that_took_less_says_nothing() -> None:
    """A replayed step takes nothing new; one that took more is learned."""
    need = learned((100, 700))
    assert not need.observe(100, 20)
    assert need.observe(100, 800)
    line = need.line()
    assert line is not None
    assert line.bytes_for(100) == pytest.approx(800)


def test_it_remembers_a_number_of_sizes() -> None:
    """The latest ones."""
    need = learned((1, 10**9), *((float(units), 10.0 * units) for units in range(100, 164)))
    line = need.line()
    assert line is not None
    assert (line.base_bytes, line.bytes_per_unit) == pytest.approx((0, 10), abs=1e-6)
