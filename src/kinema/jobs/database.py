"""One database, and transactions on it. The only file with SQL of one kind of database in it.

There are two kinds. SQLite is a file that the processes of one machine share; one of them writes at a time. PostgreSQL
takes the writes of many machines at once. Transactions are written for PostgreSQL: each locks the rows that it changes,
or takes an ``AdvisoryLock``, and a statement sees what was committed before it (READ COMMITTED).

A server may be frozen inside a transaction, and its connections stay open. So PostgreSQL ends a transaction whose
client is silent, and then the others get the locks. No wait is without an end.
"""

from __future__ import annotations

import asyncio
import selectors
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Float,
    Insert,
    Text,
    bindparam,
    cast,
    create_engine,
    event,
    extract,
    func,
    select,
)
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor, ExecutionContext
from sqlalchemy.exc import ArgumentError, DisconnectionError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from kinema.errors import ConfigError, StoreUnavailable
from kinema.files import make_private_file, make_private_folder, withdraw_rights
from kinema.jobs.migrations import migrate
from kinema.masking import is_plain, without_secrets

_DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_ACCEPTED = (
    "accepted are sqlite:///folder/kinema.db, sqlite:// (in memory, lost at the end) and "
    "postgresql://user:password@host:5432/database"
)

# How long a writer waits for another process's transaction; each takes milliseconds.
_BUSY_TIMEOUT_MS = 10_000

# How long a client's request waits for a thread. Later it is refused: behind a database that hangs, a line of requests
# would take its length times the limits below, and nobody waits for them any more.
IN_LINE_S = 10.0

# Readers share the interpreter with the event loop, so more of them would only take turns.
_NUM_READERS = 2
# A thread for PostgreSQL mostly waits for the network. Each has a connection; a server has 100 of them by default.
_NUM_POSTGRES_READERS = 4

# PostgreSQL's client notices within this time that a server is gone. Less than a lease. A URL may set other values.
_POSTGRES_OPTIONS = {"connect_timeout": "5", "tcp_user_timeout": "8000", "keepalives_idle": "5"}
# PostgreSQL's limits of each connection, in milliseconds. A transaction takes milliseconds. A client that is silent
# within one is frozen or gone, and its locks are free after the first limit. The others wait longer for a lock, so they
# go on then. All is less than a lease. A URL may set other values: ?options=-c%20lock_timeout%3D1000
_POSTGRES_LIMITS_MS = {
    "idle_in_transaction_session_timeout": 3_000,
    "lock_timeout": 5_000,
    "statement_timeout": 8_000,
}
# To compile a statement takes a hundred times as long as to run one of ours, whatever PostgreSQL expects of it.
_POSTGRES_SETTINGS = {name: str(limit_ms) for name, limit_ms in _POSTGRES_LIMITS_MS.items()} | {"jit": "off"}
# The tables are changed while nothing else runs, by one server, for which the others wait.
_MIGRATION_LIMITS_MS = {
    "idle_in_transaction_session_timeout": 30_000,
    "lock_timeout": 120_000,
    "statement_timeout": 0,
}
# The first half of our advisory locks, "kine" in ASCII, keeps them apart from those of other programs.
_LOCK_SPACE = 0x6B696E65

_TAKE_LOCK = select(func.pg_advisory_xact_lock(bindparam("number", type_=BigInteger)))

# Over which processes send each other messages.
_CHANNEL = "kinema"

# Set on a connection that only reads, so that it does not take the write lock.
READ_ONLY = "kinema_read_only"


class AdvisoryLock(Enum):
    """A lock that one transaction holds at a time, in all processes, by what it protects."""

    MIGRATE = auto()
    QUEUE = auto()  # of a model that has had no job
    ENDPOINTS = auto()  # of a key
    SUBMISSION = auto()  # of a key and what tells that it is repeated; taken before all others
    CHORE = auto()  # by its name


class Writer(Enum):
    """Who writes. On PostgreSQL each has threads and connections of its own, so that none can hold up another."""

    REQUESTS = auto()  # what clients send: submissions, webhooks
    JOBS = auto()  # what keeps jobs going: claims, events, ends, cancels
    LEASES = auto()  # what must not wait for anything


_NUM_POSTGRES_WRITERS = {Writer.REQUESTS: 4, Writer.JOBS: 4, Writer.LEASES: 1}

# The time of the server, in seconds since the epoch: its clock is the same for all that use the database.
_POSTGRES_NOW = cast(extract("epoch", func.statement_timestamp()), Float)

T = TypeVar("T")
Transaction = Callable[[Connection], T]


class Database:
    """Runs transactions to their end, each in one call on a thread. Belongs to one event loop.

    The drivers are blocking ones. An asynchronous driver would go to its thread for every statement, and also for the
    beginning and the end. This takes several times as long as the statements.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reader = _reader_of(engine)
        self._writers, self._readers = _threads_for(engine.url)
        self._running: set[asyncio.Future[Any]] = set()
        # The time by the clock that all users of the database share, in seconds since the epoch, for statements.
        self.now: ColumnElement[float] = _POSTGRES_NOW if _is_postgres(engine.url) else _OWN_NOW

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connect, and bring the tables to this version. Raises ConfigError when that cannot be done."""
        database = cls(open_engine(url))
        try:
            await database.write(_migrate)
        except StoreUnavailable as exc:
            await database.close()
            raise ConfigError(f"jobs.database_url: {exc}") from exc
        except (ConfigError, asyncio.CancelledError):
            await database.close()
            raise
        return database

    async def close(self) -> None:
        """Wait for the running transactions, then disconnect."""
        await asyncio.gather(*self._running, return_exceptions=True)
        await asyncio.to_thread(self._engine.dispose)
        for threads in (*self._writers.values(), self._readers):
            threads.shutdown(wait=False)

    async def write(self, transaction: Transaction[T], writer: Writer = Writer.REQUESTS) -> T:
        """Commit what ``transaction`` does, and return its result. Raises StoreUnavailable.

        A request that has waited too long for a thread is refused; other writes wait for as long as it takes.
        """
        in_line_until = time.monotonic() + IN_LINE_S if writer is Writer.REQUESTS else float("inf")

        def run() -> T:
            if time.monotonic() > in_line_until:
                raise StoreUnavailable("the job database is busy; try again later")
            with self._engine.begin() as connection:
                return transaction(connection)

        return await self._run(self._writers[writer], run)

    async def read(self, transaction: Transaction[T]) -> T:
        """Return the result of a transaction that only reads. Raises StoreUnavailable."""

        def run() -> T:
            with self._reader.connect() as connection:
                return transaction(connection)

        return await self._run(self._readers, run)

    @property
    def transaction_number(self) -> ColumnElement[int] | None:
        """The number of the running transaction, higher than those of all that began before; None on SQLite, where
        one transaction writes at a time."""
        return cast(cast(func.pg_current_xact_id(), Text), BigInteger) if self.has_messages else None

    @property
    def oldest_transaction(self) -> ColumnElement[int] | None:
        """The lowest number of a transaction that has not ended, of any database of the server; None on SQLite."""
        oldest = func.pg_snapshot_xmin(func.pg_current_snapshot())
        return cast(cast(oldest, Text), BigInteger) if self.has_messages else None

    @property
    def has_messages(self) -> bool:
        """Whether processes on this database can send each other messages."""
        return _is_postgres(self._engine.url)

    async def send(self, message: str) -> None:
        """Send a message of less than 8,000 bytes to those that listen, this process too. It may get lost. Raises
        StoreUnavailable.

        It is a transaction of its own that waits for no disk: PostgreSQL ends those with messages one after the other.
        """
        off = func.set_config("synchronous_commit", "off", True)  # for this statement
        await self.read(lambda connection: connection.execute(select(off, func.pg_notify(_CHANNEL, message))).all())

    async def listen(self, hear: Callable[[str], None]) -> Listener:
        """Call ``hear`` with each message that is sent from now on. Raises StoreUnavailable."""
        opening = asyncio.ensure_future(self._run(self._readers, self._open_listener))
        try:
            connection = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise
        return Listener(connection, hear)

    def _open_listener(self) -> Any:  # noqa: ANN401 - the driver's own type, imported only with PostgreSQL
        """A connection beside the pool, whose connections are for the threads."""
        arguments, options = self._engine.dialect.create_connect_args(self._engine.url)
        connection: Any = self._engine.dialect.connect(*arguments, **options)
        try:
            connection.autocommit = True
            connection.execute(f"LISTEN {_CHANNEL}")
        except BaseException:
            connection.close()
            raise
        return connection

    async def _run(self, threads: ThreadPoolExecutor, transaction: Callable[[], T]) -> T:
        """Run it to its end even when the caller is cancelled, so that no result is left unknown."""

        def translated() -> T:
            try:
                return transaction()
            except (SQLAlchemyError, OSError, self._engine.dialect.loaded_dbapi.Error) as exc:
                reason = without_secrets(_reason(exc), _secrets_of(self._engine.url))
                raise StoreUnavailable(f"the job database cannot be used: {reason}") from exc

        future = asyncio.get_running_loop().run_in_executor(threads, translated)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return await asyncio.shield(future)


def _close_opened(opening: asyncio.Future[Any]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class Listener:
    """A connection over which messages come. ``is_lost`` is set when it breaks off. Belongs to one event loop."""

    def __init__(self, connection: Any, hear: Callable[[str], None]) -> None:  # noqa: ANN401 - as above
        self.is_lost = asyncio.Event()
        self._connection = connection
        self._hear = hear
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection.fileno(), self._read)

    def close(self) -> None:
        if not self.is_lost.is_set():
            self._loop.remove_reader(self._connection.fileno())
            self._connection.close()
            self.is_lost.set()

    def _read(self) -> None:
        """Take what has come, without waiting for more."""
        driver = self._connection.pgconn
        try:
            driver.consume_input()
            while (message := driver.notifies()) is not None:
                self._hear(message.extra.decode())
        except Exception:  # the driver's own type: the server has closed the connection
            self.close()


def _reason(exc: Exception) -> str:
    """The driver's own words, without the statement and its parameters, which are the client's data."""
    return str(getattr(exc, "orig", None) or exc).splitlines()[0]


def _secrets_of(url: URL) -> Iterator[str]:
    """Yield the parts of the URL that no message may have; a driver may quote a parameter that it does not know."""
    if url.password is not None:
        yield str(url.password)
    for name, value in url.query.items():
        if not is_plain(name):
            yield from (value,) if isinstance(value, str) else value


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        for name, limit_ms in _MIGRATION_LIMITS_MS.items():
            connection.execute(select(func.set_config(name, str(limit_ms), True)))  # for this transaction
    take_lock(connection, AdvisoryLock.MIGRATE)
    migrate(connection)


def take_lock(connection: Connection, lock: AdvisoryLock, *of: str) -> None:
    """Wait until no other transaction holds this lock of these; the end of this one releases it.

    SQLite needs no lock. Raises SQLAlchemyError when the wait takes too long.
    """
    if connection.dialect.name == "postgresql":
        # Two with the same number would only wait for each other.
        number = _LOCK_SPACE << 32 | zlib.crc32("\0".join((lock.name, *of)).encode())
        connection.execute(_TAKE_LOCK, {"number": number})


@lru_cache(maxsize=8)  # statements are kept by their expressions
def clock_of(now: Callable[[], float]) -> ColumnElement[float]:
    """This clock's time, in seconds since the epoch, at the execution of the statement that has it."""
    return bindparam("now", callable_=now, type_=Float)


_OWN_NOW = clock_of(time.time)


def open_engine(text: str) -> Engine:
    """Return an engine that has not connected yet. Raises ConfigError for an invalid URL or an unsupported database."""
    url = _parse(text)
    return _open_postgres(url) if _is_postgres(url) else _open_sqlite(url)


def is_absent(text: str) -> bool:
    """Tell whether the URL is of an SQLite database that would be new. Raises ConfigError for an invalid URL."""
    url = _parse(text)
    return not _is_postgres(url) and (_is_in_memory(url) or not Path(str(url.database)).exists())


def _parse(text: str) -> URL:
    """Parse the URL. The error does not quote the text, which may hold a password."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigError(f"jobs.database_url is not a SQLAlchemy URL; {_ACCEPTED}") from None
    backend = url.get_backend_name()
    if backend not in _DRIVERS:
        raise ConfigError(f"jobs.database_url: {backend} is not supported; {_ACCEPTED}")
    if "@" in (url.host or ""):
        raise ConfigError(
            "jobs.database_url: a user name or a password with one of the characters @ : / must be quoted, for "
            "instance %40 for @"
        )
    return url.set(drivername=_DRIVERS[backend])


def _reader_of(engine: Engine) -> Engine:
    """Return an engine for queries. It begins no transaction on PostgreSQL, which would take longer than a query."""
    if _is_postgres(engine.url):
        return engine.execution_options(isolation_level="AUTOCOMMIT")
    return engine.execution_options(**{READ_ONLY: True})


def _threads_for(url: URL) -> tuple[Mapping[Writer, ThreadPoolExecutor], ThreadPoolExecutor]:
    """The threads of each writer and those for reading, so that writers that wait for a lock do not block readers."""
    if _is_postgres(url):
        writers = {one: ThreadPoolExecutor(number, "database-writer") for one, number in _NUM_POSTGRES_WRITERS.items()}
        return writers, ThreadPoolExecutor(_NUM_POSTGRES_READERS, "database-reader")
    # One writer at a time: waiting for the thread is cheap and in order, waiting for SQLite's lock is neither.
    writer = ThreadPoolExecutor(1, "database-writer")
    reader = writer if _is_in_memory(url) else ThreadPoolExecutor(_NUM_READERS, "database-reader")
    return dict.fromkeys(Writer, writer), reader


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


def _is_postgres(url: URL) -> bool:
    return url.get_backend_name() == "postgresql"


def _open_postgres(url: URL) -> Engine:
    """Open an engine with one connection for each thread."""
    url = url.update_query_dict({**_POSTGRES_OPTIONS, **url.query})
    num_threads = sum(_NUM_POSTGRES_WRITERS.values()) + _NUM_POSTGRES_READERS
    try:
        engine = create_engine(url, pool_size=num_threads, max_overflow=0)
    except ImportError as exc:
        raise ConfigError("jobs.database_url: PostgreSQL needs a package; pip install 'kinema[postgres]'") from exc
    event.listen(engine, "connect", _set_limits)
    event.listen(engine, "checkout", _refuse_dropped)
    event.listen(engine, "do_executemany", _execute_each)
    return engine


def _set_limits(connection: DBAPIConnection, _record: object) -> None:
    """Set the limits of a new connection that its URL does not set. They are not sent as options of the connection,
    since poolers refuse these."""
    ours = ", ".join(f"('{name}', '{value}')" for name, value in _POSTGRES_SETTINGS.items())
    connection.cursor().execute(
        f"SELECT set_config(name, value, false) FROM (VALUES {ours}) AS ours (name, value) "  # noqa: S608 - ours
        "JOIN pg_settings USING (name) WHERE source <> 'client'"
    )
    connection.commit()


def insert_rows(connection: Connection, statement: Insert, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert the rows, on PostgreSQL in one statement: they would go one by one else, as ``_execute_each`` says.

    All rows have the same columns.
    """
    if connection.dialect.name == "postgresql" and len(rows) > 1:
        statement = statement.returning(*statement.table.primary_key)
    connection.execute(statement, rows)


def _execute_each(
    cursor: DBAPICursor, statement: str, parameters: Sequence[Any], _context: ExecutionContext | None
) -> bool:
    """Send a statement for many rows once for each row, and say that this is done.

    The driver would send them without waiting for the answers. PostgreSQL then forgets its limit of a silent client,
    until the next statement comes, so one that is frozen just then would keep its locks.
    """
    for row in parameters:
        cursor.execute(statement, row)
    return True


def _refuse_dropped(connection: DBAPIConnection, _record: object, _proxy: object) -> None:
    """Replace a connection that the server has closed, before a transaction gets it.

    A server sends nothing over an idle connection. So only a connection with something to read is tested: testing all
    would take as long as the queries.
    """
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            if not selector.select(timeout=0):
                return
        connection.cursor().execute("SELECT 1")
        connection.rollback()
    except Exception as exc:  # the driver's own type, imported only with PostgreSQL
        raise DisconnectionError from exc


# --- SQLite ---------------------------------------------------------------------------------------------------------


def _open_sqlite(url: URL) -> Engine:
    if _is_in_memory(url):
        # One connection for one transaction at a time: a second connection would open another, empty database.
        engine = create_engine(
            url, poolclass=QueuePool, pool_size=1, max_overflow=0, connect_args={"check_same_thread": False}
        )
    else:
        _make_file(Path(str(url.database)))
        engine = create_engine(url)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _is_in_memory(url: URL) -> bool:
    return url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")


def _make_file(path: Path) -> None:
    """Make the file and its folder for this user alone. SQLite gives the files beside it the same rights."""
    if str(path).startswith("file:"):  # an SQLite URI, which names its file in its own way
        return
    try:
        make_private_folder(path.parent)
        make_private_file(path)
    except OSError as exc:
        raise ConfigError(f"jobs.database_url: cannot make {path}: {exc.strerror}") from exc
    for beside in ("-wal", "-shm"):
        withdraw_rights(path.with_name(path.name + beside))


def _set_up_sqlite(connection: DBAPIConnection, _record: object) -> None:
    """Set the pragmas of a new connection.

    WAL lets readers continue while one process writes. With WAL, synchronous=NORMAL is safe against a killed process,
    which is what we promise. Only a power cut may lose the last moments; an fsync for every progress event would be too
    expensive for that.
    """
    connection.isolation_level = None  # _begin_sqlite begins transactions, not the driver
    cursor = connection.cursor()
    # The timeout comes first: changing to WAL needs a lock, which another process may hold.
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    _change_to_wal(cursor)
    for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _change_to_wal(cursor: DBAPICursor) -> None:
    """Change a new file to WAL. SQLite refuses at once, in spite of the timeout, when two do so at the same moment."""
    until = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    """Take the write lock at the start (IMMEDIATE): a transaction that reads first and then writes could not get it."""
    is_read_only = connection.get_execution_options().get(READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")
