"""What the statements of the store cost in a database with many finished jobs, by its own plans."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from typing import Any

import pytest
from sqlalchemy import event, text

from kinema.bench.filling import fill
from kinema.events import Failed, Preview, Progress, Started
from kinema.ids import JobId, new_job_id
from kinema.job import JobStatus
from kinema.jobs.changes import JobChanges, Mark
from kinema.jobs.chores import Chore, Chores
from kinema.jobs.input_store import SqlInputStore
from kinema.jobs.listing import Wanted
from kinema.jobs.retention import SqlRetention
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits, Submission
from kinema.jobs.webhook_store import SqlWebhookStore
from tests.serving import make_job
from tests.unit.jobs.test_sql import COMPLETED

_KEYS = ["a" * 64, "b" * 64]
_FINISHED, _FAILED, _WAITING = 3000, 500, 120
_LARGE = ("jobs", "events", "inputs", "input_uses", "deleted_jobs", "webhook_deliveries")
# Indexes of jobs that have not ended.
_SMALL = ("jobs_active", "jobs_queued", "jobs_begun")
# Rows that a statement may look at, or sort, beyond those that it returns.
_PAGE = 100
# What SQLite does for a page: a row takes tens of its instructions.
_PAGE_OPS = 10_000
_CHEAP_PAGES = "?options=-c%20random_page_cost%3D0.01%20-c%20seq_page_cost%3D0.01%20-c%20enable_seqscan%3Doff"
_LIMITS = QueueLimits(max_queued=10_000, max_queued_per_key=10_000, max_work=1e12, max_work_per_key=1e12)

# These look at more on purpose: the waiting jobs of a model are counted in an index, and a storage and a database that
# have not met are compared once. ``users`` and ``let_go_of_gone_jobs`` go through the inputs, which are few. A
# key's jobs that have not ended are found among all that have not.
_MAY_READ_MORE = {
    "find_page of jobs that have not ended",
    "create",
    "count_waiting",
    "active",
    "count_videos",
    "users",
    "let_go_of_gone_jobs",
}


class Plans:
    """Watches an engine, and keeps what is wrong with the plans of its statements."""

    def __init__(self, url: str) -> None:
        self.complaints: list[str] = []
        # The method that is called.
        self.doing = ""
        self._is_postgres = url.startswith("postgres")

    def before(self, _connection: Any, cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        if many or not re.match(r"\s*(SELECT|UPDATE|DELETE|WITH|INSERT)\b", statement) or "pg_advisory" in statement:
            return
        if self._is_postgres:
            self._explain_postgres(cursor.connection, statement, parameters)
        else:
            self._explain_sqlite(cursor.connection, statement, parameters)

    def _complain(self, about: str) -> None:
        if self.doing not in _MAY_READ_MORE:
            self.complaints.append(f"{self.doing}: {about}")

    def _explain_sqlite(self, connection: Any, statement: str, parameters: Any) -> None:
        """By the plan, and by the instructions that its virtual machine takes."""
        for _, _, _, step in connection.execute("EXPLAIN QUERY PLAN " + statement, parameters):
            of_table = re.match(r"SCAN (\w+)(?: USING (?:COVERING )?INDEX (\w+))?", step)
            if of_table and self._is_large(of_table[1], statement) and of_table[2] not in _SMALL:
                self._complain(step)
        ops = 0

        def count() -> None:
            nonlocal ops
            ops += 1

        connection.execute("SAVEPOINT explained")
        connection.set_progress_handler(count, 100)
        connection.execute(statement, parameters).fetchall()
        connection.set_progress_handler(None, 0)
        connection.execute("ROLLBACK TO explained")
        if ops * 100 > _PAGE_OPS:
            self._complain(f"{ops * 100} instructions")

    def _is_large(self, name: str, statement: str) -> bool:
        """Whether this is the name of a table, or an alias of one."""
        return name in _LARGE or any(f"{table} AS {name}" in statement for table in _LARGE)

    def _explain_postgres(self, connection: Any, statement: str, parameters: Any) -> None:
        """By the rows that it really looked at and sorted."""
        is_kept = statement.startswith(("UPDATE", "DELETE", "WITH", "INSERT"))
        with connection.cursor() as cursor:
            if is_kept:
                cursor.execute("SAVEPOINT explained")
            cursor.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, parameters)
            [[[found]]] = cursor.fetchall()
            if is_kept:
                cursor.execute("ROLLBACK TO explained")
        for node in _nodes(found["Plan"]):
            rows = (
                node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Join Filter", 0)
            )
            if rows * node["Actual Loops"] > _PAGE + found["Plan"]["Actual Rows"]:
                self._complain(f"{node['Node Type']} of {rows} rows, {node['Actual Loops']} times")


def _nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


@contextmanager
def explained(store: SqlJobStore, url: str) -> Iterator[Plans]:
    plans = Plans(url)
    engine = store.database._engine
    event.listen(engine, "before_cursor_execute", plans.before)
    yield plans
    event.remove(engine, "before_cursor_execute", plans.before)


@pytest.fixture
async def store(url: str) -> AsyncIterator[SqlJobStore]:
    # What one page costs here, where all are in memory: a plan for few rows is then the one for many.
    store = await SqlJobStore.open(url + _CHEAP_PAGES if url.startswith("postgres") else url)
    yield store
    await store.close()


async def _made(store: SqlJobStore) -> JobId:
    job = await store.create(make_job(key_id=_KEYS[0]), limits=QueueLimits(), submission=Submission("f"))
    await store.claim(["fake"], "w", 60)
    await store.record(job.id, Started(worker_id="w", attempt=1), COMPLETED, attempt=1)
    return job.id


async def _call_all(store: SqlJobStore, plans: Plans, made: JobId, waiting: JobId) -> set[str]:  # noqa: PLR0915 - there are that many
    """Call every method of the stores, and return their names."""
    called: set[str] = set()
    jobs = _Noting(store, called, plans)
    retention, inputs = _Noting(SqlRetention(store.database), called, plans), _Noting(store.inputs, called, plans)
    webhooks = _Noting(SqlWebhookStore(store.database), called, plans)
    key, now = _KEYS[0], time.time()
    for after in (None, made):
        for is_ascending in (True, False):
            await jobs.list_page(key, after=after, limit=20, is_ascending=is_ascending)
    for wanted in (
        Wanted(),
        Wanted((JobStatus.FAILED, JobStatus.CANCELLED)),
        Wanted((JobStatus.CANCELLED,)),
        Wanted(is_starred=True),
    ):
        for after in (None, made):
            for is_ascending in (True, False):
                await jobs.find_page(key, wanted, after=after, limit=20, is_ascending=is_ascending)
    for wanted in (Wanted((JobStatus.QUEUED,)), Wanted((JobStatus.IN_PROGRESS, JobStatus.FAILED))):
        plans.doing = "find_page of jobs that have not ended"
        await store.find_page(key, wanted, after=None, limit=20, is_ascending=False)
    for submission in (Submission("g", is_retry=True), Submission("h", idempotency_key="i")):
        await jobs.find_repeated(key, submission)
        await jobs.create(make_job(key_id=key), limits=_LIMITS, submission=submission)
    await jobs.get(made)
    await jobs.wait_for_end(made)
    await jobs.active()
    for name in ("fake", "nobody"):
        await jobs.has_jobs_of(name)
        await jobs.recent_times(name)
        await jobs.recent_arrivals(name, 900)
        await jobs.count_waiting(name)
    await jobs.count_waiting()
    await jobs.waiting_loras(["fake"])
    first, second = [await jobs.claim(["fake"], "owner", 60) for _ in range(2)]
    third = await jobs.claim(["fake"], "owner", 60, without_losses=["nobody"], only_loras={"fake": ["0" * 64]})
    assert await jobs.claim(["nobody"], "owner", 60) is None
    await jobs.renew("owner", 60)
    assert {job_id for job_id, _ in await jobs.wanted("owner")} == {first.id, second.id, third.id}
    preview = Preview(step=1, total=2, b64_jpeg="")
    await jobs.record(first.id, Started(worker_id="w", attempt=1), Progress(stage="denoise", step=1, total=2), preview)
    await jobs.find_preview(first.id)
    for is_starred in (True, False):
        await jobs.star(first.id, is_starred=is_starred)
    await jobs.give_back("owner", second.id, is_lost=True)
    await jobs.request_cancel(third.id)
    await jobs.release("owner", keeping=[third.id])
    await jobs.request_cancel(waiting)
    assert [stored.event.type async for stored in jobs.watch(waiting)] == ["queued", "cancelled"]
    await jobs.delete(waiting)
    await webhooks.set_shared("http://127.0.0.1/", "whsec_")
    endpoint = await webhooks.create(key, "name", "http://127.0.0.1/", ["video.completed"])
    await webhooks.update(key, endpoint.id, name="other")
    await webhooks.rotate(key, endpoint.id)
    await webhooks.get(key, endpoint.id)
    await webhooks.list_page(key, after=endpoint.id, limit=20)
    await jobs.record(first.id, COMPLETED)
    delivery = await webhooks.claim(60, busy=["we_other"])
    await webhooks.postpone(delivery, now)
    await webhooks.forget(delivery)
    await webhooks.delete(key, endpoint.id)
    failed = Failed(code="c", message="m")
    assert not await jobs.fail_waiting(now - 10_000, failed, 20)
    assert len(await jobs.fail_waiting(now - 10, failed, 3)) == 3
    for key_id in (key, None):
        await jobs.usage(key_id, date(2026, 1, 1), date(2099, 1, 1))
    another = new_job_id()
    held = await inputs.hold(another, key, {"0" * 64: 5}, 10**9)
    await inputs.stored_bytes(key)
    await inputs.let_go_held_before(now - 60)
    await inputs.let_go_of_gone_jobs()
    await inputs.users()
    await inputs.let_go(another, key)
    await inputs.dropped(20)
    await inputs.forget([one.name for one in held.values()])
    changes = _Noting(store.changes, called, plans)
    mark = await changes.end(key)
    assert await changes.read_id(await changes.id_of(mark, now), key, now) == mark
    assert await changes.after(key, Mark(-(10**9)), 5)
    assert not await changes.after(key, mark, 20)
    chores = _Noting(Chores(store.database, "owner"), called, plans)
    for _ in range(2):
        await chores.begin(Chore.LISTING, every_s=60, lease_s=60)
    await chores.end(Chore.LISTING, {})
    await chores.found(Chore.LISTING)
    [first_ended, *_] = await retention.ended_before(now - 60, None, 20)
    await retention.ended_before(now - 60, first_ended, 20)
    await retention.forget_ended([first_ended.id])
    await retention.ends([made])
    await retention.deleted([made, waiting])
    await retention.count_videos()
    await retention.compact_ended_before(now - 60, 20)
    await retention.forget_ended_before(now - 2000, 20)
    await retention.forget([made])
    await retention.forget_deleted_before(now - 60, ())
    return called


class _Noting:
    """Calls the methods of an object, and notes their names."""

    def __init__(self, of: Any, called: set[str], plans: Plans) -> None:
        self._of = of
        self._called = called
        self._plans = plans

    def __getattr__(self, name: str) -> Any:
        self._called.add(f"{type(self._of).__name__}.{name}")
        self._plans.doing = name
        return getattr(self._of, name)


async def test_no_statement_looks_at_more_jobs_than_it_needs(store: SqlJobStore, url: str) -> None:
    """Every method of the stores is called, and every statement is explained: none reads more than a page of rows
    beyond those that it returns, however many jobs there are."""
    database = store.database
    made = await _made(store)
    await fill(database, made, first=1, count=_FINISHED, key_ids=_KEYS, newest_at=time.time() - 10)
    failed = await store.create(make_job(key_id=_KEYS[1]), limits=QueueLimits())
    await store.record(failed.id, Failed(code="c", message="m"))
    await fill(database, failed.id, first=_FINISHED, count=_FAILED, key_ids=_KEYS[1:], newest_at=time.time() - 5)
    waiting = await store.create(make_job(key_id=_KEYS[0]), limits=QueueLimits())
    await fill(database, waiting.id, first=10**6, count=_WAITING, key_ids=_KEYS, newest_at=time.time())
    if url.startswith("postgres"):
        await database.write(lambda connection: connection.execute(text("ANALYZE")))
    with explained(store, url) as plans:
        called = await _call_all(store, plans, made, waiting.id)
    public = {
        f"{kind.__name__}.{name}"
        for kind in (SqlJobStore, SqlRetention, SqlInputStore, JobChanges, SqlWebhookStore, Chores)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and (inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method))
    }
    # These only wait, or close.
    assert public - called == {"SqlJobStore.close", "SqlJobStore.wait_for_work"}
    assert not plans.complaints, "\n\n".join(dict.fromkeys(plans.complaints))


async def test_a_list_does_not_look_at_the_newer_jobs_of_others(url: str) -> None:
    """Half of all jobs are the key's, but none of the newest."""
    store = await SqlJobStore.open(url)
    made = await _made(store)
    others = _FINISHED // 2
    await fill(store.database, made, first=1, count=_FINISHED, key_ids=_KEYS, newest_at=time.time() - 10)
    await fill(store.database, made, first=10**6, count=others, key_ids=_KEYS[1:], newest_at=time.time() + others)
    if url.startswith("postgres"):
        await store.database.write(lambda connection: connection.execute(text("ANALYZE")))
    with explained(store, url) as plans:
        found, _ = await store.list_page(_KEYS[0], after=None, limit=20, is_ascending=False)
        following, _ = await store.list_page(_KEYS[0], after=found[-1].id, limit=20, is_ascending=False)
    assert (len(found), len(following)) == (20, 20)
    assert found[-1].id > following[0].id
    assert plans.complaints == []
    await store.close()
