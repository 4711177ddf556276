"""The sweeper removes expired jobs, and files that belong to no job.

At regular times it removes jobs past their time, with their files. Every so often one of the servers also lists all
files, which takes long where there are many, and removes: the oldest ended jobs, when the files take more space than
they may; files of deleted jobs, which a crash or a late upload has left; files of attempts that were given up. It
deletes a row before its files, so every job that is shown has its video. If it is stopped in between, the database
remembers the deleted job, and the next list finds the files. Several sweepers may share one store, since each step may
happen twice.

Files that the database never had are another matter (``leftovers.py``). A few inputs are what a submission leaves that
was cut short. Videos, or many files, are a sign that the database is an older one or the wrong one. The sweeper keeps
them and says so, and only a person removes them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TypeVar

import structlog

from kinema.errors import ConfigError, KinemaError, StorageUnavailable, StoreUnavailable
from kinema.ids import JobId
from kinema.job import JobStatus
from kinema.jobs.chores import Chore, Chores
from kinema.jobs.input_store import SqlInputStore
from kinema.jobs.retention import EndedJob, SqlRetention
from kinema.service.leftovers import Doomed, Ends, Leftovers, Stored, find_failed, find_old_attempts, find_orphans
from kinema.service.pairing import Pairing, find_unknown
from kinema.settings import RetentionSettings
from kinema.storage import Storage, StoredInput

log = structlog.get_logger(__name__)

# Files without a job are kept this long after they were written. The clocks of this machine and of the storage may
# differ by minutes, and nothing needs the space sooner.
GRACE_S = 15 * 60.0
# The database remembers a deleted job for as long. By then no worker stores a file for it any more.
_REMEMBERED_S = 24 * 3600.0
# The files are listed in one of so many sweeps, whichever server does it; where they may take only so much space, in
# each.
_SWEEPS_PER_LISTING = 15
# A server that dies while it lists keeps others from it for as long.
_LISTING_S = 15 * 60.0
# A finished job keeps its progress for as long, so that a client whose connection broke can read on.
_WHOLE_S = 15 * 60.0
# Rows to a transaction. A crash after it leaves the files of at most these jobs for the next sweep.
_BATCH = 100
# One file that cannot be deleted is skipped; after this many in a row, storage counts as unavailable.
_FAILURES_IN_A_ROW = 5
# The number of jobs that were pruned, by status.
Pruned = Mapping[JobStatus, int]
# The jobs and submissions that use each input of the database.
Users = Mapping[str, Collection[JobId]]
T = TypeVar("T")


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


class Sweeper:
    """Sweeps regularly from ``start`` to ``stop``. ``state`` is that of the last sweep."""

    def __init__(
        self,
        jobs: SqlRetention,
        inputs: SqlInputStore,
        storage: Storage,
        pairing: Pairing,
        settings: RetentionSettings,
        clock: Callable[[], float] = time.time,
        chores: Chores | None = None,
    ) -> None:
        """With ``chores`` other servers on the database do not list the files when this one does."""
        self._jobs = jobs
        self._chores = chores
        self._inputs = inputs
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
        number = 0
        while True:
            try:
                await self._sweep_or_expire(number)
                self._trouble = None
                number += 1
            except (StoreUnavailable, StorageUnavailable, ConfigError) as exc:
                self._complain(exc)
                number = 0  # the next one looks at all
                self.state = replace(self.state, sweeping=Sweeping.STOPPED)
            except Exception:
                number = 0
                log.exception("sweeping failed")
            await asyncio.sleep(self._settings.sweep_every_s)

    async def _sweep_or_expire(self, number: int) -> None:
        """List all files when it is time for it and no other server does it; then its findings are known here, too."""
        is_time = number % _SWEEPS_PER_LISTING == 0 or self._settings.max_disk_gb is not None
        if self._chores is None:
            await (self.sweep() if is_time else self.expire())
        elif is_time and await self._chores.begin(Chore.LISTING, every_s=self._listed_every_s, lease_s=_LISTING_S):
            is_done = False
            try:
                await self.sweep()
                is_done = True
            finally:
                await self._chores.end(Chore.LISTING, asdict(self.state) if is_done else None)
        else:
            await self.expire()
            found = await self._chores.found(Chore.LISTING)
            self.state = SweepState() if found is None else SweepState(**found)

    @property
    def _listed_every_s(self) -> float:
        """A little less than the time from one listing to the next, which is not the same to the second."""
        every_s = self._settings.sweep_every_s * 0.9
        return every_s if self._settings.max_disk_gb is not None else every_s * _SWEEPS_PER_LISTING

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
        await self._compact()
        await self._inputs.let_go_of_gone_jobs()
        users, ends = await self._look_up(files)
        settled_before = self._clock() - GRACE_S
        orphans, held = (await self._find_leftovers(files, users, ends, settled_before)).split()
        await files.delete_leftovers(orphans)
        self._hold(held)
        old = find_old_attempts(files.left, ends, settled_before)
        await files.delete(old)
        num_surplus = await self._fit_budget(files, users, ends)
        if num_expired or not orphans.is_empty or old or num_surplus:
            num_orphans = orphans.num_files
            log.info("swept", expired=num_expired, orphans=num_orphans, old_attempts=len(old), surplus=num_surplus)
        if files.failure is not None:
            raise files.failure

    async def expire(self) -> None:
        """Remove the jobs past their time with their files, and list no other files. Raises as ``sweep``."""
        await self._pairing.check()
        files = _Files(self._storage, None, {}, self._is_stopping)
        num_expired = await self._remove_expired(files)
        await self._compact()
        if num_expired:
            log.info("swept", expired=num_expired)
        if files.failure is not None:
            raise files.failure

    async def find_leftovers(self) -> Leftovers:
        """Find the files without a job, and remove nothing. Raises as ``sweep``."""
        await self._pairing.check()
        files = await self._files()
        return await self._find_leftovers(files, *await self._look_up(files), self._clock() - GRACE_S)

    async def prune(self, ended_before: float, statuses: Collection[JobStatus], *, removes: bool) -> Pruned:
        """Find the jobs of these statuses that ended before a time, in seconds since the epoch, and with ``removes``
        remove them with their files, a hundred in a transaction. Raises as ``sweep``."""
        await self._pairing.check()
        files = _Files(self._storage, None, {}, self._is_stopping)
        pruned: Counter[JobStatus] = Counter()
        last: EndedJob | None = None
        while page := await self._jobs.ended_before(ended_before, last, _BATCH):
            last = page[-1]
            meant = {job.id: job.status for job in page if job.status in statuses}
            gone = await self._jobs.forget_ended(list(meant)) if removes else list(meant)
            if removes:
                await files.delete(dict.fromkeys(gone))
            pruned.update(meant[job_id] for job_id in gone)
        if files.failure is not None:
            raise files.failure
        return pruned

    async def remove(self, leftovers: Leftovers) -> None:
        """Remove these files, whatever they are. Raises StorageUnavailable, at the end if only some failed."""
        stored = {**leftovers.deleted, **leftovers.unknown, **leftovers.failed}
        files = _Files(self._storage, stored, leftovers.inputs, self._is_stopping)
        await files.delete_leftovers(leftovers)
        if files.failure is not None:
            raise files.failure

    async def _files(self) -> _Files:
        jobs = await asyncio.to_thread(self._storage.list_jobs)
        inputs = await asyncio.to_thread(self._storage.list_inputs)
        return _Files(self._storage, jobs, inputs, self._is_stopping)

    async def _look_up(self, files: _Files) -> tuple[Users, Ends]:
        """The users of all inputs, and the ends of all jobs that have files or use an input.

        The files were listed before. A file has its row before it is there, so none is unknown only because it is new.
        """
        users = await self._inputs.users()
        return users, await self._jobs.ends([*set(files.left).union(*users.values())])

    async def _find_leftovers(self, files: _Files, users: Users, ends: Ends, settled_before: float) -> Leftovers:
        orphans = find_orphans(files.left, ends, settled_before)
        unknown = await find_unknown(self._jobs, orphans, ends)
        return Leftovers(
            deleted={job_id: found for job_id, found in orphans.items() if job_id not in unknown},
            unknown=unknown,
            failed=find_failed(files.left, ends, settled_before),
            inputs={
                name: file
                for name, file in files.inputs.items()
                if name not in users and file.modified_at < settled_before
            },
        )

    def _hold(self, held: Leftovers) -> None:
        """Keep the number and size of the files that this sweep leaves, and log them when they are more than before."""
        state = SweepState(Sweeping.HELD if held.num_files else Sweeping.WORKING, held.num_files, held.size_bytes)
        if held.num_files > self.state.num_files:
            log.warning(
                "files that the database does not know are kept; `kinema storage sweep` lists them",
                files=held.num_files,
                bytes=held.size_bytes,
            )
        self.state = state

    async def _remove_expired(self, files: _Files) -> int:
        """Delete the jobs past their time, and return their number."""
        keep_s, count = self._settings.keep_s, 0
        while keep_s is not None and (gone := await self._jobs.forget_ended_before(self._clock() - keep_s, _BATCH)):
            await files.delete(dict.fromkeys(gone))
            count += len(gone)
        return count

    async def _compact(self) -> None:
        """Delete the progress of jobs that ended some time ago: their clients have seen it."""
        while await self._jobs.compact_ended_before(self._clock() - _WHOLE_S, _BATCH) == _BATCH:
            pass

    async def _fit_budget(self, files: _Files, users: Users, ends: Ends) -> int:
        """Delete ended jobs until the files fit into the allowed space, and return the number of jobs."""
        if self._settings.max_disk_gb is None:
            return 0
        # Unknown files are left out, so that no known video is deleted to make room for them.
        known = {job_id: stored for job_id, stored in files.left.items() if job_id in ends}
        # An input without a user is about to be deleted.
        used = {name: (file.size_bytes, users[name]) for name, file in files.inputs.items() if users.get(name)}
        surplus, is_enough = find_surplus(known, used, ends, round(self._settings.max_disk_gb * 1e9))
        for start in range(0, len(surplus), _BATCH):
            some = surplus[start : start + _BATCH]
            await self._jobs.forget(some)
            await files.delete(dict.fromkeys(some))
        if not is_enough and not self._is_over_budget:
            log.warning(
                "files and inputs of jobs that have not ended, or are starred, take more than retention.max_disk_gb; "
                "they are kept"
            )
        self._is_over_budget = not is_enough
        return len(surplus)


class _Files:
    """The stored files that are left. A file that cannot be deleted is skipped, and its error is kept as ``failure``.

    Without ``stored`` the files were not listed, and any job may have some.
    """

    def __init__(
        self, storage: Storage, stored: Stored | None, inputs: Mapping[str, StoredInput], is_stopping: threading.Event
    ) -> None:
        self._is_listed = stored is not None
        self.left = dict(stored or {})
        self.inputs = inputs
        self.failure: StorageUnavailable | None = None
        self._storage = storage
        self._is_stopping = is_stopping
        self._failures_in_a_row = 0

    async def delete(self, doomed: Doomed) -> None:
        """Delete these files. Raises StorageUnavailable when several deletions in a row have failed."""
        present = [job_id for job_id in doomed if job_id in self.left or not self._is_listed]
        await self._delete_each([(job_id, doomed[job_id]) for job_id in present], self._delete)

    async def delete_leftovers(self, leftovers: Leftovers) -> None:
        """Delete these files. Raises as ``delete``."""
        await self.delete(dict.fromkeys({**leftovers.deleted, **leftovers.unknown}))
        await self.delete({job_id: list(files.sizes) for job_id, files in leftovers.failed.items()})
        await self._delete_each(leftovers.inputs, self._storage.delete_input)

    async def _delete_each(self, doomed: Iterable[T], delete: Callable[[T], None]) -> None:
        def delete_each() -> None:
            for one in doomed:
                if self._is_stopping.is_set():
                    return
                try:
                    delete(one)
                    self._failures_in_a_row = 0
                except StorageUnavailable as exc:
                    self.failure = exc
                    self._failures_in_a_row += 1
                    if self._failures_in_a_row == _FAILURES_IN_A_ROW:
                        raise

        await asyncio.to_thread(delete_each)

    def _delete(self, doomed: tuple[JobId, Sequence[str] | None]) -> None:
        job_id, names = doomed
        if names is None:
            self._storage.delete_job(job_id)
            self.left.pop(job_id, None)
        else:
            self._storage.delete_files(job_id, names)
            self.left[job_id] = self.left[job_id].without(names)


def find_surplus(
    stored: Stored, inputs: Mapping[str, tuple[int, Collection[JobId]]], ends: Ends, max_bytes: int
) -> tuple[Sequence[JobId], bool]:
    """The jobs to delete, first ended first, so that what is left fits; and whether it fits then. Starred ones stay.

    ``inputs`` have their sizes and the jobs that use them. An input goes with the last of these.
    """
    by_job: dict[JobId, list[str]] = defaultdict(list)
    for name, (_, users) in inputs.items():
        for job_id in users:
            by_job[job_id].append(name)
    sizes = {job_id: files.size_bytes for job_id, files in stored.items()}
    num_users = Counter({name: len(users) for name, (_, users) in inputs.items()})
    too_many = sum(sizes.values()) + sum(size_bytes for size_bytes, _ in inputs.values()) - max_bytes
    surplus = []
    ended = [(end.finished_at, job_id) for job_id, end in ends.items() if end.finished_at and not end.is_starred]
    for _, job_id in sorted(ended):
        if too_many <= 0:
            break
        if sizes.get(job_id) or job_id in by_job:
            surplus.append(job_id)
            too_many -= sizes.get(job_id, 0)
            num_users.subtract(by_job[job_id])
            too_many -= sum(inputs[name][0] for name in by_job[job_id] if not num_users[name])
    return surplus, too_many <= 0
