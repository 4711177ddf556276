"""One served fake engine, and a way to ask it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.serving import Serving, serving


@pytest.fixture
async def it() -> AsyncIterator[Serving]:
    """The running service with its HTTP client."""
    async with serving() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Serving]:
    """One service for all tests of a module that change nothing: when they are done, there is no job.

    A module takes it as its ``it``, and its tests run in the module's event loop.
    """
    async with serving() as running:
        yield running
        assert (await running.client.get("/v1/videos")).json()["data"] == []
