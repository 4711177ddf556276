"""A call that blocks is run turn by turn."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from kinema.engines.diffusers.turns import in_turns


def count_to(number: int, ended: list[str]) -> Callable[[Callable[[int], None]], str]:
    """A call of so many turns, which says how it ended."""

    def call(pause: Callable[[int], None]) -> str:
        try:
            for turn in range(1, number + 1):
                pause(turn)
        except BaseException as exc:
            ended.append(type(exc).__name__)
            raise
        return "done"

    return call


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_each_turn_is_given_and_the_result_last() -> None:
    """Nothing runs before the first is asked for, and nothing is left after the last."""
    turns = in_turns(count_to(2, []), "counting")
    assert "counting" not in names()
    assert [next(turns), next(turns)] == [1, 2]
    assert "counting" in names()
    with pytest.raises(StopIteration) as end:
        next(turns)
    assert end.value.value == "done"
    assert "counting" not in names()


def test_calls_take_turns() -> None:
    """Each stands where it was."""
    first, second = in_turns(count_to(2, [])), in_turns(count_to(3, []))
    assert [next(first), next(second), next(second), next(first)] == [1, 1, 2, 2]
    assert list(second) == [3]
    assert list(first) == []


def test_closing_ends_the_call_where_it_is() -> None:
    """Its own cleaning up runs, and has run when the close returns."""
    ended: list[str] = []
    turns = in_turns(count_to(3, ended), "counting")
    next(turns)
    turns.close()
    assert ended == ["Closed"]
    assert "counting" not in names()


def test_no_library_stops_a_close() -> None:
    """Code that survives any Exception does not survive this."""

    def stubborn(pause: Callable[[int], None]) -> None:
        for turn in range(10):
            try:
                pause(turn)
            except Exception:
                pytest.fail("a close was caught")

    turns = in_turns(stubborn)
    next(turns)
    turns.close()
    assert list(turns) == []


def test_an_error_of_the_call_comes_out() -> None:
    """At the turn in which it happens."""

    def failing(pause: Callable[[int], None]) -> None:
        pause(1)
        raise ValueError("the second turn")

    turns = in_turns(failing, "failing")
    assert next(turns) == 1
    with pytest.raises(ValueError, match="the second turn"):
        next(turns)
    assert "failing" not in names()
