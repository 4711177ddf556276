"""What the job database says, read beside the service: who made what, how often, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from tests.faults.processes import until

# Jobs of this key fill the database; all others are those of the clients.
OTHER_KEY = "other"
TERMINAL = ("completed", "failed", "cancelled")
_OF_CLIENTS = "SELECT id, attempt FROM jobs WHERE key_id <> %s"
_EVENTS_OF_CLIENTS = """
SELECT job_id, events.at, type, data FROM events JOIN jobs ON jobs.id = job_id WHERE key_id <> %s ORDER BY job_id, seq
"""
_IN_A_SUBMISSION = """
SELECT application_name, state FROM pg_stat_activity JOIN pg_locks USING (pid)
WHERE datname = current_database() AND locktype = 'advisory' AND granted
AND (state = 'idle in transaction' OR wait_event = 'relation')
"""


@dataclass(frozen=True)
class Entry:
    """An event of a job. ``data`` is what it says."""

    at: float
    type: str
    data: Mapping[str, Any]

    @property
    def is_terminal(self) -> bool:
        return self.type in TERMINAL

    @property
    def stage(self) -> str | None:
        """denoise or decode, when it tells of progress."""
        return self.data.get("stage")


History = Sequence[Entry]


def started_by(history: History) -> str | None:
    """The worker of the attempt that runs, or ran last."""
    workers = [entry.data["worker_id"] for entry in history if entry.type == "started"]
    return workers[-1] if workers else None


def has_begun(history: History, worker_id: str) -> bool:
    """Whether that worker has ever begun this video."""
    return any(entry.type == "started" and entry.data["worker_id"] == worker_id for entry in history)


class Ledger:
    """On the service's own database."""

    def __init__(self, url: str) -> None:
        self._url = url

    def histories(self) -> dict[str, History]:
        """The events of every job, the oldest first."""
        found: dict[str, list[Entry]] = {job_id: [] for job_id, _ in self._rows(_OF_CLIENTS, OTHER_KEY)}
        for job_id, at, kind, data in self._rows(_EVENTS_OF_CLIENTS, OTHER_KEY):
            found.setdefault(job_id, []).append(Entry(at, kind, data))
        return found

    def history(self, job_id: str) -> History:
        rows = self._rows("SELECT at, type, data FROM events WHERE job_id = %s ORDER BY seq", job_id)
        return [Entry(*row) for row in rows]

    def attempts(self) -> dict[str, int]:
        """The number of the newest attempt of every job."""
        return dict(self._rows(_OF_CLIENTS, OTHER_KEY))

    def wait_for(self, job_id: str, is_there: Callable[[History], bool], what: str) -> History:
        """The job's history once it is so. Fails at once when the job has ended before."""

        def look() -> History | None:
            history = self.history(job_id)
            if is_there(history):
                return history
            assert not any(entry.is_terminal for entry in history), f"{job_id} ended before {what}: {history}"
            return None

        return until(look, f"{job_id}: {what}")

    def running_on(self, worker_id: str) -> list[str]:
        """The jobs that this worker began last and that have not ended."""
        return [
            job_id
            for job_id, history in self.histories().items()
            if started_by(history) == worker_id and not history[-1].is_terminal
        ]

    @contextmanager
    def held_submissions(self) -> Iterator[None]:
        """Every submission waits in the middle of its transaction until the end of this: no event is recorded."""
        with psycopg.connect(self._url) as connection:
            connection.execute("LOCK TABLE events IN EXCLUSIVE MODE")
            yield
            connection.rollback()

    @contextmanager
    def submitter(self) -> Iterator[Callable[[], tuple[str, str] | None]]:
        """A function that tells which process has the lock of submissions, and the state of its connection. Another
        submission that waits for this lock is none, though it may have another lock."""
        with psycopg.connect(self._url, autocommit=True) as connection:
            yield lambda: connection.execute(_IN_A_SUBMISSION).fetchone()

    def _rows(self, query: str, *arguments: object) -> list[Any]:
        with psycopg.connect(self._url, autocommit=True) as connection:
            return connection.execute(query, arguments).fetchall()  # type: ignore[arg-type]
