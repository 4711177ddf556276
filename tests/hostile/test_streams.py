"""A thousand clients that listen to one video, and what another client waits meanwhile."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hostile.raw import head
from tests.hostile.servers import running_server
from tests.hostile.watched import watched
from tests.server_process import Server

pytestmark = pytest.mark.hostile

_NUM_STREAMS = 1000
# Connections that are opened together.
_AT_ONCE = 50
# Each step and each chunk of frames is an event for every stream.
_VIDEO = {"prompt": "a", "size": "640x480", "num_frames": 129, "num_inference_steps": 200}


@pytest.fixture(autouse=True)
def many_files() -> None:
    """A thousand connections are a thousand files, here and in the server, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))


@asynccontextmanager
async def _listening(server: Server, path: str, count: int) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Streams that have begun, each with its headers and first event read."""
    at = urlsplit(server.url)
    writers: list[asyncio.StreamWriter] = []

    async def listen() -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection(at.hostname, at.port)
        writers.append(writer)
        writer.write(head("GET", path))
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        await reader.readuntil(b"event: queued")
        return reader

    readers: list[asyncio.StreamReader] = []
    try:
        for _ in range(0, count, _AT_ONCE):
            readers += await asyncio.gather(*(listen() for _ in range(_AT_ONCE)))
        yield readers
    finally:
        for writer in writers:
            writer.close()


async def test_a_thousand_streams_of_one_video_hold_nobody_up(tmp_path: Path) -> None:
    """All of them get the last event, and a list is answered as if there were few."""
    settings = {"KINEMA_SERVER_MAX_STREAMS_PER_KEY": str(_NUM_STREAMS), "KINEMA_WORKER_MAX_ACTIVE": "1"}
    with running_server(tmp_path, "--engine", "fake", settings=settings) as server, server.client() as client:
        video_id = client.post("/v1/videos", json=_VIDEO).raise_for_status().json()["id"]
        path = f"/v1/videos/{video_id}/events"
        with watched(server) as seen:
            async with _listening(server, path, _NUM_STREAMS) as streams:
                rest = await asyncio.gather(*(reader.readuntil(b"event: completed") for reader in streams))
        assert len(rest) == _NUM_STREAMS
    seen.check(grown_mb=300, wait_s=5)
    assert seen.p95_wait_s < 2, str(seen)
