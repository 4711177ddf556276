"""Servers on a PostgreSQL database hear of each other at once, and find out later when they cannot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

import pytest

from kinema.events import Cancelled, Progress, Started
from kinema.jobs import watching
from kinema.jobs.database import Database
from kinema.jobs.signals import Signals
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from tests.postgres import PostgresServer
from tests.serving import events_of, make_job
from tests.unit.jobs.test_sql import COMPLETED

# Longer than a test may take: what is looked for so rarely is heard of.
_NEVER_S = 600.0


@pytest.fixture
async def stores(postgres_url: str) -> AsyncIterator[list[SqlJobStore]]:
    stores = [await SqlJobStore.open(postgres_url) for _ in range(2)]
    async with asyncio.timeout(20):
        await asyncio.gather(*(store.signals.is_listening.wait() for store in stores))
    yield stores
    await asyncio.gather(*(store.close() for store in stores))


async def test_news_of_another_server_comes_at_once(stores: list[SqlJobStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """To who reads the events and to who waits for the end; neither looks by itself."""
    monkeypatch.setattr(watching, "_POLL_S", _NEVER_S)
    writer, reader = stores
    job = await writer.create(make_job(), limits=QueueLimits())
    reading = asyncio.create_task(events_of(reader, job.id))
    waiting = asyncio.create_task(reader.wait_for_end(job.id))
    await writer.record(job.id, Started(worker_id="w", attempt=1))
    for step in range(3):
        await writer.record(job.id, Progress(stage="denoise", step=step, total=3))
    await writer.record(job.id, COMPLETED)
    async with asyncio.timeout(20):
        assert [event.type for event in await reading] == ["queued", "started", *["progress"] * 3, "completed"]
        assert (await waiting).artifact == COMPLETED.artifact


async def test_who_waits_for_work_hears_of_another_servers_job(stores: list[SqlJobStore]) -> None:
    """Of a new one, one that is given back, and a cancel."""
    writer, reader = stores
    job = await writer.create(make_job(), limits=QueueLimits())

    async def hears() -> None:
        async with asyncio.timeout(20):
            await reader.wait_for_work(_NEVER_S)

    await hears()
    assert await writer.claim(["fake"], "d", 60) is not None
    await writer.give_back("d", job.id, is_lost=False)
    await hears()
    await writer.request_cancel(job.id)
    await hears()


async def test_a_server_whose_connection_broke_off_listens_again(
    stores: list[SqlJobStore], postgres: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile, and for what was lost, it looks by itself."""
    monkeypatch.setattr("kinema.jobs.signals._RETRY_S", 0.01)
    writer, reader = stores
    job = await writer.create(make_job(), limits=QueueLimits())
    reading = asyncio.create_task(events_of(reader, job.id))
    listeners = (
        "SELECT pg_terminate_backend(pid, 20000) FROM pg_stat_activity "
        f"WHERE datname = '{postgres_url.rpartition('/')[2]}' AND query LIKE 'LISTEN%'"
    )
    async with asyncio.timeout(20):
        assert len(await asyncio.to_thread(postgres.execute, listeners)) == 2
        await writer.record(job.id, Cancelled())
        assert [event.type for event in await reading] == ["queued", "cancelled"]
        await asyncio.gather(*(store.signals.is_listening.wait() for store in stores))
        monkeypatch.setattr(watching, "_POLL_S", _NEVER_S)
        other = await writer.create(make_job(), limits=QueueLimits())
        reading = asyncio.create_task(events_of(reader, other.id))
        await writer.record(other.id, Cancelled())
        assert [event.type for event in await reading] == ["queued", "cancelled"]


async def test_many_signals_go_in_few_messages(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once to every other server, and none to the sender."""
    databases = [await Database.open(postgres_url) for _ in range(2)]
    heard: list[list[str]] = [[], []]

    def into(number: int) -> Signals:
        def hear(words: Collection[str]) -> None:
            heard[number] += words

        return Signals(databases[number], hear)

    signals = [into(0), into(1)]
    messages: list[str] = []
    send = databases[0].send

    async def counted(message: str) -> None:
        messages.append(message)
        await send(message)

    monkeypatch.setattr(databases[0], "send", counted)
    for one in signals:
        one.start()
    async with asyncio.timeout(20):
        await asyncio.gather(*(one.is_listening.wait() for one in signals))
        words = [make_job().id for _ in range(400)]
        for word in words * 2:
            signals[0].tell(word)
        while len(heard[1]) < len(words):  # noqa: ASYNC110 - messages come to the loop by themselves
            await asyncio.sleep(0.002)
    assert sorted(heard[1]) == sorted(words)
    assert heard[0] == []
    assert len(messages) == 3
    assert max(len(message.encode()) for message in messages) < 8000
    for one in signals:
        await one.stop()
    for database in databases:
        await database.close()
