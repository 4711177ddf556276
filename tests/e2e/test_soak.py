"""Many jobs and many listeners at once, on a real server: nothing is lost, and nothing piles up."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server_process import Server, start_server

MAX_STREAMS = 200
# The smallest film there is: the point is what is around it.
BODY = {"prompt": "waves", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
TERMINAL = ("completed", "failed", "cancelled")
# What the allocator may still take; a leak of two kilobytes for each of the 7,000 events and 200 streams would be more.
MAX_GROWTH_MB = 10


@dataclass(frozen=True)
class Heard:
    """An event as a stream told it."""

    seq: int
    name: str
    data: dict[str, Any]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("KINEMA_JOBS_MAX_QUEUED", "2000")
    server = start_server(tmp_path, "--engine", "fake")
    yield server
    assert server.stop() == 0


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    # Shorter than the server keeps a connection, so that none is closed while a request is on its way to it.
    limits = httpx.Limits(max_connections=MAX_STREAMS + 20, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        yield client


async def submit(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    answer = await client.post("/v1/videos", json=body)
    return answer.raise_for_status().json()["id"]


async def submit_many(client: httpx.AsyncClient, count: int) -> Sequence[str]:
    turns = asyncio.Semaphore(8)

    async def one() -> str:
        async with turns:
            return await submit(client, BODY)

    return await asyncio.gather(*(one() for _ in range(count)))


async def listen(client: httpx.AsyncClient, job_id: str, is_open: asyncio.Event) -> Sequence[Heard]:
    """Everything that the stream of the job says, to its end."""
    heard, said = [], {}
    async with client.stream("GET", f"/v1/videos/{job_id}/events") as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            is_open.set()
            name, _, value = line.partition(": ")
            if name in ("id", "event", "data"):
                said[name] = value
            elif not line and said:
                heard.append(Heard(int(said["id"]), said["event"], json.loads(said["data"])))
                said = {}
    return heard


async def soak(client: httpx.AsyncClient, num_jobs: int, num_streams: int) -> dict[str, Sequence[Heard]]:
    """Queue the jobs, listen to the last of them while they wait, and return what was heard once all have ended."""
    job_ids = await submit_many(client, num_jobs)
    listened = job_ids[-num_streams:]
    opened = [asyncio.Event() for _ in listened]
    streams = [asyncio.create_task(listen(client, *each)) for each in zip(listened, opened, strict=True)]
    await asyncio.gather(*(event.wait() for event in opened))
    heard = dict(zip(listened, await asyncio.gather(*streams), strict=True))
    assert await statuses(client, job_ids[-100:]) == {"completed"}
    return heard


async def statuses(client: httpx.AsyncClient, job_ids: Sequence[str]) -> set[str]:
    return {(await client.get(f"/v1/videos/{job_id}")).json()["status"] for job_id in job_ids}


def rss_mb(server: Server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def check(heard: dict[str, Sequence[Heard]]) -> None:
    """Every event once and in order; one end, which is the last and carries the whole video."""
    for job_id, events in heard.items():
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        names = [event.name for event in events]
        assert names[:2] == ["queued", "started"]
        assert [name for name in names if name in TERMINAL] == names[-1:] == ["completed"]
        assert {event.data["id"] for event in events} == {job_id}
        assert events[-1].data["object"] == "video"


async def test_no_stream_misses_an_event(server: Server) -> None:
    """50 streams of 100 queued jobs: each hears every event once, in order, to the terminal one."""
    async with client_of(server) as client:
        heard = await soak(client, 100, 50)
    assert len(heard) == 50
    check(heard)


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_memory_stays_flat(server: Server) -> None:
    """1,000 queued jobs and 200 streams at once; the same again takes no more memory, and no event is lost."""
    async with client_of(server) as client:
        check(await soak(client, 1000, MAX_STREAMS))  # fills what a server keeps for good: pools, caches, threads
        before_mb = rss_mb(server)
        check(await soak(client, 1000, MAX_STREAMS))
        after_mb = rss_mb(server)
    print(f"resident {before_mb:.1f} -> {after_mb:.1f} MB")
    assert after_mb - before_mb < MAX_GROWTH_MB
