"""The one server that most of these tests ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server_process import Server, start_server


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with no configuration but a free port and its own folder: the bundled model on the CPU."""
    server = start_server(tmp_path_factory.mktemp("tiny"))
    yield server
    server.stop()
