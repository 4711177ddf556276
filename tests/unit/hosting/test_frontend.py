"""What stops a start, before anything is loaded."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kinema.engines.fake import FakeEngine
from kinema.errors import ConfigError, WorkerLost
from kinema.hosting import frontend as wiring
from kinema.hosting import process
from kinema.settings import EngineSettings, ServerSettings, Settings


async def test_a_taken_port_is_found_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the host and the port."""
    monkeypatch.setattr(wiring, "create_engine", lambda _settings: pytest.fail("the engine was made first"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = Settings(server=ServerSettings(port=port))
        with pytest.raises(
            ConfigError, match=rf"server\.host = '127\.0\.0\.1', server\.port = {port}: Address already"
        ):
            await wiring.serve(taken, wiring.running_service(taken))


@pytest.mark.parametrize("host", ["nowhere.invalid", "203.0.113.1", "a" * 70])
def test_a_host_that_is_not_here_is_refused(host: str) -> None:
    """Unknown, another machine's, and no name at all."""
    with pytest.raises(ConfigError, match=f"server.host = '{host}'"):
        process.bind(ServerSettings(host=host, port=0))


def test_a_bound_port_is_not_open_yet() -> None:
    """A client that comes while the model is loaded is refused at once, and does not wait."""
    (bound,) = process.bind(ServerSettings(port=0))
    with bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname())


async def test_a_data_folder_that_cannot_be_made_is_refused() -> None:
    """The key and the path, no traceback."""
    settings = Settings(data_dir=Path("/proc/nope"), engine=EngineSettings(name="fake"))
    with pytest.raises(ConfigError, match="data_dir = '/proc/nope'"):
        async with wiring.running_service(settings):
            pytest.fail("it started")


async def test_a_service_whose_engine_is_lost_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever started it sees that; it would never make a video again."""
    engine = FakeEngine()
    monkeypatch.setattr(wiring, "create_engine", lambda _settings: engine)
    settings = Settings(
        data_dir=tmp_path, server=ServerSettings(port=0), engine=EngineSettings(name="fake"), log_format="json"
    )

    @asynccontextmanager
    async def losing() -> AsyncIterator[wiring.Running]:
        async with wiring.running_service(settings) as running:
            asyncio.get_running_loop().call_later(0.2, setattr, engine, "is_lost", True)
            yield running

    with pytest.raises(WorkerLost, match="start this again"):
        await wiring.serve(settings, losing())
    assert not engine.is_loaded
