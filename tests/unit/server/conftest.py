"""One served fake engine, and a way to ask it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.serving import Serving, serving


@pytest.fixture
async def it() -> AsyncIterator[Serving]:
    """The running service with its HTTP client."""
    async with serving() as running:
        yield running
