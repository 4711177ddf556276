"""When each waiting job will be done."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kinema.bench.simulate import SimulatedVideo, Simulation
from kinema.ids import JobId
from kinema.job import share_of
from kinema.jobs.store import ActiveJob, Arrivals
from kinema.request.request import Priority
from kinema.service.outlook import Capacity, Outlook, outlooks, work_until_end
from kinema.worker.scheduler import OLDEST_SHARE, WEIGHTS


def waiting(name: str, work: float, priority: Priority = "normal") -> ActiveJob:
    return ActiveJob(JobId(name), "fake", "", work, 0, is_waiting=True, priority=priority)


def running(name: str, work: float, progress: int = 0) -> ActiveJob:
    return ActiveJob(JobId(name), "fake", "", work, progress, is_waiting=False)


@pytest.mark.parametrize(
    ("jobs", "capacity", "ends"),
    [
        ([], Capacity(), {}),
        ([running("a", 100, progress=49)], Capacity(), {"a": 50}),
        # The shorter one goes first, wherever it stands.
        ([running("a", 100), running("b", 10)], Capacity(num_slots=2), {"a": 110, "b": 10}),
        # One that waits for a slot goes on as soon as it has one.
        ([running("a", 100), waiting("b", 10)], Capacity(num_slots=2), {"a": 110, "b": 10}),
        ([running("a", 100), waiting("b", 10)], Capacity(num_slots=1), {"a": 100, "b": 110}),
        ([running("a", 50), running("b", 100), waiting("c", 10)], Capacity(num_slots=2), {"a": 50, "c": 60, "b": 160}),
        # One that has less left goes on.
        ([running("a", 100, progress=49), running("b", 60)], Capacity(num_slots=2), {"a": 50, "b": 110}),
        # Two devices.
        ([running("a", 100), running("b", 10)], Capacity(2, 2), {"a": 100, "b": 10}),
        ([running("a", 100), running("b", 10), waiting("c", 20)], Capacity(2, 2), {"a": 100, "b": 10, "c": 30}),
        # The oldest keeps its share, in a thousand turns when its steps are not known: 99 of them in 40.
        (
            [running("a", 100), running("b", 40)],
            Capacity(num_slots=2, oldest_share=0.2),
            {"b": pytest.approx(49.9), "a": pytest.approx(140)},
        ),
        # Eight times the work, but wanted sooner.
        (
            [waiting("a", 70, "high"), waiting("b", 10)],
            Capacity(num_slots=2, weights=WEIGHTS),
            {"a": 70, "b": 80},
        ),
    ],
)
def test_when_each_is_done(jobs: list[ActiveJob], capacity: Capacity, ends: dict[str, float]) -> None:
    """In work of one device."""
    assert work_until_end(jobs, capacity) == ends


def in_steps(name: str, steps: int, step_work: float, *, decoding: float = 0.0, progress: int = 0) -> ActiveJob:
    return ActiveJob(
        id=JobId(name),
        model="fake",
        key_id="",
        work=steps * step_work + decoding,
        progress=progress,
        is_waiting=False,
        step_work=step_work,
        decoding_work=decoding,
    )


def of_key(key_id: str, name: str, *, is_waiting: bool = True, turn: int = 0) -> ActiveJob:
    return ActiveJob(JobId(name), "fake", key_id, 10, 0, is_waiting=is_waiting, turn=turn)


@pytest.mark.parametrize(
    ("jobs", "num_slots", "order"),
    [
        # They take turns, whoever sent more.
        ([of_key("a", "a1"), of_key("a", "a2"), of_key("a", "a3"), of_key("b", "b1")], 1, "a1 b1 a2 a3"),
        # The turn of the first one is over already.
        ([of_key("a", "a1", turn=7), of_key("a", "a2", turn=7), of_key("b", "b1", turn=6)], 1, "b1 a1 a2"),
        # One has places, the other has none.
        (
            [
                *(of_key("a", f"r{number}", is_waiting=False) for number in range(3)),
                *(of_key("a", f"a{number}") for number in range(2)),
                *(of_key("b", f"b{number}", turn=9) for number in range(3)),
            ],
            5,
            "b0 b1 a0 b2 a1",
        ),
    ],
)
def test_the_places_of_keys_in_the_queue(jobs: list[ActiveJob], num_slots: int, order: str) -> None:
    """They are those of the claims, not of age alone; and what comes later ends later."""
    told = outlooks(jobs, {"fake": 1.0}, {"fake": Capacity(num_slots=num_slots)})
    places = {told[JobId(name)].queue_position: told[JobId(name)].eta_s for name in order.split()}
    assert [*places] == [*range(1, len(places) + 1)]
    etas = [*places.values()]
    assert etas == sorted(etas, key=lambda eta_s: eta_s or 0.0)


@pytest.mark.parametrize(
    ("long", "short", "end"),
    [
        # A turn of the oldest is earned by five of the same length, the next by four more.
        (in_steps("a", 100, 1.0), in_steps("b", 5, 1.0), 5),
        (in_steps("a", 100, 1.0), in_steps("b", 6, 1.0), 7),
        (in_steps("a", 100, 1.0), in_steps("b", 9, 1.0), 10),
        (in_steps("a", 100, 1.0), in_steps("b", 10, 1.0), 12),
        (in_steps("a", 100, 1.0), in_steps("b", 20, 1.0), 24),
        # A long turn takes long to earn.
        (in_steps("a", 100, 8.0), in_steps("b", 40, 1.0), 40),
        (in_steps("a", 100, 8.0), in_steps("b", 41, 1.0), 49),
        # Nothing comes in between while it is decoded.
        (in_steps("a", 100, 1.0), in_steps("b", 5, 1.0, decoding=50.0), 55),
        # Half of the long one's turn is over, in the mean, and half of it is still to come.
        (in_steps("a", 100, 1.0, progress=1), in_steps("b", 5, 1.0), 5.5),
        # Turns begin between two steps of the other one: here one does, where three are earned before its end.
        (in_steps("a", 15, 1.0), in_steps("b", 2, 7.0), 15),
        # It is the other one's turn, of which half is over; when it ends, the oldest has earned its own, in the mean.
        (in_steps("a", 100, 1.0), in_steps("b", 6, 2.0, progress=49), 6),
        # It is the other one that is being decoded.
        (in_steps("a", 100, 8.0, progress=49), in_steps("b", 5, 1.0, decoding=15.0, progress=49), 10),
    ],
)
def test_the_oldest_has_the_turns_that_it_earns(long: ActiveJob, short: ActiveJob, end: float) -> None:
    """As the scheduler gives them, not as a part of each second."""
    ends = work_until_end([long, short], Capacity(num_slots=2, oldest_share=OLDEST_SHARE))
    assert ends["b"] == pytest.approx(end)


# The number of a video's steps, the length of one and of its decode. A fifth of each length is a whole number, so that
# what the oldest is owed is counted without rounding.
lengths = st.integers(1, 9).map(lambda number: 5 * number)
decodes = st.integers(0, 9).map(lambda number: 5 * number)
videos_in_steps = st.tuples(st.integers(1, 60), lengths, decodes)


def simulated(name: str, steps: int, step_s: int, decode_s: int) -> SimulatedVideo:
    turns_s = [step_s] * steps + [decode_s] * bool(decode_s)
    return SimulatedVideo(0.0, name, turns_s, num_chunks=int(decode_s > 0))


@given(long=videos_in_steps, short=videos_in_steps)
# A step of the short one is long, and the turns of the long one wait until it ends.
@example(long=(15, 5, 0), short=(2, 35, 0))
@example(long=(60, 5, 0), short=(10, 25, 10))
# The long one comes to its decode while the short one still has steps.
@example(long=(1, 5, 45), short=(9, 5, 0))
@example(long=(2, 5, 45), short=(10, 5, 0))
# Both have as much to do.
@example(long=(10, 5, 0), short=(5, 10, 0))
def test_two_end_when_the_scheduler_ends_them(long: tuple[int, int, int], short: tuple[int, int, int]) -> None:
    """Turn by turn, to the second."""
    jobs = [in_steps("a", *long[:2], decoding=long[2]), in_steps("b", *short[:2], decoding=short[2])]
    made = Simulation().run([simulated("a", *long), simulated("b", *short)])
    ends = work_until_end(jobs, Capacity(num_slots=2, oldest_share=OLDEST_SHARE))
    assert ends == {"a": pytest.approx(made[0].latency_s), "b": pytest.approx(made[1].latency_s)}


@pytest.mark.parametrize(
    ("jobs", "num_slots", "ends"),
    [
        ([running("a", 50)], 2, {"a": pytest.approx(100)}),
        # A short one is not overtaken by others of its kind.
        ([running("a", 10)], 2, {"a": 10}),
        # There is no place for others until one ends.
        ([running("a", 50), running("b", 10)], 2, {"b": 10, "a": pytest.approx(10 + 100)}),
        ([running("a", 100)], 1, {"a": 100}),
        # For so long a job it may be a burst: it is spread over a quarter of an hour.
        ([running("a", 300)], 2, {"a": pytest.approx(300 / (1 - 100 / 900))}),
    ],
)
def test_those_to_come_overtake_as_those_of_late_did(
    jobs: list[ActiveJob], num_slots: int, ends: dict[str, float]
) -> None:
    """Ten jobs in 200 seconds, each of 10 seconds, take half of a device."""
    capacity = Capacity(num_slots=num_slots, arrivals=Arrivals([10.0] * 10, within_s=200.0))
    assert work_until_end(jobs, capacity) == ends


def test_many_that_came_lately_are_a_stream_for_any_job() -> None:
    """A hundred in 200 seconds, each of a second, leave half of the device; in one second they are a burst."""
    job = running("a", 300)
    stream, burst = (Capacity(num_slots=2, arrivals=Arrivals([1.0] * 100, within_s)) for within_s in (200.0, 1.0))
    assert work_until_end([job], stream) == {"a": pytest.approx(600)}
    assert work_until_end([job], burst) == {"a": pytest.approx(300 / (1 - 100 / 900))}


def test_places_and_seconds() -> None:
    """By model; seconds only where a video was timed."""
    other = ActiveJob(JobId("x"), "other", "", 10, 0, is_waiting=True)
    jobs = [running("a", 100, progress=49), waiting("b", 10), other, waiting("c", 200)]
    found = outlooks(jobs, {"fake": 2.0, "other": None}, {"fake": Capacity(num_slots=1)})
    assert found == {
        "a": Outlook(None, 100.0),
        "b": Outlook(1, 120.0),
        "c": Outlook(2, 520.0),
        "x": Outlook(1, None),
    }


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_end_of_a_long_line_is_that_of_the_whole_play(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the first ends, jobs are expected one after the other. Where each device takes one job at a time this is
    the same order, and the same ends."""
    lengths = [10.0 + number % 7 for number in range(60)]
    jobs = [ActiveJob(JobId(str(n)), "fake", "ab"[n % 2], work, 0, n >= num_workers) for n, work in enumerate(lengths)]
    capacities = {"fake": Capacity(num_workers, num_workers)}
    whole = outlooks(jobs, {"fake": 1.0}, capacities)
    monkeypatch.setattr("kinema.service.outlook._MOST_ENDS", 5)
    assert outlooks(jobs, {"fake": 1.0}, capacities) == whole


jobs_of = st.lists(st.tuples(st.floats(0.001, 1e6), st.integers(0, 99), st.booleans()), max_size=20)


@given(
    drawn=jobs_of, num_workers=st.integers(0, 3), num_slots=st.integers(0, 9), oldest_share=st.sampled_from([0, 0.2])
)
def test_every_job_ends_and_no_device_idles(
    drawn: list[tuple[float, int, bool]], num_workers: int, num_slots: int, oldest_share: float
) -> None:
    """Alone on its devices none is done sooner than its own work takes, and all are done with the sum on one."""
    jobs = [
        ActiveJob(JobId(str(n)), "fake", "", work, 0 if is_waiting else progress, is_waiting)
        for n, (work, progress, is_waiting) in enumerate(drawn)
    ]
    ends = work_until_end(jobs, Capacity(num_workers, num_slots, oldest_share))
    left = {job.id: job.work * (1 - share_of(job.progress)) for job in jobs}
    assert ends.keys() == left.keys()
    assert all(ends[name] >= work * (1 - 1e-6) for name, work in left.items())
    if num_workers <= 1 and jobs:
        assert max(ends.values()) == pytest.approx(sum(left.values()))


@given(
    drawn=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(0, 9), st.integers(0, 99)), min_size=1, max_size=12
    ),
    num_workers=st.integers(0, 3),
    num_slots=st.integers(1, 12),
)
def test_turns_are_given_to_somebody(drawn: list[tuple[int, int, int, int]], num_workers: int, num_slots: int) -> None:
    """The same of jobs in steps, whatever turns the oldest has in between; of a turn under way half may be over."""
    jobs = [
        in_steps(str(n), steps, step, decoding=decode, progress=done)
        for n, (steps, step, decode, done) in enumerate(drawn)
    ]
    ends = work_until_end(jobs, Capacity(num_workers, num_slots, OLDEST_SHARE))
    left = {job.id: job.work * (1 - share_of(job.progress)) for job in jobs}
    half = max((job.step_work / 2 for job in jobs if job.progress), default=0.0)
    assert ends.keys() == left.keys()
    assert all(ends[name] >= work * (1 - 1e-6) - half for name, work in left.items())
    if num_workers <= 1:
        assert sum(left.values()) * (1 - 1e-6) - half <= max(ends.values()) <= sum(left.values()) * (1 + 1e-6) + half


def test_in_another_unit_the_ends_are_the_same() -> None:
    """Its steps and its decode are counted in that unit as well."""
    jobs = [in_steps("a", 100, 8.0, decoding=20.0, progress=1), in_steps("b", 41, 1.0, decoding=9.0)]
    capacity = Capacity(num_slots=2, oldest_share=OLDEST_SHARE)
    ends = work_until_end(jobs, capacity)
    assert work_until_end([job.taking(job.work / 4) for job in jobs], capacity) == {
        name: pytest.approx(end / 4) for name, end in ends.items()
    }
