"""The server that most attacks meet, and the table of what they cost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.servers import running_server
from tests.hostile.watched import pytest_terminal_summary  # noqa: F401 - a hook, found by its name
from tests.server_process import Server


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with the fake engine, no keys, and the defaults otherwise."""
    with running_server(tmp_path_factory.mktemp("fake"), "--engine", "fake") as server:
        yield server
