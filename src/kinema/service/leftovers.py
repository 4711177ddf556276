"""The stored files that no job of the database accounts for, and those of ended jobs that nobody needs.

Plain functions of what the storage lists and what the database knows; ``sweeper.py`` asks both, and removes the files.
A few inputs and unfinished files are what cut-off submissions leave. Videos, or many inputs, are a sign that the
database is an older one or the wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kinema.ids import JobId
from kinema.jobs.retention import JobEnd
from kinema.request.formats import MEDIA_TYPES
from kinema.storage import CHECKPOINT_NAME, StoredInput, StoredJob

# The most files that the database never had that a sweep removes by itself. A job has one or two inputs, and few
# submissions are cut short at once.
_MOST_UNKNOWN_FILES = 5
# The name of a file begins with the number of its attempt. The name of an unfinished file begins with a dot; such a
# file and a checkpoint are of no use once the job has ended.
_ATTEMPT = re.compile(r"(\d+)\.")
_UNFINISHED = re.compile(r"\..*\.part")
_VIDEO = re.compile(rf"\d+\.({'|'.join(MEDIA_TYPES)})")

Stored = Mapping[JobId, StoredJob]
Ends = Mapping[JobId, JobEnd]
# The files of each job that are to be deleted; None: all of its files.
Doomed = Mapping[JobId, Sequence[str] | None]


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Stored files without a job that accounts for them.

    ``deleted`` are files of jobs that were deleted, ``unknown`` of jobs that the database never had, ``inputs`` those
    that it does not have, and ``failed`` whole videos of jobs that failed: the database may be older than they are.
    """

    deleted: Stored = field(default_factory=dict)
    unknown: Stored = field(default_factory=dict)
    failed: Stored = field(default_factory=dict)
    inputs: Mapping[str, StoredInput] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not self.inputs and not self._jobs()

    @property
    def num_files(self) -> int:
        return len(self.inputs) + sum(len(files.sizes) for files in self._jobs())

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.inputs.values()) + sum(files.size_bytes for files in self._jobs())

    def split(self) -> tuple[Leftovers, Leftovers]:
        """What a sweep removes, and what it leaves to a person."""
        if self._is_suspicious():
            return Leftovers(deleted=self.deleted), replace(self, deleted={})
        return replace(self, failed={}), Leftovers(failed=self.failed)

    def _is_suspicious(self) -> bool:
        """Whether more is unknown than what cut-off submissions may leave."""
        names = [*self.inputs, *(name for files in self.unknown.values() for name in files.sizes)]
        whole = [name for name in names if not _UNFINISHED.fullmatch(name)]
        return len(whole) > _MOST_UNKNOWN_FILES or any(_VIDEO.fullmatch(name) for name in whole)

    def _jobs(self) -> list[StoredJob]:
        return [files for stored in (self.deleted, self.unknown, self.failed) for files in stored.values()]


def find_orphans(stored: Stored, ends: Ends, settled_before: float) -> Stored:
    """The stored jobs that are not in the database, if nothing was written for them after ``settled_before``."""
    return {
        job_id: files for job_id, files in stored.items() if job_id not in ends and files.modified_at < settled_before
    }


def find_old_attempts(stored: Stored, ends: Ends, settled_before: float) -> Doomed:
    """The files that ended jobs need no more, if nothing was written for the job after ``settled_before``."""
    found = {}
    for job_id, files, end in _ended(stored, ends, settled_before):
        kept = _kept_attempts(files, end)
        found[job_id] = [name for name in files.sizes if _is_useless(name) or _attempt(name) not in {None, *kept}]
    return {job_id: names for job_id, names in found.items() if names}


def find_failed(stored: Stored, ends: Ends, settled_before: float) -> Stored:
    """The whole videos of failed jobs, with the files beside them, if nothing was written after ``settled_before``.

    The end of such a video was lost with a newer database, or with a server; nobody can tell which it was.
    """
    found = {}
    for job_id, files, end in _ended(stored, ends, settled_before):
        kept = _kept_attempts(files, end)
        if end.has_failed and kept:
            found[job_id] = files.without([name for name in files.sizes if _attempt(name) not in kept])
    return found


def _ended(stored: Stored, ends: Ends, settled_before: float) -> Iterator[tuple[JobId, StoredJob, JobEnd]]:
    for job_id, end in ends.items():
        if end.finished_at is not None and job_id in stored and stored[job_id].modified_at < settled_before:
            yield job_id, stored[job_id], end


def _kept_attempts(files: StoredJob, end: JobEnd) -> set[int | None]:
    """The attempt that completed the job; of a failed job, those that have stored a whole video all the same."""
    if end.has_failed:
        return {_attempt(name) for name in files.sizes if _VIDEO.fullmatch(name)}
    return {end.kept_attempt}


def _is_useless(name: str) -> bool:
    return name == CHECKPOINT_NAME or _UNFINISHED.fullmatch(name) is not None


def _attempt(name: str) -> int | None:
    """The number of the attempt that the file is of; None for files that are of the job."""
    found = _ATTEMPT.match(name)
    return None if found is None else int(found[1])
