"""The recorder of one run's events, before a store that is as slow, or as far away, as the test says."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import cast

import pytest

from kinema.errors import StoreUnavailable
from kinema.events import Cancelled, Event, Progress, Started
from kinema.ids import JobId
from kinema.jobs.recorder import Recorder
from kinema.jobs.store import JobStore
from tests.serving import make_job, until

STARTED = Started(worker_id="w", attempt=1)
FIRST, SECOND, THIRD = (Progress(stage="denoise", step=step, total=3) for step in (1, 2, 3))


@dataclass
class Ledger:
    """The part of a store that a recorder writes to. A write waits for ``is_open``; what ``troubles`` has is raised."""

    writes: list[list[Event]] = field(default_factory=list)
    troubles: list[Exception] = field(default_factory=list)
    attempts: set[int | None] = field(default_factory=set)
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    takes: bool = True
    num_asked: int = 0

    async def record(self, _job_id: JobId, *happened: Event, attempt: int | None = None) -> bool:
        self.num_asked += 1
        self.attempts.add(attempt)
        await self.is_open.wait()
        if self.troubles:
            raise self.troubles.pop(0)
        if self.takes:
            self.writes.append(list(happened))
        return self.takes


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def refusals() -> list[str]:
    return []


@pytest.fixture
def recorder(ledger: Ledger, refusals: list[str]) -> Recorder:
    async def on_refused() -> None:
        refusals.append("refused")

    return Recorder(cast(JobStore, ledger), make_job(attempt=3), on_refused)


async def test_what_comes_during_a_write_shares_the_next_one(recorder: Recorder, ledger: Ledger) -> None:
    """In order, each once, for the attempt that it came from; nobody waits for a write."""
    recorder.add(STARTED)
    await until(lambda: ledger.num_asked)
    for event in (FIRST, SECOND, THIRD):
        recorder.add(event)
    ledger.is_open.set()
    await until(lambda: len(ledger.writes) == 2)
    assert ledger.writes == [[STARTED], [FIRST, SECOND, THIRD]]
    assert ledger.attempts == {3}


async def test_what_comes_in_a_pause_shares_the_next_write(ledger: Ledger) -> None:
    """The first event is written at once, and the end does not wait for the pause."""
    recorder = Recorder(
        cast(JobStore, ledger), make_job(attempt=3), on_refused=asyncio.Event().wait, pause_s=lambda: 60
    )
    ledger.is_open.set()
    recorder.add(STARTED)
    await until(lambda: len(ledger.writes) == 1)
    for event in (FIRST, SECOND):
        recorder.add(event)
    async with asyncio.timeout(20):
        assert await recorder.finish(THIRD)
    assert ledger.writes == [[STARTED], [FIRST, SECOND, THIRD]]


async def test_an_event_after_a_silence_is_written_at_once(recorder: Recorder, ledger: Ledger) -> None:
    """Not only when the next one comes, nor at the end."""
    ledger.is_open.set()
    for number, event in enumerate((STARTED, FIRST, SECOND), start=1):
        recorder.add(event)
        await until(lambda number=number: len(ledger.writes) == number)
    assert ledger.writes == [[STARTED], [FIRST], [SECOND]]


async def test_the_end_shares_a_write_with_what_came_before_it(recorder: Recorder, ledger: Ledger) -> None:
    """After the write that is under way, and only then."""
    recorder.add(STARTED)
    await until(lambda: ledger.num_asked)
    recorder.add(FIRST)
    ending = asyncio.create_task(recorder.finish(Cancelled()))
    await asyncio.sleep(0)
    assert ledger.num_asked == 1
    ledger.is_open.set()
    assert await ending
    assert ledger.writes == [[STARTED], [FIRST, Cancelled()]]


async def test_an_end_without_an_event_of_its_own_writes_what_is_left(recorder: Recorder, ledger: Ledger) -> None:
    """An attempt that was lost has happened too; where nothing is left, nothing is written."""
    ledger.is_open.set()
    recorder.add(STARTED)
    recorder.add(FIRST)
    assert await recorder.finish()
    assert [event for write in ledger.writes for event in write] == [STARTED, FIRST]
    num_writes = len(ledger.writes)
    assert await recorder.finish()
    assert len(ledger.writes) == num_writes


async def test_a_store_that_is_away_costs_no_event(
    recorder: Recorder, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written is written first when the store is back."""
    monkeypatch.setattr("kinema.jobs.recorder._RETRY_S", 0.01)
    ledger.troubles = [StoreUnavailable(), StoreUnavailable()]
    recorder.add(STARTED)
    await until(lambda: ledger.num_asked)
    recorder.add(FIRST)
    ledger.is_open.set()
    await until(lambda: ledger.writes)
    assert ledger.writes == [[STARTED, FIRST]]


async def test_an_end_does_not_wait_for_the_next_try(recorder: Recorder, ledger: Ledger) -> None:
    """It tries itself, says that the store is away, and loses nothing when it is called again."""
    ledger.troubles = [StoreUnavailable(), StoreUnavailable()]
    ledger.is_open.set()
    recorder.add(STARTED)
    await until(lambda: len(ledger.troubles) == 1)
    with pytest.raises(StoreUnavailable):
        await recorder.finish(Cancelled())
    assert await recorder.finish(Cancelled())
    assert ledger.writes == [[STARTED, Cancelled()]]


async def test_a_refusal_is_told_once(recorder: Recorder, ledger: Ledger, refusals: list[str]) -> None:
    """However many events the store refuses; the end is refused too."""
    ledger.takes = False
    ledger.is_open.set()
    recorder.add(STARTED)
    await until(lambda: recorder.is_refused)
    recorder.add(FIRST)
    assert not await recorder.finish(Cancelled())
    assert refusals == ["refused"]
    assert ledger.writes == []


async def test_our_own_mistake_does_not_pass_for_a_record(recorder: Recorder, ledger: Ledger) -> None:
    """Neither the next event nor the end is taken as if those before it were written."""
    ledger.troubles = [AssertionError("a mistake")]
    ledger.is_open.set()
    recorder.add(STARTED)
    await until(lambda: not ledger.troubles)
    await asyncio.sleep(0)
    with pytest.raises(AssertionError):
        recorder.add(FIRST)
    with pytest.raises(AssertionError):
        await recorder.finish(Cancelled())
    assert ledger.writes == []
