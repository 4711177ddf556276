"""Databases that outlive a process and are shared by several."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def store_url(postgres_url: str) -> str:
    """The database of the store's suite where it runs on PostgreSQL."""
    return postgres_url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new folder' / 'kinema.db'}"
    found: str = request.getfixturevalue("postgres_url")
    return found
