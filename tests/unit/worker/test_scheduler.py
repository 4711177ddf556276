"""Whose step runs next."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.request.request import Priority
from kinema.worker.scheduler import OLDEST_SHARE, POLICIES, Candidate, Policy, StepScheduler

PAGE = (Path(__file__).parents[3] / "docs/scheduling.md").read_text(encoding="utf-8")


def long(key: int, **changes: object) -> Candidate:
    return replace(Candidate(key, remaining_s=100.0, next_turn_s=10.0), **changes)  # type: ignore[arg-type]


def short(key: int, **changes: object) -> Candidate:
    return replace(Candidate(key, remaining_s=5.0, next_turn_s=1.0), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([], None),
        ([long(1)], 1),
        ([long(1), short(2)], 2),
        ([short(2), long(1)], 2),
        ([long(1), long(2)], 1),
        ([short(1), short(2, remaining_s=4.9)], 2),
        # Whoever is decoded ends first, however much there is of it.
        ([short(1), long(2, is_decoding=True)], 2),
        # Eight times the work is as urgent at the next priority.
        ([long(1, priority="high"), short(2)], 2),
        ([long(1, priority="high", remaining_s=39.0), short(2)], 1),
        ([short(1, priority="low"), long(2)], 1),
        ([short(1, priority="low"), long(2, remaining_s=39.0)], 2),
        ([long(1, priority="low"), long(2), long(3, priority="high")], 3),
        # A tenant with many is not served before one with few.
        ([short(1, tenant="a"), short(2, tenant="a"), short(3, tenant="b", remaining_s=4.0)], 3),
        ([short(1, tenant="a"), short(2, tenant="a", remaining_s=4.0), short(3, tenant="b", remaining_s=8.0)], 2),
    ],
)
def test_what_is_done_first_goes_next(candidates: list[Candidate], expected: int | None) -> None:
    """With nothing else to tell them apart, the one that was admitted first."""
    assert StepScheduler().choose(candidates) == expected


@pytest.mark.parametrize(
    ("deadline_at", "expected"),
    [
        (None, 2),
        (1000.0, 2),  # far away
        (136.0, 2),  # the long one can wait a little: 100 s of work, a quarter of it for the oldest, a turn of 10 s
        (135.0, 1),  # and now it cannot
        (100.0, 1),
        (91.0, 1),  # a tenth late by a prediction that may be wrong
        (89.0, 2),  # lost anyway
        (-50.0, 2),
    ],
)
def test_a_deadline_counts_when_it_would_be_missed(deadline_at: float | None, expected: int) -> None:
    """Not before, and not when it is lost."""
    assert StepScheduler().choose([long(1, deadline_at=deadline_at), short(2)], now=0.0) == expected


def test_of_two_deadlines_the_earlier_goes_first() -> None:
    """Whoever came first."""
    first, second = long(1, deadline_at=120.0), long(2, deadline_at=110.0)
    assert StepScheduler().choose([first, second, short(3)], now=0.0) == 2


@pytest.mark.parametrize(
    ("policy", "expected"), [("fifo", [1, 1, 1, 1]), ("round-robin", [2, 3, 1, 2]), ("shortest", [2, 2, 2, 2])]
)
def test_policies(policy: Policy, expected: list[int]) -> None:
    """Three that came one after the other; the first has had a turn."""
    scheduler, last_turns, served = StepScheduler(policy), {1: 1, 2: 0, 3: 0}, []
    for turn in range(2, 6):
        remaining_s = {1: 100.0, 2: 10.0, 3: 50.0}
        key = scheduler.choose([Candidate(key, remaining_s[key], 2.0, last) for key, last in last_turns.items()])
        assert key is not None
        last_turns[key] = turn
        served.append(key)
    assert served == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_the_timeline_of_the_page_is_what_the_policy_does(policy: Policy) -> None:
    """Steps of one second: L has 20 from the start, S has 8 and arrives after five seconds."""
    drawn = re.search(rf"^{policy} +([LS]+) +S is done +(\d+) s", PAGE, re.MULTILINE)
    assert drawn is not None
    scheduler, done = StepScheduler(policy), ""
    while len(done) < 28:
        left = {"L": 20 - done.count("L"), "S": 8 - done.count("S") if len(done) >= 5 else 0}
        chosen = scheduler.choose(
            [Candidate("LS".index(name), num, 1.0, done.rfind(name) + 1) for name, num in left.items() if num]
        )
        assert chosen is not None
        scheduler.charge(chosen, 1.0)
        done += "LS"[chosen]
        if left["LS"[chosen]] == 1:
            scheduler.end(chosen)
    assert (done, done.rfind("S") + 1 - 5) == (drawn[1], int(drawn[2]))


def test_the_example_of_the_page_for_two_keys() -> None:
    """A's short video, B's, A's long one; B's first when A had 40 s more than B before."""
    assert "The numbers are 10, 60 (= 10 + 50) and 30." in PAGE
    assert "the numbers would be 50, 100 and 30" in PAGE
    a_short, a_long = Candidate(1, 10.0, 1.0, tenant="a"), Candidate(2, 50.0, 1.0, tenant="a")
    b = Candidate(3, 30.0, 1.0, tenant="b")
    scheduler = StepScheduler()
    assert scheduler.choose([a_long, a_short, b]) == a_short.key
    assert scheduler.choose([a_long, b]) == b.key
    earlier = Candidate(4, 0.5, 1.0, tenant="a")
    assert scheduler.choose([earlier, a_long, a_short, b]) == earlier.key
    scheduler.charge(earlier.key, 40.0)
    scheduler.end(earlier.key, "a")
    assert scheduler.choose([a_long, a_short, b]) == b.key


def test_the_oldest_has_its_share() -> None:
    """A fifth of the device, turn by turn, while shorter ones keep coming; it is paid in advance."""
    scheduler, served = StepScheduler(), Counter[int]()
    order = []
    for turn in range(60):
        key = scheduler.choose([Candidate(1, 1000.0, 2.0), Candidate(100 + turn // 5, 5.0, 1.0)])
        assert key is not None
        seconds = 2.0 if key == 1 else 1.0
        scheduler.charge(key, seconds)
        served[key == 1] += seconds
        order.append(key == 1)
    assert order.index(True) in (10, 11)  # ten seconds of others have earned it two
    assert served[True] / served.total() == pytest.approx(OLDEST_SHARE, abs=0.04)


def test_what_the_oldest_had_by_its_turn_is_not_owed_again() -> None:
    """A long one that was alone for an hour does not hold up the short one that comes then."""
    scheduler = StepScheduler()
    for _ in range(100):
        assert scheduler.choose([long(1), long(2)]) == 1
        scheduler.charge(1, 10.0)
    assert scheduler.choose([long(1), short(2)]) == 2


def test_a_tenant_that_had_much_is_served_after_one_that_had_little() -> None:
    """Each short video of the first is short, but together they are not."""
    scheduler, order = StepScheduler(), []
    for number in range(60):
        key = scheduler.choose([Candidate(1, 20.0, 20.0, tenant="b"), Candidate(100 + number, 5.0, 5.0, tenant="a")])
        assert key is not None
        order.append(key)
        scheduler.charge(key, 20.0 if key == 1 else 5.0)
        scheduler.end(key, "b" if key == 1 else "a")
        if key == 1:
            break
    assert order == [100, 101, 102, 1]  # the next would make it 20 s, too, and the other came first


def test_a_tenant_that_was_away_is_owed_nothing() -> None:
    """It is served as one that had as much as the least served."""
    scheduler = StepScheduler()
    scheduler.choose([long(1, tenant="a"), long(2, tenant="b")])
    for key, tenant in ((1, "a"), (2, "b")):
        scheduler.charge(key, 100.0)
        scheduler.end(key, tenant)
    # Both had 100 s; a newcomer does not begin 100 s behind.
    waiting = [short(3, tenant="a", remaining_s=30.0), short(4, tenant="b", remaining_s=40.0)]
    assert scheduler.choose(waiting) == 3
    assert scheduler.choose([*waiting, short(5, tenant="c", remaining_s=50.0)]) == 3


@dataclass
class Made:
    """A generation as a property test draws it: turns in seconds, the last of them a decode."""

    turns: list[float]
    num_decoding: int
    priority: Priority
    tenant: str
    deadline_s: float | None
    error: float
    done: int = 0
    admitted_at: float = 0.0
    bound_s: float = field(default=0.0)

    @property
    def left_s(self) -> float:
        return sum(self.turns[self.done :])

    def candidate(self, key: int) -> Candidate:
        """As predicted, which may be wrong by half or by twice."""
        return Candidate(
            key,
            remaining_s=self.left_s * self.error,
            next_turn_s=self.turns[self.done] * self.error,
            is_decoding=self.done >= len(self.turns) - self.num_decoding,
            tenant=self.tenant,
            priority=self.priority,
            deadline_at=None if self.deadline_s is None else self.admitted_at + self.deadline_s,
        )


made = st.builds(
    lambda step_s, steps, chunks, **rest: Made([step_s] * steps + [step_s] * chunks, chunks, **rest),
    step_s=st.sampled_from([0.1, 1.0, 7.0]),
    steps=st.integers(1, 12),
    chunks=st.integers(1, 3),
    priority=st.sampled_from(["low", "normal", "high"]),
    tenant=st.sampled_from(["a", "b", "c"]),
    deadline_s=st.none() | st.floats(1, 200),
    error=st.sampled_from([0.5, 1.0, 2.0]),
)
stream = st.lists(st.tuples(st.integers(0, 8), made), min_size=1, max_size=60)


@given(stream=stream, max_active=st.integers(2, 8))
def test_nobody_starves(stream: list[tuple[int, Made]], max_active: int) -> None:
    """The bound of the docstring, for every generation, whatever comes with whatever priority, size and deadline."""
    scheduler, waiting, active = StepScheduler(), list(enumerate(stream)), dict[int, Made]()
    longest_s = max(max(sum(one.turns[-one.num_decoding :]), one.turns[0]) * max(one.error, 1.0) for _, one in stream)
    now, pause = 0.0, 0
    while waiting or active:
        # Each comes some turns after the one before it, once there is room.
        while waiting and len(active) < max_active and (pause >= waiting[0][1][0] or not active):
            key, (_, one) = waiting.pop(0)
            before_s = sum(other.left_s for other in active.values())
            one.admitted_at, pause = now, 0
            one.bound_s = (before_s + one.left_s) / OLDEST_SHARE + 7 * longest_s
            active[key] = one
        key = scheduler.choose([one.candidate(key) for key, one in active.items()], now)
        assert key is not None
        one = active[key]
        seconds = one.turns[one.done]
        scheduler.charge(key, seconds)
        now, pause = now + seconds, pause + 1
        one.done += 1
        if one.done == len(one.turns):
            del active[key]
            scheduler.end(key, one.tenant)
            assert now - one.admitted_at <= one.bound_s + 1e-6


@given(num=st.integers(2, 8), num_turns=st.integers(0, 40))
def test_round_robin_serves_nobody_twice_more_than_another(num: int, num_turns: int) -> None:
    """Counts differ by at most 1."""
    scheduler, last_turns, counts = StepScheduler("round-robin"), dict.fromkeys(range(num), 0), Counter[int]()
    for turn in range(1, num_turns + 1):
        key = scheduler.choose([Candidate(key, last_turn=last) for key, last in last_turns.items()])
        assert key is not None
        last_turns[key] = turn
        counts[key] += 1
    everyone = [counts[key] for key in last_turns]
    assert max(everyone) - min(everyone) <= 1


@given(candidates=st.lists(made, min_size=1, max_size=8), policy=st.sampled_from(["shortest", "fifo", "round-robin"]))
def test_somebody_is_always_chosen(candidates: list[Made], policy: Policy) -> None:
    """The device never idles while there is work, whatever the policy: that is where throughput would be lost."""
    scheduler = StepScheduler(policy)
    keys = [scheduler.choose([one.candidate(key) for key, one in enumerate(candidates)]) for _ in range(3)]
    assert set(keys) <= set(range(len(candidates)))
