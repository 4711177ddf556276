"""Brings the database's tables from any earlier state to the one of ``schema.py``.

A new database gets the tables of ``schema.py`` at once; a test compares them with those to which the steps lead. Every
file in ``versions`` is one step; its name begins with its revision, counted from 0001. The table ``alembic_version`` of
a database has the last step that was taken. A released step is never changed.
"""

from __future__ import annotations

import threading
from pathlib import Path

import structlog
from sqlalchemy import Column, MetaData, PrimaryKeyConstraint, String, Table, insert, inspect, select
from sqlalchemy.engine import Connection

from kinema.errors import ConfigError
from kinema.jobs.schema import metadata

log = structlog.get_logger(__name__)

FOLDER = Path(__file__).parent
# As Alembic makes it.
_VERSION = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)

# Alembic's ``op`` and ``context`` are global to the process.
_one_at_a_time = threading.Lock()


def migrate(connection: Connection) -> None:
    """Take the steps that are missing, within the caller's transaction, which must keep other processes out.

    Raises ConfigError for tables of a newer version, and for tables that no version of Kinema has made.
    """
    current, revisions = _current(connection), _revisions()
    if current == revisions[-1]:
        return  # return before Alembic is imported, which takes longer than opening a database
    if current is not None and current not in revisions:
        raise ConfigError(
            f"jobs.database_url: the tables are of revision {current[:32]!r}, made by a newer version of Kinema than "
            f"this one, which knows {revisions[-1]}; start that version, or give another database"
        )
    if current is None:
        _make_tables(connection, revisions[-1])
    else:
        _upgrade(connection)
    log.info("the job database is ready", revision=revisions[-1], was=current)


def _current(connection: Connection) -> str | None:
    """The last step that was taken, or None for a new database."""
    if not inspect(connection).has_table(_VERSION.name):
        return None
    return connection.execute(select(_VERSION.c.version_num)).scalar_one_or_none()


def _revisions() -> list[str]:
    """The steps that this version knows, in order."""
    return sorted(path.stem.partition("_")[0] for path in (FOLDER / "versions").glob("[0-9]*.py"))


def _make_tables(connection: Connection, revision: str) -> None:
    """Make those of a new database. Alembic's steps to them take twice as long, and its import 0.2 s."""
    foreign = metadata.tables.keys() & inspect(connection).get_table_names()
    if foreign:
        raise ConfigError(
            f"jobs.database_url: there is a table named {min(foreign)} that no version of Kinema has marked as its "
            f"own; give another database"
        )
    metadata.create_all(connection, checkfirst=False)
    _VERSION.create(connection, checkfirst=True)
    connection.execute(insert(_VERSION).values(version_num=revision))


def _upgrade(connection: Connection) -> None:
    from alembic import command  # noqa: PLC0415 - only when there is something to do
    from alembic.config import Config  # noqa: PLC0415 - see above

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    with _one_at_a_time:
        command.upgrade(config, "head")
