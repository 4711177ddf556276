"""Stores new jobs. Those of one model that come while a transaction stores others share the next one.

An answered job is committed. Where one of several has no room, the others are stored all the same. A job with inputs,
or one whose submission may be a repeated one, has a transaction of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import insert
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DataError, IntegrityError

from kinema.errors import KinemaError, QuotaExceeded, StoreUnavailable
from kinema.events import Queued
from kinema.job import Job
from kinema.jobs import input_store
from kinema.jobs.admission import Admission, find_repeated
from kinema.jobs.changes import place_of, place_values
from kinema.jobs.claims import add_key
from kinema.jobs.database import IN_LINE_S, AdvisoryLock, Database, insert_rows, take_lock
from kinema.jobs.gathering import Gathering
from kinema.jobs.schema import event_row, events, job_to_row, jobs
from kinema.jobs.store import QueueLimits, Submission

# Jobs of one transaction. It takes tens of milliseconds then, and other servers wait for its lock.
_MAX_TOGETHER = 50


@dataclass(frozen=True, eq=False, slots=True)
class NewJob:
    """A job to be stored, if it has room and was not stored before."""

    job: Job
    limits: QueueLimits
    submission: Submission | None = None
    asked_at: float = field(default_factory=time.monotonic)

    @property
    def may_share(self) -> bool:
        return (self.submission is None or self.submission.is_first) and not self.job.request.input_keys

    @property
    def key(self) -> tuple[str, str]:
        return self.job.request.model, self.job.key_id


class JobCreation:
    """Writes one database; ``on_stored`` is called behind each transaction that stored a job. Belongs to the
    database's event loop."""

    def __init__(
        self, database: Database, admission: Admission, clock: Callable[[], float], on_stored: Callable[[], None]
    ) -> None:
        self._database = database
        self._admission = admission
        self._clock = clock
        self._on_stored = on_stored
        self._place = place_of(database)
        self._lines: dict[str, Gathering[NewJob, Job]] = {}
        # The models and keys of the jobs that were stored here.
        self._known_keys: set[tuple[str, str]] = set()

    async def create(self, new: NewJob) -> Job:
        """See ``JobStore.create``."""
        if new.may_share:
            model = new.job.request.model
            line = self._lines.setdefault(model, Gathering(self._create_together, _MAX_TOGETHER))
            return await line.ask(new)
        stored = await self._database.write(lambda connection: self._store_alone(connection, new))
        if stored is new.job:
            self._note_stored([new])
        return stored

    async def _create_together(self, together: Sequence[NewJob]) -> Sequence[Job | Exception]:
        now = time.monotonic()
        in_time = [new for new in together if now - new.asked_at < IN_LINE_S]
        answers = dict(zip(in_time, await self._store_in_time(in_time), strict=True)) if in_time else {}
        return [answers.get(new, StoreUnavailable("the job database is busy; try again later")) for new in together]

    async def _store_in_time(self, together: Sequence[NewJob]) -> Sequence[Job | KinemaError]:
        try:
            answers = await self._database.write(lambda connection: self._store_sharing(connection, together))
        except StoreUnavailable as exc:
            if len(together) == 1 or not isinstance(exc.__cause__, DataError | IntegrityError):
                raise
            return await self._store_each(together)  # one of them cannot be stored, whatever the others do
        self._note_stored([new for new, answer in zip(together, answers, strict=True) if answer is new.job])
        return answers

    async def _store_each(self, together: Sequence[NewJob]) -> Sequence[Job | KinemaError]:
        answers: list[Job | KinemaError] = []
        for new in together:
            try:
                answers += await self._store_in_time([new])
            except StoreUnavailable as exc:
                answers.append(exc)
        return answers

    def _note_stored(self, stored: Sequence[NewJob]) -> None:
        if stored:
            self._known_keys.update(new.key for new in stored)
            self._on_stored()

    def _store_alone(self, connection: Connection, new: NewJob) -> Job:
        # The results of these checks stay true until the job is stored.
        if new.submission is not None and not new.submission.is_first:
            # It may come for another model at the same time.
            key_id = new.job.key_id
            take_lock(connection, AdvisoryLock.SUBMISSION, key_id, new.submission.told_by)
            known = find_repeated(connection, key_id, new.submission, self._clock())
            if known is not None:
                return known
        [answer] = self._store(connection, [new])
        if isinstance(answer, KinemaError):
            raise answer
        input_store.take_over(connection, new.job, new.limits.max_stored_bytes)
        return answer

    def _store_sharing(self, connection: Connection, together: Sequence[NewJob]) -> Sequence[Job | KinemaError]:
        refused: dict[NewJob, KinemaError] = {}
        for new in together:
            try:
                input_store.take_over(connection, new.job, new.limits.max_stored_bytes)
            except QuotaExceeded as exc:
                refused[new] = exc
        rest = [new for new in together if new not in refused]
        found = refused | (dict(zip(rest, self._store(connection, rest), strict=True)) if rest else {})
        return [found[new] for new in together]

    def _store(self, connection: Connection, together: Sequence[NewJob]) -> Sequence[Job | KinemaError]:
        """Store those of these jobs of one model that have room. Returns each, or why it has none."""
        refused = self._admission.admit(connection, [(new.job, new.limits) for new in together])
        stored = [new for new, why in zip(together, refused, strict=True) if why is None]
        for model, key_id in dict.fromkeys(new.key for new in stored):
            if (model, key_id) not in self._known_keys:
                add_key(connection, model, key_id)
        now = self._clock()
        if stored:
            insert_rows(connection, insert(jobs).values(place=self._place), [self._row(new, now) for new in stored])
            rows = [event_row(new.job.id, 1, now, Queued()) for new in stored]
            insert_rows(connection, insert(events), rows)
        return [why or new.job for new, why in zip(together, refused, strict=True)]

    def _row(self, new: NewJob, now: float) -> dict[str, Any]:
        told = {"fingerprint": None, "idempotency_key": None} if new.submission is None else new.submission.columns()
        return {**job_to_row(new.job), **told, "last_seq": 1} | place_values(self._database, new.job.key_id, now)
