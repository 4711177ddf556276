"""Webhooks on a real database that several servers share."""

from __future__ import annotations

import asyncio

from kinema.errors import InvalidRequest
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from kinema.jobs.webhook_store import EVENT_TYPES, MAX_ENDPOINTS_PER_KEY, SqlWebhookStore
from tests.serving import make_job

URL = "https://example.com/hook"


async def test_each_message_is_claimed_once(url: str) -> None:
    """By several servers at once, while endpoints come and go; no job's end fails over an endpoint that goes."""
    jobs = [await SqlJobStore.open(url) for _ in range(3)]
    stores = [SqlWebhookStore(store.database) for store in jobs]
    await asyncio.gather(*(store.set_shared(URL, "secret") for store in stores))
    await stores[0].create("", "n", URL, EVENT_TYPES)
    claimed: list[str] = []
    are_ended = asyncio.Event()

    async def end(number: int) -> None:
        job = await jobs[number % 3].create(make_job(), limits=QueueLimits())
        await jobs[(number + 1) % 3].request_cancel(job.id)

    async def come_and_go(number: int) -> None:
        endpoint = await stores[number % 3].create("", "n", URL, EVENT_TYPES)
        await stores[(number + 1) % 3].delete("", endpoint.id)

    async def send(store: SqlWebhookStore) -> None:
        while (delivery := await store.claim(60)) is not None or not are_ended.is_set():
            if delivery is not None:
                claimed.append(delivery.id)
                await store.forget(delivery)

    senders = [asyncio.create_task(send(store)) for store in stores]
    await asyncio.gather(*(end(number) for number in range(30)), *(come_and_go(number) for number in range(15)))
    are_ended.set()
    await asyncio.gather(*senders)
    assert len(claimed) == len(set(claimed)) >= 60
    await asyncio.gather(*(store.close() for store in jobs))


async def test_servers_together_keep_to_the_number_of_endpoints(url: str) -> None:
    """However many registrations come at once."""
    jobs = [await SqlJobStore.open(url) for _ in range(2)]
    stores = [SqlWebhookStore(store.database) for store in jobs]
    creates = (stores[i % 2].create("ann", "n", URL, EVENT_TYPES) for i in range(MAX_ENDPOINTS_PER_KEY + 10))
    made = await asyncio.gather(*creates, return_exceptions=True)
    assert sum(isinstance(found, InvalidRequest) for found in made) == 10
    assert len((await stores[0].list_page("ann", after=None, limit=100))[0]) == MAX_ENDPOINTS_PER_KEY
    await asyncio.gather(*(store.close() for store in jobs))
