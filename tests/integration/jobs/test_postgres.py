"""What only a database server can do: be away, drop connections, refuse passwords, sort in its own language."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from kinema.errors import ConfigError, StoreUnavailable
from kinema.ids import JobId
from kinema.jobs.database import Database
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from tests.postgres import PASSWORD, PostgresServer
from tests.serving import make_job


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[SqlJobStore]:
    store = await SqlJobStore.open(postgres_url)
    yield store
    await store.close()


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


def drop_connections(postgres: PostgresServer, url: str) -> int:
    """How many there were; all of them are closed when this returns."""
    query = f"SELECT pg_terminate_backend(pid, 20000) FROM pg_stat_activity WHERE datname = '{name_of(url)}'"
    return len(postgres.execute(query))


async def test_idle_connections_that_the_server_dropped_are_replaced(
    store: SqlJobStore, postgres: PostgresServer, postgres_url: str
) -> None:
    """Nobody hears of it: neither who reads nor who writes."""
    job = await store.create(make_job(), limits=QueueLimits())
    for _ in range(2):
        await store.get(job.id)
        assert await asyncio.to_thread(drop_connections, postgres, postgres_url) >= 1
        assert await store.get(job.id) == job
        await store.renew("nobody", 1)


async def test_a_connection_that_is_known_to_be_lost_is_replaced(store: SqlJobStore) -> None:
    """Its client has closed its end already, so there is not even anything to look at."""
    job = await store.create(make_job(), limits=QueueLimits())

    engine = store.database._engine
    for record in list(engine.pool._pool.queue):  # type: ignore[attr-defined]
        record.dbapi_connection.close()
    assert await store.get(job.id) == job
    await store.renew("nobody", 1)


async def test_a_connection_dropped_in_a_transaction_is_unavailable_and_the_next_works(
    store: SqlJobStore, postgres: PostgresServer, postgres_url: str
) -> None:
    """What was written in it is not there."""
    job = make_job()

    def write_and_wait(connection: object) -> None:
        connection.execute(text("CREATE TABLE half (a int)"))  # type: ignore[attr-defined]
        connection.execute(text("SELECT pg_sleep(60)"))  # type: ignore[attr-defined]

    writing = asyncio.create_task(store.database.write(write_and_wait))
    asleep = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name_of(postgres_url)}' AND wait_event = 'PgSleep'"
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(postgres.execute, asleep):
            pass
    await asyncio.to_thread(drop_connections, postgres, postgres_url)
    with pytest.raises(StoreUnavailable, match="terminating connection"):
        await writing
    await store.create(job, limits=QueueLimits())
    found = await store.database.read(lambda connection: connection.scalar(text("SELECT to_regclass('half')")))
    assert found is None


async def test_a_server_that_was_away_is_used_again_when_it_is_back(
    store: SqlJobStore, postgres: PostgresServer, postgres_url: str
) -> None:
    """Until then every call is StoreUnavailable, and watchers go on waiting."""
    job = await store.create(make_job(), limits=QueueLimits())
    watcher = store.watch(job.id)
    await anext(watcher)
    name = name_of(postgres_url)
    await asyncio.to_thread(postgres.execute, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await asyncio.to_thread(drop_connections, postgres, postgres_url)
    for _ in range(12):  # more than there are connections
        with pytest.raises(StoreUnavailable, match="not currently accepting connections"):
            await store.get(job.id)
    with pytest.raises(StoreUnavailable):
        await store.create(make_job(), limits=QueueLimits())
    await asyncio.to_thread(postgres.execute, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    await store.request_cancel(job.id)
    assert [stored.event.type async for stored in watcher] == ["cancelled"]


async def test_ids_are_in_the_order_of_their_bytes_in_every_language(postgres: PostgresServer) -> None:
    """Danish sorts "aa" as a letter behind z, and a page of a list must not depend on that."""
    with postgres.database("TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'da' LOCALE 'C.UTF-8'") as url:
        store = await SqlJobStore.open(url)
        ids = [JobId(f"video_{digits:0<32}") for digits in ("09", "0a", "99", "9a", "a9", "aa", "ab", "ba", "ff")]
        for job_id in ids:
            await store.create(make_job(id=job_id), limits=QueueLimits())
        first, _ = await store.list_page("", after=None, limit=5, is_ascending=True)
        rest, has_more = await store.list_page("", after=first[-1].id, limit=5, is_ascending=True)
        await store.close()
    assert ([job.id for job in [*first, *rest]], has_more) == (ids, False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda url: url.replace(PASSWORD.replace(" ", "%20"), "s3cret"), "password authentication failed"),
        (lambda url: url.replace("/kinema_", "/absent_"), "does not exist"),
        (lambda url: url.replace("127.0.0.1:", "127.0.0.1:1"), "jobs.database_url"),
        (lambda url: url.replace("127.0.0.1", "[::1%nowhere]"), "::1%nowhere"),
        (lambda url: url + "?colour=red", "colour"),
        (lambda url: url + "?connect_timeout=soon", "jobs.database_url"),
        (lambda url: url + "?sslmode=maybe", "sslmode"),
        (lambda url: url + "?sslmode=disable&sslmode=require", "sslmode"),
        (lambda url: url.replace("127.0.0.1:", "127.0.0.1:x"), "accepted are"),
    ],
)
async def test_a_server_that_cannot_be_used_stops_the_start(change: object, sentence: str, postgres_url: str) -> None:
    """With the setting's name and the server's own words, and never with the password."""
    url = change(postgres_url)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        await SqlJobStore.open(url)
    message = caught.value.message
    assert message.startswith("jobs.database_url")
    assert sentence in message
    assert not any(secret in message for secret in ("s3cret", PASSWORD, PASSWORD.replace(" ", "%20")))


async def test_a_missing_driver_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'kinema\[postgres\]'"):
        await Database.open("postgresql://localhost/kinema")
