"""One database, and transactions on it. The only file with SQL of one kind of database in it.

A new kind is a new driver name and, where it needs any, its own settings for a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from kinema.errors import ConfigError, StoreUnavailable
from kinema.jobs.schema import metadata

_DRIVERS = {"sqlite": "sqlite+aiosqlite"}
_ACCEPTED = "accepted are sqlite:///folder/kinema.db and sqlite:// (in memory, lost at the end)"

# How long a writer waits for another process's transaction; each takes milliseconds.
_BUSY_TIMEOUT_MS = 10_000

# Set on a connection that only reads, so that it does not take the write lock.
READ_ONLY = "kinema_read_only"


T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]


class Database:
    """Runs transactions to their end. Belongs to one event loop; ``open`` makes one, ``close`` ends it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._reader = engine.execution_options(**{READ_ONLY: True})
        self._running: set[asyncio.Task[Any]] = set()
        self._write_turn = asyncio.Lock()

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connect, and make the tables that are missing. Raises ConfigError when that cannot be done."""
        database = cls(open_engine(url))
        try:
            await database.write(lambda connection: connection.run_sync(metadata.create_all))
        except StoreUnavailable as exc:
            await database.close()
            raise ConfigError(f"jobs.database_url: {exc}") from exc
        except asyncio.CancelledError:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        """Wait for transactions that are under way, then disconnect."""
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._engine.dispose()

    async def write(self, work: Work[T]) -> T:
        """The result of ``work`` in a transaction of its own. Raises StoreUnavailable."""

        async def transaction() -> T:
            # One writer of this process at a time: waiting here is in order and cheap, waiting in SQLite is neither.
            async with self._write_turn, self._engine.begin() as connection:
                return await work(connection)

        return await self._run(transaction)

    async def read(self, work: Work[T]) -> T:
        """The same for work that writes nothing."""

        async def transaction() -> T:
            async with self._reader.connect() as connection:
                return await work(connection)

        return await self._run(transaction)

    async def _run(self, transaction: Callable[[], Awaitable[T]]) -> T:
        """Run it to its end even when the caller is cancelled: a broken-off one would cost the connection."""

        async def translated() -> T:
            try:
                return await transaction()
            except (SQLAlchemyError, OSError) as exc:
                raise StoreUnavailable(f"the job database cannot be used: {_reason(exc)}") from exc

        task = asyncio.create_task(translated())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)


def _reason(exc: SQLAlchemyError | OSError) -> str:
    """The driver's own words, without the statement and its parameters: those are the client's."""
    return str(getattr(exc, "orig", None) or exc).splitlines()[0]


def open_engine(text: str) -> AsyncEngine:
    """Nothing is connected yet. Raises ConfigError for a URL that is not one, or a database that is not supported."""
    url = _parse(text)
    return _open_sqlite(url)


def _parse(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError as exc:
        raise ConfigError(f"jobs.database_url is not a SQLAlchemy URL; {_ACCEPTED}") from exc
    backend = url.get_backend_name()
    if backend not in _DRIVERS:
        raise ConfigError(f"jobs.database_url: {backend} is not supported; {_ACCEPTED}")
    return url.set(drivername=_DRIVERS[backend])


# --- SQLite ---------------------------------------------------------------------------------------------------------


def _open_sqlite(url: URL) -> AsyncEngine:
    if url.database in (None, "", ":memory:"):
        # One connection, lent to one transaction at a time: a second one would be another, empty database.
        engine = create_async_engine(url, poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0)
    else:
        _make_folder(Path(str(url.database)).parent)
        engine = create_async_engine(url)
    event.listen(engine.sync_engine, "connect", _set_up_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"jobs.database_url: cannot make the folder {folder}: {exc.strerror}") from exc


def _set_up_sqlite(connection: DBAPIConnection, _record: object) -> None:
    """WAL lets readers go on while one writes. synchronous=NORMAL is safe there against a killed process, which is
    what is promised; only a power cut may take the last moments back, and an fsync for every progress event would
    cost more than that is worth."""
    connection.isolation_level = None  # the driver begins no transaction of its own; _begin_sqlite does
    cursor = connection.cursor()
    # The timeout comes first: changing to WAL needs the lock that another process may hold.
    for pragma in (
        f"busy_timeout={_BUSY_TIMEOUT_MS}",
        "journal_mode=WAL",
        "synchronous=NORMAL",
        "foreign_keys=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """IMMEDIATE takes the write lock at the start: a transaction that read first and wrote then could not get it."""
    is_read_only = connection.get_execution_options().get(READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")
