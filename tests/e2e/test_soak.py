"""Many jobs and many listeners at once, on a real server: nothing is lost, and nothing piles up."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.postgres import PostgresServer
from tests.server_process import Server, running_server, start_server

MAX_STREAMS = 200
# The smallest film there is: the point is what is around it.
BODY = {"prompt": "waves", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
TERMINAL = ("completed", "failed", "cancelled")
# What the allocator may still take; a leak of two kilobytes for each of the 7,000 events and 200 streams would be more.
MAX_GROWTH_MB = 10
# How long the long one takes, and its pace, for a machine with two cores that others use too.
MINUTES = int(os.environ.get("SOAK_MINUTES", "30"))
JOBS_A_SECOND = float(os.environ.get("SOAK_JOBS", "5"))
# Memory grows until all threads have worked: for five minutes, and longer beside other work.
WARM_UP_S = float(os.environ.get("SOAK_WARM_UP_S", "300"))
# Videos that wait at the same time, before all others, and how many of them are asked for at once.
BURST, TURNS = 300, 150
POLLS_A_SECOND = 10 * JOBS_A_SECOND


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
    # Never closed here when it is idle: httpx may have given it to a request a moment before.
    limits = httpx.Limits(max_connections=MAX_STREAMS + 20, keepalive_expiry=None)
    transport = AskingAgain(limits=limits)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, transport=transport) as client:
        yield client


class AskingAgain(httpx.AsyncHTTPTransport):
    """Sends a request again on another connection, as clients do, when the server closed an idle one at the moment in
    which the request was sent."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except (httpx.ReadError, httpx.RemoteProtocolError):
            return await super().handle_async_request(request)


async def submit(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    answer = await client.post("/v1/videos", json=body, headers={"Idempotency-Key": str(uuid.uuid4())})
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


@dataclass(frozen=True)
class Held:
    """What a server holds: memory, open files without clients' connections, threads, rows of its database, files of its
    storage."""

    resident_mb: float
    open_files: int
    threads: int
    rows: int
    files: int


def held_by(server: Server, folder: Path, database_url: str) -> Held:
    process = Path(f"/proc/{server.process.pid}")
    with psycopg.connect(database_url) as connection:
        rows = sum(
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # type: ignore[index]
            for table in ("jobs", "events", "inputs", "arrivals")
        )
    return Held(
        round(rss_mb(server), 1),
        sum(not os.readlink(one).startswith("socket:") for one in (process / "fd").iterdir()),
        len(list((process / "task").iterdir())),
        rows,
        sum(path.is_file() for path in (folder / "data" / "files" / "videos").rglob("*")),
    )


class Customers:
    """They send jobs at an even pace, ask for them until they have ended, listen to every tenth, and delete them."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.made = 0
        self.polls = 0

    async def come_at_once(self, count: int) -> None:
        """Return when all of them have gone."""
        job_ids = await submit_many(self._client, count)
        turns = asyncio.Semaphore(TURNS)

        async def one(number: int, job_id: str) -> None:
            async with turns:
                await self._see_off(job_id, is_listening=number % 10 == 0)

        await asyncio.gather(*(one(number, job_id) for number, job_id in enumerate(job_ids)))

    async def come_for(self, seconds: float) -> None:
        """Return when the last of those who came in this time has gone."""
        first, count = time.monotonic(), round(seconds * JOBS_A_SECOND)
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await asyncio.sleep(first + number / JOBS_A_SECOND - time.monotonic())
                group.create_task(self._one(is_listening=number % 10 == 0))

    async def _one(self, *, is_listening: bool) -> None:
        await self._see_off(await submit(self._client, BODY), is_listening=is_listening)

    async def _see_off(self, job_id: str, *, is_listening: bool) -> None:
        if is_listening:
            check({job_id: await listen(self._client, job_id, asyncio.Event())})
        while True:
            for _ in range(round(POLLS_A_SECOND / JOBS_A_SECOND)):
                video = (await self._client.get(f"/v1/videos/{job_id}")).raise_for_status().json()
                self.polls += 1
            if video["status"] in TERMINAL:
                break
        assert video["status"] == "completed"
        content = await self._client.get(f"/v1/videos/{job_id}/content")
        assert len(content.raise_for_status().content) == int(content.headers["content-length"]) > 0
        (await self._client.delete(f"/v1/videos/{job_id}")).raise_for_status()
        self.made += 1


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_half_an_hour_leaves_nothing_behind(tmp_path: Path, postgres: PostgresServer) -> None:
    """Videos are ordered, watched, fetched and deleted on PostgreSQL: memory, open files and threads stay, and no row
    of a job and no file is left."""
    settings = {"KINEMA_JOBS_MAX_QUEUED": "2000"}
    with (
        postgres.database() as url,
        running_server(tmp_path, "--engine", "fake", settings=settings | {"KINEMA_JOBS_DATABASE_URL": url}) as server,
    ):
        async with client_of(server) as client:
            customers = Customers(client)
            # Fills what a server keeps for good: at once, so that all of its threads have worked.
            await customers.come_at_once(BURST)
            burst = held_by(server, tmp_path, url)
            print(f"\n{customers.made} at once: {burst}", flush=True)
            await customers.come_for(WARM_UP_S)
            seen = [held_by(server, tmp_path, url)]
            print(f"\n{seen[0]}", flush=True)
            for minute in range(1, MINUTES + 1):
                await customers.come_for(60)
                seen.append(held_by(server, tmp_path, url))
                print(f"{minute} minutes, {customers.made} jobs, {customers.polls} polls: {seen[-1]}", flush=True)
    first, last = seen[0], seen[-1]
    assert last.resident_mb - first.resident_mb < MAX_GROWTH_MB
    assert last.open_files <= first.open_files + 2
    assert last.threads <= max(burst.threads, first.threads) + 5  # some end when they had nothing to do for a while
    assert last.rows == first.rows
    assert last.files == 0
    assert (tmp_path / "data" / "files" / "videos").is_dir()
