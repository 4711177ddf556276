"""Where a new job would stand in a long line."""

from __future__ import annotations

import pytest

from kinema.ids import JobId
from kinema.jobs.store import PRIORITIES, ActiveJob
from kinema.request.request import Priority
from kinema.service.outlook import Capacity, work_until_end
from kinema.service.places import Places


def job(name: str, key_id: str, priority: Priority = "normal", *, is_waiting: bool = True) -> ActiveJob:
    return ActiveJob(JobId(name), "fake", key_id, 10.0, 0, is_waiting, priority=priority)


def begins(jobs: list[ActiveJob]) -> dict[JobId, float]:
    """When each begins on one device, which takes one at a time."""
    return {name: end - 10.0 for name, end in work_until_end(jobs, Capacity(num_slots=1)).items()}


@pytest.mark.parametrize("key_id", ["a", "b", "new"])
@pytest.mark.parametrize("priority", ["high", "normal", "low"])
def test_a_new_job_begins_about_when_it_would_if_it_were_there(key_id: str, priority: Priority) -> None:
    """A key with many jobs, one with few and one with none: within two jobs of the whole line played anew."""
    line = [job("r", "a", is_waiting=False), job("h", "a", "high"), *(job(f"a{n}", "a") for n in range(50))]
    line += [*(job(f"b{n}", "b") for n in range(10)), *(job(f"l{n}", "a", "low") for n in range(5))]
    predicted = Places(line, begins(line), 10.0 * len(line)).begin_s(key_id, priority)
    with_it = sorted([*line, job("new", key_id, priority)], key=lambda one: PRIORITIES.index(one.priority))
    assert predicted == pytest.approx(begins(with_it)[JobId("new")], abs=20.0)


def test_before_all_others_it_begins_when_a_place_is_free() -> None:
    """A job of a higher priority does not wait for the line."""
    line = [job("r", "a", is_waiting=False), job("n", "a")]
    assert Places(line, begins(line), 20.0).begin_s("b", "high") == 10.0
