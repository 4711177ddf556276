"""Webhook endpoints and their messages, on a database in memory; on PostgreSQL by tests/integration/jobs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from kinema.errors import InvalidRequest, WebhookNotFound
from kinema.events import Artifact, Cancelled, Completed, Event, Failed
from kinema.job import Job
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from kinema.jobs.webhook_store import (
    EVENT_TYPES,
    MAX_ENDPOINTS_PER_KEY,
    SqlWebhookStore,
    WebhookDelivery,
    WebhookEndpoint,
)
from tests.serving import make_job
from tests.unit.jobs.test_sql import Clock

COMPLETED = Completed(artifact=Artifact(key="k", media_type="video/mp4", size_bytes=3, etag="e"))
URL = "https://example.com/hook"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def jobs(store_url: str, clock: Clock) -> AsyncIterator[SqlJobStore]:
    jobs = await SqlJobStore.open(store_url, clock)
    yield jobs
    await jobs.close()


@pytest.fixture
def store(jobs: SqlJobStore, clock: Clock) -> SqlWebhookStore:
    return SqlWebhookStore(jobs.database, clock)


async def register(store: SqlWebhookStore, key_id: str = "", *event_types: str) -> WebhookEndpoint:
    return await store.create(key_id, "n", URL, event_types or EVENT_TYPES)


async def end(jobs: SqlJobStore, event: Event, key_id: str = "") -> Job:
    """A job that has ended with that event."""
    job = await jobs.create(make_job(key_id=key_id), limits=QueueLimits())
    await jobs.claim(["fake"], "a", 10)
    assert await jobs.record(job.id, event)
    return await jobs.get(job.id)


async def claim_all(store: SqlWebhookStore) -> list[WebhookDelivery]:
    claimed = []
    while (delivery := await store.claim(60)) is not None:
        claimed.append(delivery)
    return claimed


@pytest.mark.parametrize(
    ("event", "event_type"),
    [
        (COMPLETED, "video.completed"),
        (Failed(code="engine_failed", message="It failed."), "video.failed"),
        (Cancelled(), "video.failed"),
    ],
)
async def test_the_end_of_a_job_writes_a_message(
    jobs: SqlJobStore, store: SqlWebhookStore, event: Event, event_type: str
) -> None:
    """Its shape is OpenAI's: an event with the id of the video; a cancelled one has failed."""
    endpoint = await register(store)
    job = await end(jobs, event)
    (delivery,) = await claim_all(store)
    assert (delivery.endpoint, delivery.attempts, delivery.created_at) == (endpoint, 1, 1000.0)
    said = json.loads(delivery.payload)
    assert said.pop("id").startswith("evt_")
    assert said == {"object": "event", "created_at": 1000, "type": event_type, "data": {"id": job.id}}


async def test_a_job_that_ends_while_it_waits_is_told_of(jobs: SqlJobStore, store: SqlWebhookStore) -> None:
    """Cancelling a queued job is its end."""
    await register(store)
    job = await jobs.create(make_job(), limits=QueueLimits())
    await jobs.request_cancel(job.id)
    (delivery,) = await claim_all(store)
    assert json.loads(delivery.payload)["data"] == {"id": job.id}


async def test_who_asked_is_told_and_nobody_else(jobs: SqlJobStore, store: SqlWebhookStore) -> None:
    """Endpoints of the job's key that want this event, and the one of the settings; one event, an id for each."""
    own = await register(store, "ann")
    await register(store, "ann", "video.failed")
    await register(store, "bob")
    await store.set_shared(URL, "secret")
    await end(jobs, COMPLETED, key_id="ann")
    told = await claim_all(store)
    assert {delivery.endpoint.id for delivery in told} == {own.id, "we_settings"}
    assert len({delivery.id for delivery in told}) == 2
    assert len({delivery.payload for delivery in told}) == 1


async def test_nothing_is_written_when_the_end_is_not(jobs: SqlJobStore, store: SqlWebhookStore) -> None:
    """A second end comes too late, and is no message either."""
    await register(store)
    job = await end(jobs, COMPLETED)
    assert not await jobs.record(job.id, Cancelled())
    assert len(await claim_all(store)) == 1


async def test_a_claimed_message_is_not_claimed_again(jobs: SqlJobStore, store: SqlWebhookStore, clock: Clock) -> None:
    """Until its lease has run out; each claim is another attempt, and what an old one says is ignored."""
    await register(store)
    await end(jobs, COMPLETED)
    (first,) = await claim_all(store)
    clock.now += 59
    assert await claim_all(store) == []
    clock.now += 1
    (second,) = await claim_all(store)
    assert (second.id, second.attempts) == (first.id, 2)
    await store.postpone(first, clock.now)
    assert await claim_all(store) == []
    await store.postpone(second, clock.now)
    (third,) = await claim_all(store)
    await store.forget(third)
    clock.now += 1000
    assert await claim_all(store) == []


async def test_busy_endpoints_are_passed_over(jobs: SqlJobStore, store: SqlWebhookStore) -> None:
    """Their messages wait, those of others do not."""
    slow, quick = await register(store), await register(store)
    await end(jobs, COMPLETED)
    claimed = await store.claim(60, busy=[slow.id])
    assert claimed is not None
    assert claimed.endpoint.id == quick.id
    assert await store.claim(60, busy=[slow.id]) is None


async def test_a_deleted_endpoint_takes_its_messages_with_it(jobs: SqlJobStore, store: SqlWebhookStore) -> None:
    """They are not sent any more, and neither are new ones written."""
    endpoint = await register(store)
    await end(jobs, COMPLETED)
    await store.delete("", endpoint.id)
    await end(jobs, COMPLETED)
    assert await claim_all(store) == []


async def test_messages_go_where_the_endpoint_is_now(jobs: SqlJobStore, store: SqlWebhookStore) -> None:
    """A URL is often mended because messages do not arrive."""
    endpoint = await register(store)
    await end(jobs, COMPLETED)
    await store.update("", endpoint.id, url="https://example.com/new")
    (delivery,) = await claim_all(store)
    assert delivery.endpoint.url == "https://example.com/new"


async def test_another_keys_endpoint_is_not_found(store: SqlWebhookStore) -> None:
    """By any method, as one that does not exist; nor is the one of the settings anybody's."""
    endpoint = await register(store, "ann")
    await store.set_shared(URL, "secret")
    for endpoint_id in (endpoint.id, "we_settings", "we_" + "0" * 32, "x\0", ""):
        for call in (store.get, store.update, store.rotate, store.delete):
            with pytest.raises(WebhookNotFound):
                await call("bob", endpoint_id)
    assert await store.list_page("bob", after=None, limit=10) == ([], False)
    assert await store.get("ann", endpoint.id) == endpoint


async def test_pages_are_newest_first(store: SqlWebhookStore, clock: Clock) -> None:
    """After the id of one, whether or not it is still there."""
    made = []
    for _ in range(3):
        clock.now += 1
        made.append(await register(store))
    assert await store.list_page("", after=None, limit=2) == ([made[2], made[1]], True)
    await store.delete("", made[1].id)
    assert await store.list_page("", after=made[1].id, limit=2) == ([made[0]], False)


async def test_a_key_has_so_many_endpoints(store: SqlWebhookStore) -> None:
    """One more is refused; another key has its own."""
    for _ in range(MAX_ENDPOINTS_PER_KEY):
        await register(store, "ann")
    with pytest.raises(InvalidRequest, match="20 webhook endpoints"):
        await register(store, "ann")
    await register(store, "bob")


async def test_an_update_that_changes_nothing_is_none(store: SqlWebhookStore, clock: Clock) -> None:
    """updated_at tells of changes, a new secret among them."""
    endpoint = await register(store)
    clock.now += 5
    assert await store.update("", endpoint.id, name="n", event_types=EVENT_TYPES) == endpoint
    assert (await store.update("", endpoint.id, name="other")).updated_at == 1005.0
    clock.now += 5
    assert (await store.rotate("", endpoint.id)).updated_at == 1010.0


async def test_a_rotated_secret_may_leave_the_old_one_valid_for_a_while(store: SqlWebhookStore, clock: Clock) -> None:
    """As long as was asked for; without asking it ends at once, one of an earlier rotation too."""
    first = await register(store)
    second = await store.rotate("", first.id, keep_old_s=100)
    assert second.secrets(clock.now) == (second.secret, first.secret)
    assert second.secrets(clock.now + 100) == (second.secret,)
    third = await store.rotate("", first.id)
    assert third.secrets(clock.now) == (third.secret,)
    assert len({first.secret, second.secret, third.secret}) == 3


async def test_the_endpoint_of_the_settings_follows_them(jobs: SqlJobStore, store: SqlWebhookStore) -> None:
    """It keeps its messages when it changes, and loses them when it is gone."""
    await store.set_shared(URL, "secret")
    await end(jobs, COMPLETED)
    await store.set_shared("https://example.com/new", "other")
    delivery = await store.claim(60)
    assert delivery is not None
    assert (delivery.endpoint.url, delivery.endpoint.secret) == ("https://example.com/new", "other")
    await store.postpone(delivery, 0)
    await store.set_shared(None, None)
    assert await claim_all(store) == []
