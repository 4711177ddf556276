"""Inputs that several servers hold, use and drop at the same time, on both kinds of database."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kinema.errors import QuotaExceeded
from kinema.ids import new_job_id
from kinema.inputs import Prepared
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from kinema.service.stored_inputs import StoredInputs
from kinema.storage import Storage
from tests.serving import REQUEST, make_job


async def test_no_job_is_without_its_input_while_others_drop_the_same(url: str, tmp_path: Path) -> None:
    """Three servers submit and cancel jobs with one film, over and over, and delete what nobody uses. Every job that
    was accepted has its film until it is cancelled; at the end nothing is left."""
    stores = [await SqlJobStore.open(url) for _ in range(3)]
    storage = Storage(f"file://{tmp_path / 'files'}")
    servers = [StoredInputs(store.inputs, storage) for store in stores]
    film = b"f" * 1000

    async def submit_and_cancel(number: int) -> None:
        store, inputs = stores[number % 3], servers[number % 3]
        job_id = new_job_id()
        request = await inputs.hold(job_id, "", Prepared(REQUEST, (), edits=film))
        await store.create(make_job(id=job_id, request=request), limits=QueueLimits())
        for _ in range(3):
            assert b"".join(storage.read(str(request.edits_key))) == film
            await asyncio.sleep(0)
        await store.request_cancel(job_id)
        await inputs.clean()

    for _ in range(5):
        await asyncio.gather(*map(submit_and_cancel, range(9)))
    await asyncio.gather(*(server.clean() for server in servers))
    assert [path for path in (tmp_path / "files").rglob("*") if path.is_file()] == []
    assert await stores[0].inputs.stored_bytes("") == 0
    await asyncio.gather(*(store.close() for store in stores))


async def test_a_quota_holds_over_all_servers(url: str) -> None:
    """Of many submissions at once, as many are accepted as there is room for."""
    stores = [await SqlJobStore.open(url) for _ in range(3)]

    async def hold(number: int) -> bool:
        try:
            await stores[number % 3].inputs.hold(new_job_id(), "k", {f"{number:064x}": 10}, 55)
        except QuotaExceeded:
            return False
        return True

    assert sum(await asyncio.gather(*map(hold, range(12)))) == 5
    assert await stores[0].inputs.stored_bytes("k") == 50
    await asyncio.gather(*(store.close() for store in stores))


async def test_a_server_that_is_cut_short_leaves_nothing_for_ever(url: str, tmp_path: Path) -> None:
    """It dies before its job exists. Another one gives up what it held, also when the file was never written."""
    store = await SqlJobStore.open(url)
    storage = Storage(f"file://{tmp_path / 'files'}")
    now = [1000.0]
    inputs = StoredInputs(store.inputs, storage, clock=lambda: now[0] + 10**10)
    request = await inputs.hold(new_job_id(), "", Prepared(REQUEST, (), edits=b"film"))
    await store.inputs.hold(new_job_id(), "", {"a" * 64: 10})
    assert storage.has(str(request.edits_key), 4)
    await inputs.start()
    async with asyncio.timeout(20):
        store.inputs.has_dropped.set()
        while storage.has(str(request.edits_key), 4) or await store.inputs.dropped(1):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    assert await store.inputs.stored_bytes("") == 0
    await inputs.stop()
    await store.close()
