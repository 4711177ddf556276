"""What has expired goes, and what belongs to nobody.

From time to time: jobs past their time, with their files; the oldest ended jobs when the files take more than they
may; files without a job, which a crash, a late upload or a refused submission left; files of attempts that were given
up. A row goes before its files, so a job that is shown has its video; whatever stops the sweeper in between, the files
are then such that have no job, and the next sweep finds them. Several may sweep one store: all of it may happen twice.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from kinema.errors import KinemaError, StorageUnavailable, StoreUnavailable
from kinema.ids import JobId
from kinema.jobs.retention import JobEnd, SqlRetention
from kinema.settings import RetentionSettings
from kinema.storage import CHECKPOINT_NAME, Storage, StoredJob

log = structlog.get_logger(__name__)

# How long after the last writing files without a job are left alone. Input is stored moments before its job is, and
# the clocks of this machine and of the storage may differ by minutes; nothing needs the space sooner.
GRACE_S = 15 * 60.0
# Rows to a transaction, and with them their files: what a crash in between leaves for the next sweep.
_BATCH = 100
# One file that cannot be deleted is passed over; so many one after another mean that storage is away.
_FAILURES_IN_A_ROW = 5
# Files of an attempt are named by it. An unfinished one has a dot in front; that one and a checkpoint are nobody's once
# the job has ended.
_ATTEMPT = re.compile(r"(\d+)\.")
_UNFINISHED = re.compile(r"\..*\.part")

Stored = Mapping[JobId, StoredJob]
Ends = Mapping[JobId, JobEnd]
# The files of a job that are to go; None: all of them.
Doomed = Mapping[JobId, Sequence[str] | None]


class Sweeper:
    """Sweeps from ``start`` to ``stop``."""

    def __init__(
        self,
        jobs: SqlRetention,
        storage: Storage,
        settings: RetentionSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._storage = storage
        self._settings = settings
        self._clock = clock
        self._loop: asyncio.Task[None] | None = None
        self._is_stopping = threading.Event()
        # What was said in the log already, so that it is said once and not with every sweep.
        self._trouble: str | None = None
        self._is_over_budget = False

    async def start(self) -> None:
        self._is_stopping.clear()
        self._loop = asyncio.create_task(self._sweep_loop(), name="sweeper")

    async def stop(self) -> None:
        """Leave what is not deleted yet to the next start."""
        self._is_stopping.set()
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    async def _sweep_loop(self) -> None:
        while True:
            try:
                await self.sweep()
                self._trouble = None
            except (StoreUnavailable, StorageUnavailable) as exc:
                self._complain(exc)
            except Exception:
                log.exception("sweeping failed")
            await asyncio.sleep(self._settings.sweep_every_s)

    def _complain(self, exc: KinemaError) -> None:
        if self._trouble != exc.code:
            log.warning("not everything that has expired could be removed; it is tried again", reason=exc.message)
        self._trouble = exc.code

    async def sweep(self) -> None:
        """Look once, and remove what is to go.

        Raises StoreUnavailable, and StorageUnavailable, also at the end when only some files could not be deleted.
        """
        # Storage is asked first: while it is away no row is deleted either.
        files = _Files(self._storage, await asyncio.to_thread(self._storage.list_jobs), self._is_stopping)
        num_expired = await self._remove_expired(files)
        ends = await self._jobs.ends(list(files.left))
        settled_before = self._clock() - GRACE_S
        orphans = find_orphans(files.left, ends, settled_before)
        await files.delete(orphans)
        old = find_old_attempts(files.left, ends, settled_before)
        await files.delete(old)
        num_surplus = await self._fit_budget(files, ends)
        if num_expired or orphans or old or num_surplus:
            log.info("swept", expired=num_expired, orphans=len(orphans), old_attempts=len(old), surplus=num_surplus)
        if files.failure is not None:
            raise files.failure

    async def _remove_expired(self, files: _Files) -> int:
        """How many jobs were past their time."""
        keep_s, count = self._settings.keep_s, 0
        while keep_s is not None and (gone := await self._jobs.forget_ended_before(self._clock() - keep_s, _BATCH)):
            await files.delete(dict.fromkeys(gone))
            count += len(gone)
        return count

    async def _fit_budget(self, files: _Files, ends: Ends) -> int:
        """How many ended jobs had to go for the files to fit."""
        if self._settings.max_disk_gb is None:
            return 0
        surplus, is_enough = find_surplus(files.left, ends, round(self._settings.max_disk_gb * 1e9))
        for start in range(0, len(surplus), _BATCH):
            some = surplus[start : start + _BATCH]
            await self._jobs.forget(some)
            await files.delete(dict.fromkeys(some))
        if not is_enough and not self._is_over_budget:
            log.warning("files of jobs that have not ended take more than retention.max_disk_gb; they are kept")
        self._is_over_budget = not is_enough
        return len(surplus)


class _Files:
    """What is stored, and less of it with every deletion. What cannot be deleted is passed over, and is ``failure``."""

    def __init__(self, storage: Storage, stored: Stored, is_stopping: threading.Event) -> None:
        self.left = dict(stored)
        self.failure: StorageUnavailable | None = None
        self._storage = storage
        self._is_stopping = is_stopping
        self._failures_in_a_row = 0

    async def delete(self, doomed: Doomed) -> None:
        """Raises StorageUnavailable when storage seems to be away."""
        await asyncio.to_thread(self._delete_each, {job_id: doomed[job_id] for job_id in doomed if job_id in self.left})

    def _delete_each(self, doomed: Doomed) -> None:
        for job_id, names in doomed.items():
            if self._is_stopping.is_set():
                return
            try:
                self._delete(job_id, names)
                self._failures_in_a_row = 0
            except StorageUnavailable as exc:
                self.failure = exc
                self._failures_in_a_row += 1
                if self._failures_in_a_row == _FAILURES_IN_A_ROW:
                    raise

    def _delete(self, job_id: JobId, names: Sequence[str] | None) -> None:
        if names is None:
            self._storage.delete_job(job_id)
            del self.left[job_id]
        else:
            self._storage.delete_files(job_id, names)
            self.left[job_id] = self.left[job_id].without(names)


def find_orphans(stored: Stored, ends: Ends, settled_before: float) -> Doomed:
    """The jobs that are not in the database, if nothing was written for them since then."""
    return {
        job_id: None for job_id, files in stored.items() if job_id not in ends and files.modified_at < settled_before
    }


def find_old_attempts(stored: Stored, ends: Ends, settled_before: float) -> Doomed:
    """What attempts that were given up have left of jobs that have ended, if nothing was written for them since."""
    found = {}
    for job_id, end in ends.items():
        if end.finished_at is not None and job_id in stored and stored[job_id].modified_at < settled_before:
            found[job_id] = [name for name in stored[job_id].sizes if _is_given_up(name, end.kept_attempt)]
    return {job_id: names for job_id, names in found.items() if names}


def _is_given_up(name: str, kept_attempt: int | None) -> bool:
    if name == CHECKPOINT_NAME or _UNFINISHED.fullmatch(name):
        return True
    attempt = _ATTEMPT.match(name)
    return attempt is not None and int(attempt[1]) != kept_attempt


def find_surplus(stored: Stored, ends: Ends, max_bytes: int) -> tuple[Sequence[JobId], bool]:
    """The jobs, those that ended first, without which the others fit; and whether these do then."""
    too_many = sum(files.size_bytes for files in stored.values()) - max_bytes
    ended = [(end.finished_at, job_id) for job_id, end in ends.items() if end.finished_at is not None]
    surplus = []
    for _, job_id in sorted(ended):
        if too_many <= 0:
            break
        if job_id in stored and stored[job_id].size_bytes:
            surplus.append(job_id)
            too_many -= stored[job_id].size_bytes
    return surplus, too_many <= 0
