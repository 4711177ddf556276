"""Databases that outlive a process and are shared by several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import PostgresServer


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    """A database that has the tables and no rows, except for the first who asks: for that one it is new."""
    return postgres.emptied_database()


@pytest.fixture
def store_url(postgres_url: str) -> str:
    """The database of the store's suite where it runs on PostgreSQL."""
    return postgres_url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of each kind, without rows."""
    if request.param == "sqlite":
        return _new_file(tmp_path)
    found: str = request.getfixturevalue("postgres_url")
    return found


@pytest.fixture(params=["sqlite", "postgres"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A new database of each kind, without tables."""
    if request.param == "sqlite":
        yield _new_file(tmp_path)
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        with server.database() as url:
            yield url


def _new_file(folder: Path) -> str:
    return f"sqlite:///{folder / 'new folder' / 'kinema.db'}"
