"""The sweeper removes expired jobs, and files that belong to no job.

At regular times it removes: jobs past their time, with their files; the oldest ended jobs, when the files take more
space than they may; files without a job, which a crash, a late upload or a refused submission has left; files of
attempts that were given up. It deletes a row before its files, so every job that is shown has its video. If it is
stopped in between, the files have no job any more, and the next sweep finds them. Several sweepers may share one store,
since each step may happen twice.
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

# Files without a job are kept this long after they were written. Inputs are stored moments before their job is, and the
# clocks of this machine and of the storage may differ by minutes; nothing needs the space sooner.
GRACE_S = 15 * 60.0
# Rows to a transaction. A crash after it leaves the files of at most these jobs for the next sweep.
_BATCH = 100
# One file that cannot be deleted is skipped; after this many in a row, storage counts as unavailable.
_FAILURES_IN_A_ROW = 5
# The name of a file begins with the number of its attempt. The name of an unfinished file begins with a dot; such a
# file and a checkpoint are of no use once the job has ended.
_ATTEMPT = re.compile(r"(\d+)\.")
_UNFINISHED = re.compile(r"\..*\.part")

Stored = Mapping[JobId, StoredJob]
Ends = Mapping[JobId, JobEnd]
# The files of each job that are to be deleted; None: all of its files.
Doomed = Mapping[JobId, Sequence[str] | None]


class Sweeper:
    """Sweeps regularly from ``start`` to ``stop``."""

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
        # The error code that is in the log already, so that it is logged once and not in every sweep.
        self._trouble: str | None = None
        self._is_over_budget = False

    async def start(self) -> None:
        self._is_stopping.clear()
        self._loop = asyncio.create_task(self._sweep_loop(), name="sweeper")

    async def stop(self) -> None:
        """Stop in the midst of a sweep; the next start does the rest."""
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
        """Sweep once.

        Raises StoreUnavailable and StorageUnavailable; the latter also at the end, if some files could not be deleted.
        """
        # Storage is read first: while it is unavailable, no row is deleted either.
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
        """Delete the jobs past their time, and return their number."""
        keep_s, count = self._settings.keep_s, 0
        while keep_s is not None and (gone := await self._jobs.forget_ended_before(self._clock() - keep_s, _BATCH)):
            await files.delete(dict.fromkeys(gone))
            count += len(gone)
        return count

    async def _fit_budget(self, files: _Files, ends: Ends) -> int:
        """Delete ended jobs until the files fit into the allowed space, and return the number of jobs."""
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
    """The stored files that are left. A file that cannot be deleted is skipped, and its error is kept as
    ``failure``."""

    def __init__(self, storage: Storage, stored: Stored, is_stopping: threading.Event) -> None:
        self.left = dict(stored)
        self.failure: StorageUnavailable | None = None
        self._storage = storage
        self._is_stopping = is_stopping
        self._failures_in_a_row = 0

    async def delete(self, doomed: Doomed) -> None:
        """Delete these files. Raises StorageUnavailable when several deletions in a row have failed."""
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
    """The stored jobs that are not in the database, if nothing was written for them after ``settled_before``."""
    return {
        job_id: None for job_id, files in stored.items() if job_id not in ends and files.modified_at < settled_before
    }


def find_old_attempts(stored: Stored, ends: Ends, settled_before: float) -> Doomed:
    """The files of given-up attempts of ended jobs, if nothing was written for the job after ``settled_before``."""
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
    """The jobs to delete, first ended first, so that the files of the others fit; and whether they fit then."""
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
