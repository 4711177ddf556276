"""What is foretold from the videos that were made last."""

from __future__ import annotations

import pytest

from kinema.service.queue import ModelSpeed


def test_a_kind_of_video_that_was_made_takes_as_long_as_it_did() -> None:
    """Short ones have their own cost, which their work does not show; one slow run is not the rule."""
    speed = ModelSpeed([(1.0, 1.1), (1.0, 1.0), (1.0, 9.0), (10.0, 4.0)])
    assert speed.seconds(1.0) == 1.1
    assert speed.seconds(10.0) == 4.0


def test_a_new_kind_of_video_is_read_off_the_line() -> None:
    """Between two that were made, and beyond them."""
    speed = ModelSpeed([(1.0, 1.3), (10.0, 4.0)])
    assert speed.seconds(5.0) == pytest.approx(2.5, rel=0.1)
    assert speed.seconds(100.0) == pytest.approx(31.0, rel=0.1)


def test_one_kind_alone_tells_of_others_by_their_work() -> None:
    """Twice the work, twice the time."""
    assert ModelSpeed([(3.0, 6.0)]).seconds(6.0) == pytest.approx(12.0)
    assert ModelSpeed([(3.0, 6.0), (1.0, 0.0)]).per_work == 1.5
    assert ModelSpeed.of([]) is None
