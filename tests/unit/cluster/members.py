"""Workers and frontends of a cluster in memory, as the tests of both sides need them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kinema.cluster.base import WorkerInfo
from kinema.cluster.host import Host
from kinema.cluster.remote import RemoteCluster
from kinema.engines.fake import FakeEngine
from kinema.errors import NoWorker
from kinema.events import Event
from kinema.job import Task
from kinema.settings import WorkerSettings
from kinema.storage import Storage
from kinema.worker.worker import Worker
from tests.serving import until
from tests.unit.cluster.memory import MemoryConnection, Network, Served


@dataclass(eq=False)
class Member:
    worker: Worker
    host: Host
    served: Served


class Cluster:
    """Whatever it started is stopped at its end."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.network = Network()
        self._storage = Storage(f"file://{folder}")
        self._stack = stack

    async def worker(self, worker_id: str, engine: FakeEngine | None = None, *, max_active: int = 1) -> Member:
        worker = Worker(engine or FakeEngine(), self._storage, WorkerSettings(max_active=max_active), worker_id)
        await worker.start()
        self._stack.push_async_callback(worker.stop)
        host = Host(worker)
        return Member(worker, host, self.network.serve(host.handlers))

    async def frontend(self, *, info_silence_s: float = 0.05) -> RemoteCluster:
        frontend = RemoteCluster(self.network.connect, info_silence_s=info_silence_s)
        await frontend.start()
        self._stack.push_async_callback(frontend.stop)
        return frontend

    async def connection(self) -> MemoryConnection:
        return await self.network.connect()


@asynccontextmanager
async def running_cluster(folder: Path) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(folder, stack)


def shown(frontend: RemoteCluster, worker_id: str) -> WorkerInfo | None:
    return next((info for info in frontend.workers() if info.worker_id == worker_id), None)


async def until_ready(frontend: RemoteCluster, *worker_ids: str) -> None:
    await until(lambda: {info.worker_id for info in frontend.workers() if info.is_ready} >= set(worker_ids))


async def all_of(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


def attempt(task: Task, number: int) -> Task:
    return task.model_copy(update={"attempt": number})


async def refused(events: AsyncIterator[object]) -> str:
    """The reason for which nothing was started."""
    try:
        async with asyncio.timeout(20):
            first = await anext(events)
    except NoWorker as exc:
        return exc.message
    raise AssertionError(f"it was taken: {first}")
