"""A real PostgreSQL for the tests: its own process, in a temporary folder, on a free port of this machine."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

PASSWORD = "long live the jobs"  # with spaces, so that it must be quoted in a URL
_START_TIMEOUT_S = 60
# In whichever database it is sent.
_END_OTHER_CONNECTIONS = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


@dataclass
class PostgresServer:
    """Where it listens; makes a database for whoever asks. It can be stopped and started again with its data."""

    programs: Path
    folder: Path
    account: pwd.struct_passwd | None
    port: int
    process: subprocess.Popen[bytes] | None = None
    emptied: str | None = None  # the name of the database that tests use one after the other

    def url(self, database: str, password: str = PASSWORD) -> str:
        return f"postgresql://kinema:{password.replace(' ', '%20')}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        """As the superuser, outside of any transaction and of the databases that are tested."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        """Return when it answers."""
        settings = [
            f"port={self.port}",
            "listen_addresses=127.0.0.1",
            f"unix_socket_directories={self.folder}",
            "fsync=off",
        ]
        options = [part for one in settings for part in ("-c", one)]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(  # type: ignore[call-overload]
                [self.programs / "postgres", "-D", self.folder / "data", *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **_as(self.account),
            )
        _wait_until_it_answers(self, self.process, self.folder / "log")

    def stop(self, with_signal: signal.Signals = signal.SIGINT) -> None:
        """By default a fast shutdown, which does not wait for connections that are still open; SIGQUIT is a crash."""
        if self.process is not None:
            self.process.send_signal(with_signal)
            self.process.wait(timeout=60)
            self.process = None

    @contextmanager
    def database(self, options: str = "") -> Iterator[str]:
        """The URL of a new, empty database, which is gone at the end."""
        name = f"kinema_{uuid4().hex}"
        self.execute(f"CREATE DATABASE {name} {options}")
        try:
            yield self.url(name)
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def emptied_database(self) -> str:
        """The URL of a database that has the tables of a store, and no rows: it is emptied for each test that asks.

        It is new where there is none yet, or where a test has taken one of the tables away. To make a database takes
        six times as long as to empty it.
        """
        if self.emptied is not None:
            try:
                with psycopg.connect(self.url(self.emptied), autocommit=True) as connection:
                    connection.execute("; ".join([_END_OTHER_CONNECTIONS, *_deletions()]))  # type: ignore[call-overload]
            except psycopg.Error:
                self.execute(f"DROP DATABASE {self.emptied} WITH (FORCE)")
                self.emptied = None
        if self.emptied is None:
            name = f"kinema_{uuid4().hex}"
            self.execute(f"CREATE DATABASE {name}")
            self.emptied = name
        return self.url(self.emptied)


def _deletions() -> list[str]:
    """Statements that leave no row in any table. TRUNCATE would make new files for each, which takes longer."""
    from kinema.jobs.schema import metadata

    return [f"DELETE FROM {table.name}" for table in reversed(metadata.sorted_tables)]


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Skips the test where PostgreSQL is not installed."""
    programs = _programs()
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="kinema-postgres-"))
    try:
        if account is not None:
            os.chown(folder, account.pw_uid, account.pw_gid)
        _initialise(programs, folder, account)
        server = PostgresServer(programs, folder, account, free_port())
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    """The folder of the newest installed version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("postgres")
    if found:
        return found[-1].parent
    if on_path is not None:
        return Path(on_path).parent
    pytest.skip("PostgreSQL is not installed; on Debian: apt-get install postgresql")


def _account() -> pwd.struct_passwd | None:
    """PostgreSQL does not run as root; the package makes an account for it."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no account named postgres")


def _as(account: pwd.struct_passwd | None) -> dict[str, object]:
    """Arguments for a process of that account."""
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _initialise(programs: Path, folder: Path, account: pwd.struct_passwd | None) -> None:
    password = folder / "password"
    password.write_text(PASSWORD, encoding="utf-8")
    password.chmod(0o644)
    command = [programs / "initdb", "--pgdata", folder / "data", "--username", "kinema", "--pwfile", password]
    # With the default, scram-sha-256, a connection would take four milliseconds more of both sides.
    options = ["--auth", "md5", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"]
    subprocess.run([*command, *options], check=True, capture_output=True, cwd=folder, **_as(account))  # type: ignore[call-overload]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def _wait_until_it_answers(server: PostgresServer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            server.execute("SELECT 1")
        except psycopg.OperationalError:
            time.sleep(0.02)
        else:
            return
    pytest.fail(f"PostgreSQL did not start:\n{log.read_text(encoding='utf-8')}")
