"""A key that gets a name, on both kinds of database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from kinema.events import Started, Timings
from kinema.jobs.key_names import name_keys
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits, Submission
from kinema.jobs.webhook_store import SqlWebhookStore
from tests.serving import make_job
from tests.unit.jobs.test_sql import COMPLETED

OLD, NEW, OTHER = "a" * 32, "name:alice", "b" * 32


async def test_what_a_key_has_made_belongs_to_its_name(url: str) -> None:
    """Its videos, place in the line, stored bytes, usage and webhooks, also where the name has some already; nothing of
    other keys. A second start finds nothing to do."""
    store, today = await SqlJobStore.open(url), datetime.now(UTC).date()
    webhooks = SqlWebhookStore(store.database)
    end = COMPLETED.model_copy(update={"timings": Timings(device_s=2.0)})
    made = {}
    for key_id in (OLD, NEW, OTHER):
        made[key_id] = []
        for number in range(2):
            submission = Submission(f"{key_id}{number}", idempotency_key=f"key-{number}")
            job = await store.create(make_job(key_id=key_id), limits=QueueLimits(), submission=submission)
            await store.record(job.id, Started(worker_id="w", attempt=1), end)
            made[key_id].append(job.id)
        await webhooks.create(key_id, "name", "http://127.0.0.1/", ["video.completed"])
    waiting = await store.create(make_job(key_id=OLD), limits=QueueLimits())
    for _ in range(2):
        await name_keys(store.database, {OLD: NEW, "c" * 32: "name:carol"})
        page, _ = await store.list_page(NEW, after=None, limit=20, is_ascending=True)
        assert [job.id for job in page] == [*made[OLD], *made[NEW], waiting.id]
        assert await store.list_page(OLD, after=None, limit=20, is_ascending=True) == ([], False)
        assert len((await store.list_page(OTHER, after=None, limit=20, is_ascending=True))[0]) == 2
        assert [await store.inputs.stored_bytes(key_id) for key_id in (OLD, NEW, OTHER)] == [0, 24, 12]
        days = await store.usage(None, today - timedelta(days=1), today)
        assert sorted((day.key_id, day.num_videos, day.device_s) for day in days) == [(OTHER, 2, 4.0), (NEW, 4, 8.0)]
        found = [len((await webhooks.list_page(key_id, after=None, limit=20))[0]) for key_id in (OLD, NEW, OTHER)]
        assert found == [0, 2, 1]
    again = await store.find_repeated(NEW, Submission(f"{NEW}0", idempotency_key="key-0"))
    assert again is not None
    assert again.id == made[NEW][0]
    claimed = await store.claim(["fake"], "d", 60)
    assert claimed is not None
    assert claimed.id == waiting.id
    await store.close()


async def test_many_jobs_are_renamed(url: str) -> None:
    """In several transactions."""
    store = await SqlJobStore.open(url)
    for _ in range(3):
        await store.create(make_job(key_id=OLD), limits=QueueLimits(max_queued=9))
    await name_keys(store.database, {OLD: NEW})
    assert [one.key_id for one in await store.active()] == [NEW] * 3
    await store.close()
