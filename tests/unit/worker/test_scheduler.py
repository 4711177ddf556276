"""Whose step runs next."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.worker.scheduler import Candidate, StepScheduler


@pytest.mark.parametrize(
    ("last_turns", "expected"),
    [
        ({}, None),
        ({1: 0}, 1),
        ({1: 5}, 1),
        ({1: 4, 2: 3}, 2),
        ({1: 3, 2: 4}, 1),
        ({1: 4, 2: 5, 3: 0}, 3),
        ({1: 0, 2: 0}, 1),
        ({2: 0, 1: 0}, 2),
        ({1: 9, 2: 7, 3: 8}, 2),
    ],
)
def test_who_waited_longest_goes_next(last_turns: dict[int, int], expected: int | None) -> None:
    """A newcomer goes before all others, and the earlier admitted before the later."""
    candidates = [Candidate(key, turn) for key, turn in last_turns.items()]
    assert StepScheduler().choose(candidates) == expected


def serve(last_turns: dict[int, int], num_turns: int, first_turn: int) -> list[int]:
    """Let the scheduler choose ``num_turns`` times; ``last_turns`` is brought up to date."""
    served = []
    for turn in range(first_turn, first_turn + num_turns):
        key = StepScheduler().choose([Candidate(key, last) for key, last in last_turns.items()])
        assert key is not None
        last_turns[key] = turn
        served.append(key)
    return served


histories = st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(
    lambda turns: len([turn for turn in turns if turn]) == len({turn for turn in turns if turn})
)


@given(history=histories, num_turns=st.integers(0, 40))
def test_nobody_is_served_twice_more_than_another(history: list[int], num_turns: int) -> None:
    """Whatever happened before: after n choices among the same candidates, counts differ by at most 1."""
    last_turns = dict(enumerate(history))
    counts = Counter(serve(last_turns, num_turns, first_turn=51))
    everyone = [counts[key] for key in last_turns]
    assert max(everyone) - min(everyone) <= 1


@given(history=histories)
def test_a_newcomer_is_served_within_one_round(history: list[int]) -> None:
    """At once, in fact, unless others wait for their first turn as well."""
    last_turns = {**dict(enumerate(history)), 99: 0}
    assert 99 in serve(last_turns, num_turns=len(last_turns), first_turn=51)
