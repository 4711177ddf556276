"""The database of the store's suite where no server is needed."""

from __future__ import annotations

import pytest


@pytest.fixture
def store_url() -> str:
    return "sqlite://"
