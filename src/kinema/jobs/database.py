"""From a database URL to an engine. The only file with SQL of one database in it.

A new database is a new driver name and, where it needs any, its own settings for a connection.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from kinema.errors import ConfigError

_DRIVERS = {"sqlite": "sqlite+aiosqlite"}
_ACCEPTED = "accepted are sqlite:///folder/kinema.db and sqlite:// (in memory, lost at the end)"

# How long a writer waits for another process's transaction; each takes milliseconds.
_BUSY_TIMEOUT_MS = 10_000

# Set on a connection that only reads, so that it does not take the write lock.
READ_ONLY = "kinema_read_only"


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
