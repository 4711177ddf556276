"""A database and a storage know each other: which start with each other, and which do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from kinema.errors import ConfigError, StorageUnavailable
from kinema.events import Completed, Started
from kinema.ids import JobId, new_job_id
from kinema.jobs.identity import read_identity
from kinema.jobs.retention import SqlRetention
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from kinema.service.pairing import Pairing
from kinema.storage import OWNER_KEY, Storage, image_key, temporary_key, video_key
from tests.serving import make_job

Opened = Callable[[str], Awaitable[SqlJobStore]]


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Opened]:
    """Opens a database by its name, each time anew, as every server of it does."""
    async with AsyncExitStack() as stack:

        async def open_one(name: str) -> SqlJobStore:
            store = await SqlJobStore.open(f"sqlite:///{tmp_path}/{name}.db")
            stack.push_async_callback(store.close)
            return store

        yield open_one


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"{request.param}://{tmp_path}/files")


async def pairing(store: SqlJobStore, storage: Storage) -> Pairing:
    return Pairing(await read_identity(store.database), SqlRetention(store.database), storage)


async def complete(store: SqlJobStore, storage: Storage) -> JobId:
    job = make_job()
    await store.create(job, limits=QueueLimits())
    await store.record(job.id, Started(worker_id="w", attempt=1))
    artifact = storage.put_bytes(video_key(job.id, 1), b"video", "video/mp4")
    await store.record(job.id, Completed(artifact=artifact))
    return job.id


async def test_the_first_database_gets_the_storage_and_another_is_refused(opened: Opened, storage: Storage) -> None:
    """The sentence names both by their ids, and what to do. The first one comes back whenever it likes."""
    first, second = await pairing(await opened("first"), storage), await pairing(await opened("second"), storage)
    await first.check()
    assert storage.read_owner() == first.store_id != second.store_id
    with pytest.raises(ConfigError) as refused:
        await second.check()
    for part in ("storage.url = ", first.store_id, second.store_id, "give the two", "`kinema storage adopt`"):
        assert part in refused.value.message
    await (await pairing(await opened("first"), storage)).check()


async def test_a_new_database_does_not_get_a_storage_with_videos(opened: Opened, storage: Storage) -> None:
    """Though nothing says yet whose they are; not even for a single input. Nothing is written there."""
    storage.put_bytes(image_key(new_job_id()), b"image", "image/png")
    new = await pairing(await opened("new"), storage)
    with pytest.raises(ConfigError, match=r"1 of the 1 videos there are not in jobs\.database_url; give the database"):
        await new.check()
    assert storage.read_owner() is None
    await new.adopt()
    await new.check()


async def test_a_database_keeps_its_storage_that_has_no_id_yet(opened: Opened, storage: Storage) -> None:
    """As after an update, with what refused and deleted jobs have left."""
    store = await opened("old")
    for _ in range(3):
        await complete(store, storage)
    await store.delete(await complete(store, storage))
    storage.put_bytes(image_key(new_job_id()), b"left", "image/png")
    await (await pairing(store, storage)).check()
    assert storage.read_owner() is not None


async def test_videos_for_another_frontend_belong_to_nobody(opened: Opened, storage: Storage) -> None:
    """Those that a worker has made for Dynamo's frontend do not keep a database from its storage."""
    job_id = new_job_id()
    storage.put_bytes(temporary_key(job_id), b"", "text/plain")
    storage.put_bytes(video_key(job_id, 1), b"video", "video/mp4")
    await (await pairing(await opened("new"), storage)).check()


async def test_a_database_with_videos_does_not_get_an_empty_storage(opened: Opened, tmp_path: Path) -> None:
    """It may be a disk that is not mounted. Whoever lost the files says so."""
    store = await opened("old")
    await complete(store, Storage(f"file://{tmp_path}/mounted"))
    empty = await pairing(store, Storage(f"file://{tmp_path}/empty"))
    with pytest.raises(ConfigError, match=r"no video, but 1 of jobs\.database_url should have one; .* mounted"):
        await empty.check()
    await empty.adopt()
    await empty.check()


async def test_a_storage_in_memory_is_new_at_each_start(opened: Opened, tmp_path: Path) -> None:
    """And so has no videos, whatever the database has."""
    store = await opened("old")
    await complete(store, Storage(f"memory://{tmp_path}/before"))
    await (await pairing(store, Storage(f"memory://{tmp_path}/after"))).check()


async def test_servers_of_one_database_start_at_once(opened: Opened, storage: Storage) -> None:
    """The first time, too: all get the storage."""
    stores = await asyncio.gather(*(opened("shared") for _ in range(6)))
    all_of_them = [await pairing(store, storage) for store in stores]
    await asyncio.gather(*(one.check() for one in all_of_them))
    assert {one.store_id for one in all_of_them} == {storage.read_owner()}


async def test_a_server_that_is_overtaken_by_another_of_its_database_starts(
    opened: Opened, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has taken the storage and stored an input between two looks of this one."""
    other = await pairing(await opened("shared"), storage)
    list_jobs = storage.list_jobs

    def overtaken() -> object:
        storage.claim(other.store_id)
        storage.put_bytes(image_key(new_job_id()), b"image", "image/png")
        return list_jobs()

    monkeypatch.setattr(storage, "list_jobs", overtaken)
    await (await pairing(await opened("shared"), storage)).check()


async def test_of_several_databases_that_start_at_once_one_gets_the_storage(opened: Opened, tmp_path: Path) -> None:
    """The others are refused, in every order of their steps that comes up here."""
    stores = [await opened(name) for name in ("a", "b", "c")]
    for number in range(10):
        storage = Storage(f"file://{tmp_path}/{number}")
        results = await asyncio.gather(
            *[(await pairing(store, storage)).check() for store in stores], return_exceptions=True
        )
        assert [type(result) for result in results if result] == [ConfigError, ConfigError]
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == [OWNER_KEY]


async def test_a_store_that_knows_no_exclusive_write_is_claimed_all_the_same(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some that speak S3 refuse it; a folder of another machine may have no links."""
    storage = Storage(f"memory://{tmp_path}/files")
    pipe_file = storage._fs.pipe_file

    def refusing(path: str, data: bytes, mode: str = "overwrite", **options: object) -> None:
        if mode == "create":
            raise NotImplementedError("IfNoneMatch")
        pipe_file(path, data, **options)

    monkeypatch.setattr(storage._fs, "pipe_file", refusing)
    first = await pairing(await opened("first"), storage)
    await first.check()
    assert storage.read_owner() == first.store_id


async def test_a_storage_that_does_not_answer_is_not_another_databases(opened: Opened, tmp_path: Path) -> None:
    """The error is its own, so that a server may start and look again."""
    (tmp_path / "files").write_bytes(b"a file where the folder should be")
    with pytest.raises(StorageUnavailable):
        await (await pairing(await opened("first"), Storage(f"file://{tmp_path}/files"))).check()
