"""What only a database server can do: be away, drop connections, refuse passwords, sort in its own language."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import pytest
from sqlalchemy import Connection, text

from kinema.errors import ConfigError, StoreUnavailable
from kinema.events import Cancelled, Started
from kinema.ids import JobId
from kinema.jobs.admission import Admission
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


def limited(url: str, **limits_ms: int) -> str:
    """The URL with other limits of its connections."""
    return url + "?options=" + "%20".join(f"-c%20{name}%3D{limit}" for name, limit in limits_ms.items())


@asynccontextmanager
async def frozen_in_a_submission(store: SqlJobStore) -> AsyncIterator[asyncio.Task[None]]:
    """A transaction of this store that keeps other submissions out; its client says nothing until the end of this."""
    loop, is_frozen, goes_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def freeze(connection: Connection) -> None:
        Admission(store.database.now).admit(connection, [(make_job(), QueueLimits())])
        loop.call_soon_threadsafe(is_frozen.set)
        goes_on.wait()
        connection.execute(text("SELECT 1"))

    frozen = asyncio.create_task(store.database.write(freeze))
    try:
        await is_frozen.wait()
        yield frozen
    finally:
        goes_on.set()


async def test_a_frozen_server_holds_up_submissions_for_seconds_and_nothing_else(
    store: SqlJobStore, postgres_url: str
) -> None:
    """More submissions wait than there are threads. Jobs are claimed, renewed, cancelled and ended meanwhile; then the
    frozen transaction is ended, and all submissions are accepted."""
    other = await SqlJobStore.open(limited(postgres_url, idle_in_transaction_session_timeout=1500))
    for age in range(3):
        await store.create(make_job(created_at=float(age)), limits=QueueLimits())
    async with frozen_in_a_submission(other) as frozen:
        began = time.monotonic()
        creates = [asyncio.create_task(store.create(make_job(), limits=QueueLimits())) for _ in range(12)]
        jobs = [await store.claim(["fake"], "one", 10) for _ in range(3)]
        assert all(jobs)
        await store.renew("one", 10)
        first, second, third = (job for job in jobs if job is not None)
        assert await store.record(first.id, Started(worker_id="w", attempt=1), attempt=1)
        assert (await store.request_cancel(second.id)).is_cancel_requested
        assert await store.record(second.id, Cancelled(), attempt=1)
        await store.give_back("one", third.id, is_lost=False)
        await store.release("one")
        assert not any(create.done() for create in creates), "submissions did not wait, so this says nothing"
        assert len(await asyncio.gather(*creates)) == 12
        assert time.monotonic() - began < 10
    with pytest.raises(StoreUnavailable, match="idle-in-transaction timeout"):
        await frozen
    await other.create(make_job(), limits=QueueLimits())
    await other.close()


async def test_a_server_that_freezes_behind_a_statement_for_many_rows_is_noticed(postgres_url: str) -> None:
    """Its locks would stay as long as the process: a job of its that nobody may claim, say."""
    database = await Database.open(limited(postgres_url, idle_in_transaction_session_timeout=100))
    goes_on = threading.Event()

    def freeze(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE rows (a int)"))
        connection.execute(text("INSERT INTO rows VALUES (:a)"), [{"a": 1}, {"a": 2}])
        backend = connection.scalar(text("SELECT pg_backend_pid()"))
        connection.execute(text("INSERT INTO rows VALUES (:a)"), [{"a": 3}, {"a": 4}])
        is_there = text("SELECT 1 FROM pg_stat_activity WHERE pid = :pid")
        with database._engine.connect() as other:
            while other.scalar(is_there, {"pid": backend}) and not goes_on.is_set():
                other.rollback()
        connection.execute(text("SELECT 1"))

    freezing = asyncio.create_task(database.write(freeze))
    try:
        with pytest.raises(StoreUnavailable, match="idle-in-transaction timeout"):
            async with asyncio.timeout(5):
                await asyncio.shield(freezing)
    finally:
        goes_on.set()
        await database.close()


async def test_a_submission_that_waits_for_a_lock_is_refused_after_a_while(
    store: SqlJobStore, postgres_url: str
) -> None:
    """Where the one that has it goes on and on, too; nothing is stored, and the next one works."""
    hasty = await SqlJobStore.open(limited(postgres_url, lock_timeout=200))
    async with frozen_in_a_submission(store):
        outcomes = await asyncio.gather(
            *(hasty.create(make_job(), limits=QueueLimits()) for _ in range(6)), return_exceptions=True
        )
        assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
    assert await hasty.count_waiting() == 0
    await hasty.create(make_job(), limits=QueueLimits())
    await hasty.close()


@pytest.mark.parametrize("line", ["database", "creation"])
async def test_a_request_that_waited_too_long_in_line_is_refused(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Behind a database that hangs nobody waits for the whole line; what keeps jobs going is not refused."""
    monkeypatch.setattr(f"kinema.jobs.{line}.IN_LINE_S", -1.0)
    with pytest.raises(StoreUnavailable, match="busy"):
        await store.create(make_job(), limits=QueueLimits())
    await store.renew("nobody", 10)
    assert await store.claim(["fake"], "one", 10) is None


async def test_a_row_that_a_frozen_server_has_locked_does_not_cost_the_other_leases(
    store: SqlJobStore, postgres: PostgresServer, postgres_url: str
) -> None:
    """They are renewed at once, and given back at once; the locked one follows."""
    jobs = [await store.create(make_job(created_at=float(age)), limits=QueueLimits()) for age in range(2)]
    for _ in jobs:
        await store.claim(["fake"], "one", 10)
    leases = text("SELECT lease_until FROM jobs ORDER BY created_at")

    async def read_leases() -> list[float | None]:
        return list(await store.database.read(lambda connection: connection.execute(leases).scalars()))

    before = await read_leases()
    with psycopg.connect(postgres_url) as frozen:
        frozen.execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", (jobs[0].id,))
        renewing = asyncio.create_task(store.renew("one", 1000))
        async with asyncio.timeout(5):
            while await read_leases() == before:
                pass
        now = await read_leases()
        assert now[0] == before[0]
        frozen.rollback()
        await renewing
        assert None not in await read_leases()
        assert (await read_leases())[0] != before[0]
        frozen.execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", (jobs[0].id,))
        releasing = asyncio.create_task(store.release("one"))
        async with asyncio.timeout(5):
            while (await read_leases())[1] is not None:
                pass
        frozen.rollback()
        await releasing
    assert await read_leases() == [None, None]


async def test_the_first_jobs_of_all_keys_may_be_taken_by_others_at_this_moment(
    store: SqlJobStore, postgres_url: str
) -> None:
    """The next ones are claimed then; nobody waits, and no place stays empty."""
    jobs = [await store.create(make_job(created_at=float(age)), limits=QueueLimits()) for age in range(3)]
    with psycopg.connect(postgres_url) as other:
        other.execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", (jobs[0].id,))
        async with asyncio.timeout(2):
            claimed = [await store.claim(["fake"], "one", 10) for _ in range(3)]
        assert [job and job.id for job in claimed] == [jobs[1].id, jobs[2].id, None]


async def test_a_key_whose_turn_somebody_writes_is_claimed_all_the_same(store: SqlJobStore, postgres_url: str) -> None:
    """A frozen server cannot stop the claims of its key."""
    await store.create(make_job(key_id="a"), limits=QueueLimits())
    with psycopg.connect(postgres_url) as other:
        other.execute("UPDATE key_turns SET turn = 7 WHERE key_id = 'a'")
        async with asyncio.timeout(2):
            assert await store.claim(["fake"], "one", 10) is not None


async def test_each_connection_has_limits(store: SqlJobStore, postgres_url: str) -> None:
    """A URL may set others."""
    names = ("idle_in_transaction_session_timeout", "lock_timeout", "statement_timeout", "jit")

    def read(connection: Connection) -> list[str]:
        return [connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names]

    assert await store.database.read(read) == ["3s", "5s", "8s", "off"]
    assert await store.database.write(read) == ["3s", "5s", "8s", "off"]
    other = await SqlJobStore.open(limited(postgres_url, lock_timeout=77))
    assert await other.database.write(read) == ["3s", "77ms", "8s", "off"]
    await other.close()


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
