"""The inputs of jobs, and how many bytes each API key has stored, inputs and videos together.

An input is kept once for a key, by the digest of its bytes, and is there as long as a job uses it. Its row comes before
its file and goes after it, and the name of a file is never given again. So whoever deletes a file cannot meet somebody
who stores the same bytes anew: those have another name. Keys do not share files, or one could find out what another
has.

A submission holds its inputs before its job exists; the job takes them over in the transaction that creates it. All
changes of one key's bytes and inputs wait for the row of that key, which is locked after the rows of jobs, and in the
order of the keys.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, bindparam, delete, exists, func, insert, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from kinema.errors import QuotaExceeded, StorageUnavailable
from kinema.events import Cancelled, Completed, Event
from kinema.ids import JobId
from kinema.job import Job
from kinema.jobs.database import Database
from kinema.jobs.schema import input_uses as uses
from kinema.jobs.schema import inputs, jobs, stored_bytes

# Built once: building a statement takes longer than running it.
_STORED = select(stored_bytes.c.size_bytes).where(stored_bytes.c.key_id == bindparam("key_id"))
_LOCKED = _STORED.with_for_update()
# Who uses an input, and whose it is.
_USERS = select(uses.c.job_id, inputs.c.key_id).join(inputs, inputs.c.name == uses.c.name)
# Rows to a transaction.
_BATCH = 500


@dataclass(frozen=True, slots=True)
class HeldInput:
    """An input that a submission holds: the name of its file, and whether the file was stored before."""

    name: str
    is_stored: bool


class SqlInputStore:
    """Inputs in the job database. Every method may raise StoreUnavailable.

    ``has_dropped`` is set when this process may have left files that no job uses.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self.has_dropped = asyncio.Event()

    async def hold(
        self, job_id: JobId, key_id: str, sizes: Mapping[str, int], max_bytes: int | None = None
    ) -> Mapping[str, HeldInput]:
        """Hold the inputs of these digests for a job that is to be created. ``sizes`` are in bytes.

        Raises QuotaExceeded, and holds nothing, when the key would have more than ``max_bytes``.
        """

        def transaction(connection: Connection) -> Mapping[str, HeldInput]:
            before = _lock(connection, key_id)
            known = _find(connection, key_id, sizes)
            new = {digest: _new_name(digest) for digest in sizes if digest not in known}
            num_bytes = sum(sizes[digest] for digest in new)
            refuse_beyond(before + num_bytes, max_bytes)
            for digest, name in new.items():
                row = {"key_id": key_id, "digest": digest, "size_bytes": sizes[digest], "is_stored": False}
                connection.execute(insert(inputs), {"name": name, **row})
            held = known | {digest: HeldInput(name, is_stored=False) for digest, name in new.items()}
            for one in held.values():
                connection.execute(insert(uses), {"job_id": job_id, "name": one.name, "held_at": self._clock()})
            _add(connection, key_id, num_bytes)
            return held

        return await self._database.write(transaction)

    async def let_go(self, job_id: JobId, key_id: str) -> None:
        """Give up the inputs that a submission holds for a job. If the job exists after all, it keeps them."""
        is_held = and_(uses.c.job_id == job_id, uses.c.held_at.is_not(None))
        await self._database.write(lambda connection: _let_go(connection, key_id, is_held, self._clock()))
        self.has_dropped.set()

    async def let_go_held_before(self, at: float) -> int:
        """Give up inputs that were held before that time and belong to no job: their server is gone. Returns how many
        submissions they came from."""

        def transaction(connection: Connection) -> int:
            return _let_go_each(connection, connection.execute(_USERS.where(is_old)), is_old, self._clock())

        is_old = uses.c.held_at < at
        return await self._database.write(transaction)

    async def let_go_of_gone_jobs(self) -> int:
        """End the uses of jobs that do not exist any more, and return how many jobs these were; many take some calls.

        Whoever deletes a job ends its uses, but for a server of a version that did not know of them.
        """
        # A job takes its inputs over in the transaction that creates it, so a job that is absent here never comes.
        is_taken = uses.c.held_at.is_(None)
        gone = _USERS.where(is_taken, ~exists().where(jobs.c.id == uses.c.job_id)).limit(_BATCH)
        found = await self._database.read(lambda connection: connection.execute(gone).all())
        if not found:
            return 0
        count = await self._database.write(lambda connection: _let_go_each(connection, found, is_taken, self._clock()))
        self.has_dropped.set()
        return count

    async def users(self) -> dict[str, set[JobId]]:
        """All inputs of the database by the names of their files, and the jobs and submissions that use each."""

        def transaction(connection: Connection) -> dict[str, set[JobId]]:
            found: dict[str, set[JobId]] = defaultdict(set)
            for name, job_id in connection.execute(query):
                found[name] |= set() if job_id is None else {JobId(job_id)}
            return dict(found)

        query = select(inputs.c.name, uses.c.job_id).outerjoin_from(inputs, uses, uses.c.name == inputs.c.name)
        return await self._database.read(transaction)

    async def dropped(self, limit: int, after: str = "") -> Sequence[str]:
        """Names of files that no job uses and that may be deleted: those that follow on ``after``, in order."""
        is_wanted = and_(inputs.c.dropped_at.is_not(None), inputs.c.name > after)
        query = select(inputs.c.name).where(is_wanted).order_by(inputs.c.name).limit(limit)
        return await self._database.read(lambda connection: list(connection.execute(query).scalars()))

    async def forget(self, names: Sequence[str]) -> None:
        """Forget dropped inputs whose files are deleted."""
        gone = delete(inputs).where(inputs.c.name.in_(names), inputs.c.dropped_at.is_not(None))
        await self._database.write(lambda connection: connection.execute(gone))

    async def stored_bytes(self, key_id: str) -> int:
        """The size of the key's inputs and videos."""
        return await self._database.read(
            lambda connection: connection.execute(_STORED, {"key_id": key_id}).scalar() or 0
        )


def refuse_beyond(size_bytes: int, max_bytes: int | None) -> None:
    """Raises QuotaExceeded when this is more than a key may have stored."""
    if max_bytes is not None and size_bytes > max_bytes:
        raise QuotaExceeded(
            f"this key's inputs and videos would be {size_bytes / 1e9:.3g} GB; it may store {max_bytes / 1e9:.3g} GB; "
            "delete videos that are not needed any more"
        )


# --- within the transactions of jobs --------------------------------------------------------------------------------


def take_over(connection: Connection, job: Job, max_bytes: int | None) -> None:
    """Give the inputs that its submission holds to a job that is created. Raises QuotaExceeded beyond ``max_bytes``,
    and StorageUnavailable when they were held for so long that they were given up."""
    names = {key.rpartition("/")[2] for key in job.request.input_keys}  # the same picture may be the first and the last
    if names:
        taken = connection.execute(update(uses).where(uses.c.job_id == job.id).values(held_at=None)).rowcount
        if taken != len(names):
            raise StorageUnavailable("the inputs took too long to store; send the request again")
        connection.execute(update(inputs).where(inputs.c.name.in_(names)).values(is_stored=True))
    if max_bytes is not None:
        refuse_beyond(connection.execute(_STORED, {"key_id": job.key_id}).scalar() or 0, max_bytes)


def after_event(connection: Connection, job: Job, event: Event, now: float) -> None:
    """Count the files of a job that is done; let go of the inputs of a job that was cancelled."""
    match event:
        case Completed():
            _lock(connection, job.key_id)
            _add(connection, job.key_id, _made_bytes(job))
        case Cancelled() if job.request.input_keys:
            _let_go(connection, job.key_id, uses.c.job_id == job.id, now)


def forget_jobs(connection: Connection, deleted: Sequence[Job], now: float) -> None:
    """Let go of what deleted jobs had stored."""
    by_key: dict[str, list[Job]] = defaultdict(list)
    for job in deleted:
        by_key[job.key_id].append(job)
    for key_id in sorted(by_key):
        _let_go(connection, key_id, uses.c.job_id.in_([job.id for job in by_key[key_id]]), now)
        _add(connection, key_id, -sum(map(_made_bytes, by_key[key_id])))


def _made_bytes(job: Job) -> int:
    return sum(artifact.size_bytes for artifact in job.artifacts)


def _new_name(digest: str) -> str:
    return f"{digest}-{secrets.token_hex(8)}"


def _lock(connection: Connection, key_id: str) -> int:
    """Lock the row of the key, which is made for a new key, and return its bytes."""
    size_bytes: int | None = connection.execute(_LOCKED, {"key_id": key_id}).scalar()
    if size_bytes is not None:
        return size_bytes
    try:
        with connection.begin_nested():
            connection.execute(insert(stored_bytes), {"key_id": key_id, "size_bytes": 0})
    except IntegrityError:  # another transaction has just made it
        pass
    made: int = connection.execute(_LOCKED, {"key_id": key_id}).scalar_one()
    return made


def _add(connection: Connection, key_id: str, num_bytes: int) -> None:
    if num_bytes:
        sum_bytes = stored_bytes.c.size_bytes + num_bytes
        connection.execute(update(stored_bytes).where(stored_bytes.c.key_id == key_id).values(size_bytes=sum_bytes))


def _find(connection: Connection, key_id: str, digests: Collection[str]) -> dict[str, HeldInput]:
    """The inputs of the key that have these digests and that some job uses."""
    is_it = inputs.c.key_id == key_id, inputs.c.digest.in_(digests), inputs.c.dropped_at.is_(None)
    rows = connection.execute(select(inputs.c.digest, inputs.c.name, inputs.c.is_stored).where(*is_it))
    return {row.digest: HeldInput(row.name, row.is_stored) for row in rows}


def _let_go_each(
    connection: Connection, found: Iterable[tuple[str, str]], which: ColumnElement[bool], now: float
) -> int:
    """End those uses of these jobs, each with its key, and return the number of the jobs."""
    by_key: dict[str, set[str]] = defaultdict(set)
    for job_id, key_id in found:
        by_key[key_id].add(job_id)
    for key_id in sorted(by_key):
        _let_go(connection, key_id, and_(uses.c.job_id.in_(by_key[key_id]), which), now)
    return sum(map(len, by_key.values()))


def _let_go(connection: Connection, key_id: str, which: ColumnElement[bool], now: float) -> None:
    """End these uses of one key, and drop the inputs that nobody uses any more."""
    _lock(connection, key_id)
    names = set(connection.execute(delete(uses).where(which).returning(uses.c.name)).scalars())
    if not names:
        return
    is_unused = inputs.c.name.in_(names), ~exists().where(uses.c.name == inputs.c.name)
    num_bytes = connection.execute(select(func.sum(inputs.c.size_bytes)).where(*is_unused)).scalar() or 0
    connection.execute(update(inputs).where(*is_unused).values(dropped_at=now))
    _add(connection, key_id, -num_bytes)
