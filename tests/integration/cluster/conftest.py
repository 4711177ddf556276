"""Workers and frontends over Dynamo's runtime, in this process and beside it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kinema.cluster.dynamo import connect, serve
from kinema.cluster.transport import Connection, Serving
from tests.etcd import EtcdServer, running_etcd
from tests.integration.cluster.handlers import Handlers
from tests.integration.cluster.settings import Settings


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """The runtime reads the environment, and the transport writes it."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("DYN_", "ETCD_")):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(file_dir=tmp_path / "discovery")


@dataclass
class Pair:
    """A worker and a frontend in this process."""

    serving: Serving
    connection: Connection
    handlers: Handlers
    instance: int


@pytest.fixture
async def pair(settings: Settings) -> AsyncIterator[Pair]:
    handlers = Handlers()
    serving = await serve(settings, handlers.all(), None, None)
    async with connected(settings) as connection:
        instance = await only_instance(connection)
        yield Pair(serving, connection, handlers, instance)
    await serving.close()


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Connection]:
    connection = await connect(settings)
    yield connection
    await connection.close()


async def only_instance(connection: Connection, *, but: frozenset[int] = frozenset()) -> int:
    """The id of the one instance, when it is there and the others are not."""
    async with asyncio.timeout(60):
        while len(found := connection.instances()) != 1 or found & but:
            await connection.wait_for_change(1.0)
    return next(iter(found))


class WorkerProcess:
    """A worker in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def says(self, word: str) -> None:
        """Return when it does; log lines may come before."""
        assert self._process.stdout is not None
        while line := await asyncio.to_thread(self._process.stdout.readline):
            if line.strip() == word:
                return
        pytest.fail(f"the worker ended and never said {word}")

    async def ended(self) -> int:
        return await asyncio.to_thread(self._process.wait, 60)


StartWorker = Callable[[Settings], Awaitable[WorkerProcess]]


@pytest.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    """Starts worker processes; none is left at the end."""
    async with AsyncExitStack() as stack:

        async def start(settings: Settings) -> WorkerProcess:
            process = _start(settings)
            stack.callback(_stop, process)
            worker = WorkerProcess(process)
            await worker.says("ready")
            return worker

        yield start


def _start(settings: Settings) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.integration.cluster.worker_process", settings.as_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(timeout=60)
    assert process.stdout is not None
    process.stdout.close()
