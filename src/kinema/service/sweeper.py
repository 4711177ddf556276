"""The sweeper removes expired jobs, and files that belong to no job.

At regular times it removes: jobs past their time, with their files; the oldest ended jobs, when the files take more
space than they may; files of deleted jobs, which a crash or a late upload has left; files of attempts that were given
up. It deletes a row before its files, so every job that is shown has its video. If it is stopped in between, the
database remembers the deleted job, and the next sweep finds the files. Several sweepers may share one store, since each
step may happen twice.

Files of a job that the database never had are another matter. A few inputs are what a refused submission leaves.
Videos, or many files, are a sign that the database is an older one or the wrong one. The sweeper keeps them and says
so, and only a person removes them.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import structlog

from kinema.errors import ConfigError, KinemaError, StorageUnavailable, StoreUnavailable
from kinema.ids import JobId
from kinema.jobs.retention import JobEnd, SqlRetention
from kinema.service.pairing import Pairing, find_unknown
from kinema.settings import RetentionSettings
from kinema.storage import CHECKPOINT_NAME, Storage, StoredJob

log = structlog.get_logger(__name__)

# Files without a job are kept this long after they were written. The clocks of this machine and of the storage may
# differ by minutes, and nothing needs the space sooner.
GRACE_S = 15 * 60.0
# The database remembers a deleted job for as long. By then no worker stores a file for it any more.
_REMEMBERED_S = 24 * 3600.0
# The most files of jobs that the database never had that a sweep removes by itself. A job has one input, and few
# submissions are cut short at once.
_MOST_UNKNOWN_FILES = 5
# Rows to a transaction. A crash after it leaves the files of at most these jobs for the next sweep.
_BATCH = 100
# One file that cannot be deleted is skipped; after this many in a row, storage counts as unavailable.
_FAILURES_IN_A_ROW = 5
# The name of a file begins with the number of its attempt. The name of an unfinished file begins with a dot; such a
# file and a checkpoint are of no use once the job has ended.
_ATTEMPT = re.compile(r"(\d+)\.")
_UNFINISHED = re.compile(r"\..*\.part")
_VIDEO = re.compile(r"\d+\.mp4")

Stored = Mapping[JobId, StoredJob]
Ends = Mapping[JobId, JobEnd]
# The files of each job that are to be deleted; None: all of its files.
Doomed = Mapping[JobId, Sequence[str] | None]


class Sweeping(StrEnum):
    """Whether the sweeper removes what it finds.

    It keeps files that no job accounts for (held). It removes nothing while the storage is not this database's or one
    of the two cannot be reached (stopped).
    """

    WORKING = "working"
    HELD = "held"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class SweepState:
    """How the last sweep ended, and the files that it has left because no job accounts for them."""

    sweeping: Sweeping = Sweeping.WORKING
    num_files: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Stored files without a job: of jobs that were deleted, and of jobs that the database never had."""

    deleted: Stored = field(default_factory=dict)
    unknown: Stored = field(default_factory=dict)

    @property
    def is_suspicious(self) -> bool:
        """Whether the unknown jobs are more than what refused submissions may leave."""
        names = [name for files in self.unknown.values() for name in files.sizes]
        return len(names) > _MOST_UNKNOWN_FILES or any(_VIDEO.fullmatch(name) for name in names)


class Sweeper:
    """Sweeps regularly from ``start`` to ``stop``. ``state`` is that of the last sweep."""

    def __init__(
        self,
        jobs: SqlRetention,
        storage: Storage,
        pairing: Pairing,
        settings: RetentionSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._storage = storage
        self._pairing = pairing
        self._settings = settings
        self._clock = clock
        self.state = SweepState()
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
            except (StoreUnavailable, StorageUnavailable, ConfigError) as exc:
                self._complain(exc)
                self.state = replace(self.state, sweeping=Sweeping.STOPPED)
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
        Raises ConfigError, and removes nothing, when the storage is another database's.
        """
        await self._pairing.check()
        # Storage is read first: while it is unavailable, no row is deleted either.
        files = await self._files()
        # Before any deletion, which may fail: a file that stays must not let the list of deleted jobs grow for ever.
        await self._jobs.forget_deleted_before(self._clock() - _REMEMBERED_S, files.left.keys())
        num_expired = await self._remove_expired(files)
        ends = await self._jobs.ends(list(files.left))
        settled_before = self._clock() - GRACE_S
        leftovers = await self._find_leftovers(files.left, ends, settled_before)
        orphans = {**leftovers.deleted, **({} if leftovers.is_suspicious else leftovers.unknown)}
        await files.delete(dict.fromkeys(orphans))
        self._hold(leftovers)
        old = find_old_attempts(files.left, ends, settled_before)
        await files.delete(old)
        num_surplus = await self._fit_budget(files, ends)
        if num_expired or orphans or old or num_surplus:
            log.info("swept", expired=num_expired, orphans=len(orphans), old_attempts=len(old), surplus=num_surplus)
        if files.failure is not None:
            raise files.failure

    async def find_leftovers(self) -> Leftovers:
        """Find the files without a job, and remove nothing. Raises as ``sweep``."""
        await self._pairing.check()
        stored = await asyncio.to_thread(self._storage.list_jobs)
        return await self._find_leftovers(stored, await self._jobs.ends(list(stored)), self._clock() - GRACE_S)

    async def remove(self, leftovers: Leftovers) -> None:
        """Remove these files, whatever they are. Raises StorageUnavailable, at the end if only some failed."""
        files = _Files(self._storage, {**leftovers.deleted, **leftovers.unknown}, self._is_stopping)
        await files.delete(dict.fromkeys(files.left))
        if files.failure is not None:
            raise files.failure

    async def _files(self) -> _Files:
        return _Files(self._storage, await asyncio.to_thread(self._storage.list_jobs), self._is_stopping)

    async def _find_leftovers(self, stored: Stored, ends: Ends, settled_before: float) -> Leftovers:
        orphans = find_orphans(stored, ends, settled_before)
        unknown = await find_unknown(self._jobs, orphans, ends)
        return Leftovers({job_id: files for job_id, files in orphans.items() if job_id not in unknown}, unknown)

    def _hold(self, leftovers: Leftovers) -> None:
        """Keep the number and size of the files that this sweep leaves, and log them when they have changed."""
        held = leftovers.unknown.values() if leftovers.is_suspicious else ()
        state = SweepState(
            Sweeping.HELD if held else Sweeping.WORKING,
            num_files=sum(len(files.sizes) for files in held),
            size_bytes=sum(files.size_bytes for files in held),
        )
        if held and (state.num_files, state.size_bytes) != (self.state.num_files, self.state.size_bytes):
            log.warning(
                "files of jobs that the database does not know are kept; `kinema storage sweep` lists them",
                jobs=len(held),
                files=state.num_files,
                bytes=state.size_bytes,
            )
        self.state = state

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
        # Files of unknown jobs are left out, so that no known video is deleted to make room for them.
        known = {job_id: stored for job_id, stored in files.left.items() if job_id in ends}
        surplus, is_enough = find_surplus(known, ends, round(self._settings.max_disk_gb * 1e9))
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


def find_orphans(stored: Stored, ends: Ends, settled_before: float) -> Stored:
    """The stored jobs that are not in the database, if nothing was written for them after ``settled_before``."""
    return {
        job_id: files for job_id, files in stored.items() if job_id not in ends and files.modified_at < settled_before
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
