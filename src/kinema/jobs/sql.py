"""The job store on SQLAlchemy Core.

Every status comes from ``job.advance``, with one exception: ``claim`` is a single UPDATE that takes the job and puts
it in progress. A released job keeps its status and loses its owner. Then it waits for the next claim, like a queued
job. Writes of this process wake its waiters; a slow poll sees the writes of other processes.

Leases go by the clock of the database. The times that clients see are those of this server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence, Set
from contextlib import suppress
from datetime import date

from sqlalchemy import (
    ColumnElement,
    and_,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    literal_column,
    select,
    true,
    tuple_,
    union,
    update,
)
from sqlalchemy.engine import Connection

from kinema.errors import JobNotFound
from kinema.events import Cancelled, Completed, Event, Failed, Preview, Progress, is_terminal
from kinema.ids import JobId, is_job_id
from kinema.job import Job, advance
from kinema.jobs import input_store
from kinema.jobs.admission import Admission, find_repeated
from kinema.jobs.changes import JobChanges, place_of, place_values
from kinema.jobs.claims import Claims, may_take
from kinema.jobs.conditions import is_active, is_completed, is_held, is_queued, is_waiting, is_waiting_again
from kinema.jobs.creation import JobCreation, NewJob
from kinema.jobs.database import Database, Writer, clock_of
from kinema.jobs.listing import JobPage, Wanted, read_page
from kinema.jobs.lookup import JobLookup
from kinema.jobs.retention import remember_deleted
from kinema.jobs.schema import (
    FIXED_COLUMNS,
    event_from_row,
    event_row,
    events,
    job_from_row,
    job_to_row,
    jobs,
    key_turns,
)
from kinema.jobs.signals import Signals
from kinema.jobs.store import PRIORITIES, ActiveJob, Arrivals, DayUsage, QueueLimits, StoredEvent, Submission
from kinema.jobs.usage import count_video, read_usage
from kinema.jobs.watching import Watchers
from kinema.jobs.webhook_store import enqueue as enqueue_webhooks

# The signal that a job may wait, beside the ids of jobs that have news.
_WORK = "work"
# All servers hear of each job that may wait. A dispatcher looks for it no more often than this.
_WORK_HEARD_S = 0.2
# Behind the id of a job that has not ended.
_GOES_ON = "+"
# Finished jobs that a prediction of times is made from: enough to have some of each kind.
_RECENT_JOBS = 50
# Latest jobs that a prediction of arrivals is made from.
_RECENT_ARRIVALS = 100
# The progress of a job is a change once in so many seconds.
_TOLD_S = 1.0
# Jobs whose time is kept for that; more than run at once.
_MOST_TOLD = 10_000
_BY_AGE = (jobs.c.rank, jobs.c.created_at, jobs.c.id)
_NO_LORAS: ColumnElement[str] = literal_column("''")  # as the index of the jobs with LoRAs says it


class SqlJobStore:
    """Implements ``JobStore``. Belongs to one event loop; ``open`` makes one, ``close`` ends it.

    A ``clock`` stands for that of this server and for that of the database.
    """

    def __init__(self, database: Database, clock: Callable[[], float] | None = None) -> None:
        self.database = database
        self._clock = clock or time.time
        # For leases: the time of the database, in statements.
        self._now = database.now if clock is None else clock_of(clock)
        self._creation = JobCreation(database, Admission(self._now), self._clock, self._has_created)
        self._claims = Claims(self._now)
        self._claim_was_empty = False
        self._lookup = JobLookup(database)
        self._watchers = Watchers(database)
        self._has_work = asyncio.Event()
        self._work_heard: asyncio.TimerHandle | None = None
        self.signals = Signals(database, self._hear)
        self.inputs = input_store.SqlInputStore(database, self._clock)
        self._place = place_of(database)
        # When jobs that go on were told of last, by the monotonic clock.
        self._told_at: dict[JobId, float] = {}
        self.changes = JobChanges(database, self._watchers)

    @classmethod
    async def open(cls, url: str, clock: Callable[[], float] | None = None) -> SqlJobStore:
        """Connect, and bring the tables to this version. Raises ConfigError when that cannot be done."""
        store = cls(await Database.open(url), clock)
        store.signals.start()
        return store

    async def close(self) -> None:
        """Stop watching, and close the database."""
        await self.signals.stop()
        await self._watchers.close()
        await self.database.close()

    def _wake(self, job_id: JobId, *, may_be_over: bool = True) -> None:
        """Wake those who wait for news of the job, here and in other processes."""
        self._watchers.wake_all_watching()
        self._watchers.wake(job_id, may_be_over=may_be_over)
        self.signals.tell(job_id if may_be_over else f"{job_id}{_GOES_ON}")

    def _tell_work(self) -> None:
        """Wake the dispatchers, here and in other processes."""
        self._watchers.wake_all_watching()
        self._has_work.set()
        self.signals.tell(_WORK)

    def _hear(self, words: Collection[str]) -> None:
        self._watchers.wake_all_watching()
        for word in words:
            if word != _WORK:
                self._watchers.wake(JobId(word.removesuffix(_GOES_ON)), may_be_over=not word.endswith(_GOES_ON))
            elif self._work_heard is None:
                self._work_heard = asyncio.get_running_loop().call_later(_WORK_HEARD_S, self._work_is_here)

    def _work_is_here(self) -> None:
        self._work_heard = None
        self._has_work.set()

    async def create(self, job: Job, *, limits: QueueLimits, submission: Submission | None = None) -> Job:
        return await self._creation.create(NewJob(job, limits, submission))

    def _has_created(self) -> None:
        self._claim_was_empty = False  # the next one is likely to find this
        self._tell_work()

    async def find_repeated(self, key_id: str, submission: Submission) -> Job | None:
        if submission.is_first:
            return None
        return await self.database.read(lambda connection: find_repeated(connection, key_id, submission, self._clock()))

    async def get(self, job_id: JobId) -> Job:
        job = await self._lookup.find(job_id) if is_job_id(job_id) else None
        if job is None:
            raise JobNotFound.named(job_id)
        return job

    async def list_page(
        self, key_id: str, *, after: JobId | None, limit: int, is_ascending: bool
    ) -> tuple[Sequence[Job], bool]:
        def transaction(connection: Connection) -> list[Job]:
            # Sorted as the index of keys and ids is. By the id alone, PostgreSQL would go through the jobs of all keys
            # where it expects to meet the key's soon.
            begin, end = jobs.c.key_id >= key_id, jobs.c.key_id <= key_id
            if after is not None:
                place, met = tuple_(jobs.c.key_id, jobs.c.id), tuple_(literal(key_id), literal(after))
                begin, end = (place > met, end) if is_ascending else (begin, place < met)
            query = select(jobs).where(begin, end)
            order = (jobs.c.key_id, jobs.c.id) if is_ascending else (jobs.c.key_id.desc(), jobs.c.id.desc())
            return [job_from_row(row) for row in connection.execute(query.order_by(*order).limit(limit + 1)).mappings()]

        found = await self.database.read(transaction)
        return found[:limit], len(found) > limit

    async def find_page(
        self, key_id: str, wanted: Wanted, *, after: JobId | None, limit: int, is_ascending: bool
    ) -> JobPage:
        return await self.database.read(
            lambda connection: read_page(connection, key_id, wanted, after, limit, is_ascending=is_ascending)
        )

    async def delete(self, job_id: JobId) -> Job:
        def transaction(connection: Connection) -> Job:
            job, _ = _find(connection, job_id, is_for_update=True)
            connection.execute(delete(jobs).where(jobs.c.id == job_id))
            input_store.forget_jobs(connection, [job], self._clock())
            remember_deleted(connection, self.database, [job], self._clock())
            return job

        job = await self.database.write(transaction, Writer.JOBS)
        self._wake(job_id)
        self._tell_work()
        self.inputs.has_dropped.set()
        return job

    async def active(self) -> Sequence[ActiveJob]:
        waits = case((is_waiting(self._now), 1), else_=0).label("is_waiting")
        columns = (jobs.c.id, jobs.c.model, jobs.c.key_id, jobs.c.work, jobs.c.progress, waits, jobs.c.rank)
        turn = func.coalesce(key_turns.c.turn, 0)
        is_its_key = and_(key_turns.c.model == jobs.c.model, key_turns.c.key_id == jobs.c.key_id)
        source = jobs.outerjoin(key_turns, is_its_key)
        query = select(*columns, jobs.c.step_work, jobs.c.decoding_work, turn).select_from(source).where(is_active())

        def transaction(connection: Connection) -> list[ActiveJob]:
            return [
                ActiveJob(JobId(id_), model, key_id, made, progress, bool(waits), PRIORITIES[rank], *rest)
                for id_, model, key_id, made, progress, waits, rank, *rest in connection.execute(
                    query.order_by(*_BY_AGE)
                )
            ]

        return await self.database.read(transaction)

    async def has_jobs_of(self, model: str) -> bool:
        query = select(exists().where(key_turns.c.model == model))
        return await self.database.read(lambda connection: bool(connection.execute(query).scalar_one()))

    async def recent_times(self, model: str) -> Sequence[tuple[float, float]]:
        def transaction(connection: Connection) -> list[tuple[float, float]]:
            is_meant = and_(is_completed(), jobs.c.model == model)
            query = select(jobs.c.work, jobs.c.timings).where(is_meant).order_by(jobs.c.created_at.desc())
            rows = connection.execute(query.limit(_RECENT_JOBS)).all()
            return [(row.work, _seconds(row.timings)) for row in reversed(rows)]

        return await self.database.read(transaction)

    async def recent_arrivals(self, model: str, within_s: float) -> Arrivals:
        now = self._clock()
        latest = select(jobs.c.work, jobs.c.created_at).where(jobs.c.model == model, jobs.c.created_at > now - within_s)
        latest = latest.order_by(jobs.c.created_at.desc()).limit(_RECENT_ARRIVALS)
        rows = await self.database.read(lambda connection: connection.execute(latest).all())
        return Arrivals.of([row.work for row in rows], now - rows[-1].created_at if rows else 0.0, within_s)

    async def waiting_loras(self, models: Sequence[str]) -> Sequence[tuple[str, str]]:
        needs = select(jobs.c.model, jobs.c.loras).where(jobs.c.model.in_(models), jobs.c.loras != _NO_LORAS)
        new, again = needs.where(is_queued()), needs.where(is_waiting_again(self._now))
        rows = await self.database.read(lambda connection: connection.execute(union(new, again)).all())
        return [(row.model, row.loras) for row in rows]

    async def claim(
        self,
        models: Sequence[str],
        owner: str,
        lease_s: float,
        *,
        without_losses: Sequence[str] = (),
        only_loras: Mapping[str, Collection[str]] | None = None,
        owners_have_workers: bool = True,
    ) -> Job | None:
        all_models = [*models, *without_losses]
        # Where a claim has found a job there is often another one; of many servers without work all but one find none.
        if self._claim_was_empty and not await self.database.read(
            lambda connection: may_take(connection, self._now, all_models, owner)
        ):
            return None
        job = await self.database.write(
            lambda connection: self._claims.take(
                connection, models, owner, lease_s, without_losses, only_loras or {}, owners_have_workers
            ),
            Writer.JOBS,
        )
        self._claim_was_empty = job is None
        return job

    async def wanted(self, owner: str) -> Set[tuple[JobId, int]]:
        query = select(jobs.c.id, jobs.c.attempt).where(is_held(owner), jobs.c.is_cancel_requested.is_(False))
        rows = await self.database.read(lambda connection: connection.execute(query).all())
        return {(JobId(row.id), row.attempt) for row in rows}

    async def renew(self, owner: str, lease_s: float) -> None:
        await self._change_held(owner, (), {"lease_until": self._now + lease_s})

    async def release(self, owner: str, *, keeping: Collection[JobId] = ()) -> None:
        await self._change_held(owner, keeping, {"owner": None, "lease_until": None})
        self._tell_work()

    async def _change_held(self, owner: str, keeping: Collection[JobId], values: Mapping[str, object]) -> None:
        """Change the jobs of this owner: first those that no transaction has locked, since a server that is frozen may
        have locked one for seconds, and then the others."""
        is_it = and_(is_held(owner), jobs.c.id.not_in(keeping))

        def change_free(connection: Connection) -> set[str]:
            free = set(connection.execute(select(jobs.c.id).where(is_it).with_for_update(skip_locked=True)).scalars())
            held = set(connection.execute(select(jobs.c.id).where(is_it)).scalars())
            connection.execute(update(jobs).where(is_it, jobs.c.id.in_(free)).values(values))
            return held - free

        locked = await self.database.write(change_free, Writer.LEASES)
        if locked:
            change = update(jobs).where(is_it, jobs.c.id.in_(locked)).values(values)
            await self.database.write(lambda connection: connection.execute(change), Writer.JOBS)

    async def give_back(
        self, owner: str, job_id: JobId, *, is_lost: bool, wait_s: float = 0.0, attempt: int | None = None
    ) -> None:
        def transaction(connection: Connection) -> None:
            # A lease without an owner is the rest of a job before its next claim.
            rests_until = self._now + wait_s if wait_s else None
            free = {"owner": None, "lease_until": rests_until, "losses": jobs.c.losses + int(is_lost)}
            is_it = and_(is_held(owner), jobs.c.id == job_id)
            if attempt is not None:
                is_it = and_(is_it, jobs.c.attempt == attempt)
            given_back = connection.execute(update(jobs).where(is_it).values(**free).returning(jobs)).mappings().first()
            if given_back is not None and given_back["is_cancel_requested"]:
                self._append(connection, job_from_row(given_back), [Cancelled()], given_back["last_seq"])

        await self.database.write(transaction, Writer.JOBS)
        self._wake(job_id)
        self.inputs.has_dropped.set()
        asyncio.get_running_loop().call_later(wait_s, self._tell_work)

    async def record(self, job_id: JobId, *happened: Event, attempt: int | None = None) -> bool:
        def transaction(connection: Connection) -> Job | None:
            try:
                job, last_seq = _find(connection, job_id, is_for_update=True)
            except JobNotFound:  # deleted while it ran
                return None
            if job.status.is_terminal or attempt not in (None, job.attempt):
                return None
            return self._append(connection, job, happened, last_seq)

        recorded = await self.database.write(transaction, Writer.JOBS)
        if recorded is None:
            return False
        if recorded.status.is_terminal:
            self._watchers.tell_end(recorded)
        self._wake(job_id, may_be_over=recorded.status.is_terminal)
        if isinstance(happened[-1], Cancelled):
            self.inputs.has_dropped.set()
        return True

    async def usage(self, key_id: str | None, first: date, last: date) -> Sequence[DayUsage]:
        return await read_usage(self.database, key_id, first, last)

    async def find_preview(self, job_id: JobId) -> Preview | None:
        def transaction(connection: Connection) -> Preview | None:
            query = select(events).where(_is_preview_of(job_id)).order_by(events.c.seq.desc()).limit(1)
            row = connection.execute(query).mappings().first()
            event = None if row is None else event_from_row(row)
            return event if isinstance(event, Preview) else None

        return await self.database.read(transaction)

    async def request_cancel(self, job_id: JobId) -> Job:
        def transaction(connection: Connection) -> Job:
            job, last_seq = _find(connection, job_id, is_for_update=True)
            if job.status.is_terminal:
                return job
            marked = job.model_copy(update={"is_cancel_requested": True})
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(is_cancel_requested=True))
            if _is_one_waiting(connection, job_id, self._now):
                return self._append(connection, marked, [Cancelled()], last_seq)
            return marked

        job = await self.database.write(transaction, Writer.JOBS)
        self._wake(job_id)
        self._tell_work()
        self.inputs.has_dropped.set()
        return job

    async def star(self, job_id: JobId, *, is_starred: bool) -> Job:
        def transaction(connection: Connection) -> Job:
            job, _ = _find(connection, job_id, is_for_update=True)
            if is_starred == (job.starred_at is not None):
                return job
            starred_at = self._clock() if is_starred else None
            change = update(jobs).where(jobs.c.id == job_id).values(starred_at=starred_at, place=self._place)
            connection.execute(change, self._place_values(job))
            return job.model_copy(update={"starred_at": starred_at})

        job = await self.database.write(transaction)
        self._wake(job_id, may_be_over=False)
        return job

    async def fail_waiting(self, created_before: float, failed: Failed, limit: int) -> Sequence[JobId]:
        # One priority after the other, as the index of jobs that have not ended has them.
        of_ranks = [and_(is_active(), jobs.c.rank == rank) for rank in range(len(PRIORITIES))]
        ended: list[JobId] = []
        for of_rank in of_ranks:
            # In this form no other index is used, and the rows come in their order.
            waits = case((is_waiting(self._now), 1), else_=0) == 1
            is_meant = and_(of_rank, jobs.c.created_at < created_before, waits)
            ended += await self._end_each(is_meant, failed, limit - len(ended))
        return ended

    async def _end_each(self, which: ColumnElement[bool], end: Failed, limit: int) -> Sequence[JobId]:
        """End these jobs, which are of one priority, the oldest first."""
        found = select(jobs.c.id).where(which).order_by(jobs.c.created_at, jobs.c.id).limit(limit)
        locked = select(jobs).where(jobs.c.id.in_(found.with_for_update(skip_locked=True).scalar_subquery()))

        def transaction(connection: Connection) -> list[JobId]:
            rows = connection.execute(locked).mappings().all()
            for row in rows:
                self._append(connection, job_from_row(row), [end], row["last_seq"])
            return [JobId(row["id"]) for row in rows]

        # Read first: most calls find nothing, and must not take the write lock.
        if not limit or not await self.database.read(lambda connection: connection.execute(found.limit(1)).first()):
            return ()
        ended = await self.database.write(transaction, Writer.JOBS)
        for job_id in ended:
            self._wake(job_id)
        self._tell_work()
        return ended

    async def count_waiting(self, model: str | None = None) -> int:
        return await self.database.read(lambda connection: _count_waiting(connection, self._now, model))

    async def watch(
        self, job_id: JobId, after_seq: int = 0, *, is_following: bool = True
    ) -> AsyncGenerator[StoredEvent, None]:
        def transaction(connection: Connection) -> tuple[list[StoredEvent], bool]:
            return _events_after(connection, job_id, after_seq)

        with self._watchers.notified(job_id) as watcher:
            while True:
                watcher.news.clear()
                recorded, is_over = await self.database.read(transaction)
                for stored in recorded:
                    yield stored
                    after_seq = stored.seq
                if is_over or not is_following:
                    return
                await watcher.news.wait()

    async def wait_for_end(self, job_id: JobId) -> Job:
        with self._watchers.notified(job_id, is_for_end=True) as watcher:
            while True:
                watcher.news.clear()
                job = watcher.ended or await self.get(job_id)
                if job.status.is_terminal:
                    return job
                await watcher.news.wait()

    async def wait_for_work(self, timeout_s: float) -> None:
        await _wait(self._has_work, timeout_s)
        self._has_work.clear()

    def _place_values(self, job: Job) -> dict[str, object]:
        return place_values(self.database, job.key_id, self._clock())

    def _is_to_be_told(self, job: Job, happened: Sequence[Event]) -> bool:
        """Whether the job gets a new place among the changes: with its status, and once a second while it goes on."""
        if is_terminal(happened[-1]):
            self._told_at.pop(job.id, None)
            return True
        now = time.monotonic()
        is_new = not all(isinstance(event, Progress | Preview) for event in happened)
        if not is_new and now - self._told_at.get(job.id, 0.0) < _TOLD_S:
            return False
        if len(self._told_at) >= _MOST_TOLD:
            self._told_at.clear()
        self._told_at[job.id] = now
        return True

    def _append(self, connection: Connection, job: Job, happened: Sequence[Event], last_seq: int) -> Job:
        """Write the events and the job as it is after them, within the caller's transaction."""
        now = self._clock()
        for event in happened:
            job = advance(job, event, now)
        changes = {name: value for name, value in job_to_row(job).items() if name not in FIXED_COLUMNS}
        changes["last_seq"] = last_seq + len(happened)
        if is_terminal(happened[-1]):
            changes |= {"owner": None, "lease_until": None}
        change = update(jobs).where(jobs.c.id == job.id)
        if self._is_to_be_told(job, happened):
            connection.execute(change.values(place=self._place, **changes), self._place_values(job))
        else:
            connection.execute(change.values(**changes))
        numbered = [*enumerate(happened, last_seq + 1)]
        if newest := max((seq for seq, event in numbered if isinstance(event, Preview)), default=0):
            # A preview is a hundred times as large as other events, and nobody asks for an old one.
            connection.execute(delete(events).where(_is_preview_of(job.id)))
        rows = [
            event_row(job.id, seq, now, event)
            for seq, event in numbered
            if seq == newest or not isinstance(event, Preview)
        ]
        connection.execute(insert(events), rows)
        if is_terminal(happened[-1]):
            enqueue_webhooks(connection, job, now, due_at=self._now)
            input_store.after_event(connection, job, happened[-1], now)
            if isinstance(happened[-1], Completed):
                count_video(connection, job, now)
        return job


def _is_preview_of(job_id: JobId) -> ColumnElement[bool]:
    return and_(events.c.job_id == job_id, events.c.type == "preview")


def _seconds(timings: Mapping[str, float]) -> float:
    """The seconds that a video took without waiting. Older rows do not say how many of them the device took."""
    device_s = timings.get("device_s", 0.0)
    return device_s + timings["delivery_s"] if device_s else timings["total_s"]


def _find(connection: Connection, job_id: JobId, *, is_for_update: bool = False) -> tuple[Job, int]:
    """The job and the number of its last event. Raises JobNotFound, also for text that no database accepts as an id."""
    if not is_job_id(job_id):
        raise JobNotFound.named(job_id)
    query = select(jobs).where(jobs.c.id == job_id)
    if is_for_update:
        query = query.with_for_update()
    row = connection.execute(query).mappings().first()
    if row is None:
        raise JobNotFound.named(job_id)
    return job_from_row(row), row["last_seq"]


def _count_waiting(connection: Connection, now: ColumnElement[float], model: str | None = None) -> int:
    is_it = true() if model is None else jobs.c.model == model
    new, again = (select(func.count()).where(which, is_it) for which in (is_queued(), is_waiting_again(now)))
    num_new, num_again = connection.execute(select(new.scalar_subquery(), again.scalar_subquery())).one()
    return int(num_new + num_again)


def _is_one_waiting(connection: Connection, job_id: JobId, now: ColumnElement[float]) -> bool:
    query = select(exists().where(jobs.c.id == job_id, is_waiting(now)))
    return bool(connection.execute(query).scalar_one())


def _events_after(connection: Connection, job_id: JobId, seq: int) -> tuple[list[StoredEvent], bool]:
    """The events after that number, and whether they are the last ones."""
    job, _ = _find(connection, job_id)
    query = select(events).where(events.c.job_id == job_id, events.c.seq > seq).order_by(events.c.seq)
    rows = connection.execute(query).mappings().all()
    return [StoredEvent(row["seq"], row["at"], event_from_row(row)) for row in rows], job.status.is_terminal


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)
