"""What is lost when a worker process dies, hangs or is told to stop, and when discovery itself is lost."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from dataclasses import replace

import pytest

from kinema.cluster.dynamo import connect, serve
from kinema.cluster.transport import Connection, Unreachable
from kinema.errors import WorkerLost
from tests.etcd import EtcdServer
from tests.integration.cluster.conftest import StartWorker, connected, only_instance
from tests.integration.cluster.handlers import Handlers
from tests.integration.cluster.settings import Settings

LONG = {"name": "long", "n": 1_000_000, "every_s": 0.05}


@pytest.fixture
def etcd_settings(etcd: EtcdServer, settings: Settings) -> Settings:
    """A lease so short that its loss can be waited for."""
    return replace(settings, discovery="etcd", etcd_endpoints=etcd.url, file_dir=None, lease_s=3)


async def test_a_killed_worker_fails_its_calls_at_once(settings: Settings, start_worker: StartWorker) -> None:
    """Long before discovery notices, and new calls fail as unreachable."""
    worker = await start_worker(settings)
    async with connected(settings) as connection:
        instance = await only_instance(connection)
        call = connection.call(instance, "run", LONG)
        await anext(call)
        worker.send(signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(WorkerLost):
            [item async for item in call]
        assert time.monotonic() - began < 1
        assert instance in connection.instances()
        with pytest.raises(Unreachable):
            await anext(connection.call(instance, "echo", {}))


async def test_a_frozen_worker_is_given_up_after_its_silence(settings: Settings, start_worker: StartWorker) -> None:
    """The runtime itself would wait for ever."""
    worker = await start_worker(settings)
    async with connected(settings) as connection:
        instance = await only_instance(connection)
        call = connection.call(instance, "run", LONG, silence_s=1.5)
        await anext(call)
        worker.send(signal.SIGSTOP)
        with pytest.raises(WorkerLost, match=r"no sign of life for 1\.5 s"):
            [item async for item in call]
        with pytest.raises(WorkerLost, match="did not answer"):
            await anext(connection.call(instance, "echo", {}, silence_s=0.5))
        worker.send(signal.SIGCONT)
        await _until_closed_there(connection, instance, "long")


async def test_a_worker_that_is_told_to_stop_finishes_first(settings: Settings, start_worker: StartWorker) -> None:
    """And leaves discovery, with exit code 0."""
    worker = await start_worker(settings)
    async with connected(settings) as connection:
        instance = await only_instance(connection)
        call = connection.call(instance, "run", {"n": 40, "every_s": 0.05})
        await anext(call)
        worker.send(signal.SIGTERM)
        assert [item["i"] async for item in call] == list(range(1, 40))
        await worker.says("closed")
        assert await worker.ended() == 0
        async with asyncio.timeout(10):
            while connection.instances():
                await connection.wait_for_change(1.0)


async def test_a_dead_frontend_closes_the_handlers(settings: Settings) -> None:
    """In milliseconds, so the device is free for whoever takes the job over."""
    handlers = Handlers()
    serving = await serve(settings, handlers.all(), None, None)
    async with connected(settings) as connection:
        instance = await only_instance(connection)
        caller = await asyncio.create_subprocess_exec(*_caller(settings, instance), stdout=asyncio.subprocess.PIPE)
        assert caller.stdout is not None
        assert await caller.stdout.readline() == b"called\n"
        caller.kill()
        await caller.wait()
        async with asyncio.timeout(2):
            await handlers.until_closed("long")
    await serving.close()


async def test_a_worker_is_found_again_after_etcd_lost_everything(
    etcd: EtcdServer, etcd_settings: Settings, start_worker: StartWorker
) -> None:
    """By another id; what ran goes on, and the streams that last end, so that no worker is seen twice."""
    await start_worker(etcd_settings)
    async with connected(etcd_settings) as connection:
        instance = await only_instance(connection)
        running = connection.call(instance, "run", LONG)
        await anext(running)
        info = connection.call(instance, "info", {})
        before = await anext(info)
        etcd.restart(wiped=True)
        again = await _until_it_answers(connection, but=instance)
        assert [item async for item in info] == []
        assert await anext(connection.call(again, "info", {})) == before
        assert [(await anext(running))["i"] for _ in range(5)] == [1, 2, 3, 4, 5]
        await running.aclose()
        await _until_closed_there(connection, again, "long")


async def test_etcd_may_be_away_for_longer_than_a_lease(
    etcd: EtcdServer, etcd_settings: Settings, start_worker: StartWorker
) -> None:
    """Both sides come back with it; what ran goes on meanwhile."""
    await start_worker(etcd_settings)
    async with connected(etcd_settings) as connection:
        instance = await only_instance(connection)
        running = connection.call(instance, "run", LONG)
        await anext(running)
        etcd.kill()
        async with asyncio.timeout(60):
            while connection.instances():
                await asyncio.gather(connection.wait_for_change(1.0), anext(running))
        etcd.start()
        again = await _until_it_answers(connection, but=instance)
        assert (await anext(running))["i"] > 0
        assert await anext(connection.call(again, "echo", {"a": 1})) == {"a": 1}


async def test_a_short_absence_of_etcd_goes_unnoticed(
    etcd: EtcdServer, etcd_settings: Settings, start_worker: StartWorker
) -> None:
    """Calls do not need it, and the worker keeps its id."""
    long_lease = replace(etcd_settings, lease_s=20)
    await start_worker(long_lease)
    async with connected(long_lease) as connection:
        instance = await only_instance(connection)
        etcd.kill()
        for endpoint in ("run", "cancel", "info"):
            assert await anext(connection.call(instance, endpoint, {"n": 1, "every_s": 0}))
        etcd.start()
        await start_worker(long_lease)
        async with asyncio.timeout(30):
            while len(connection.instances()) != 2:
                await connection.wait_for_change(1.0)
        assert instance in connection.instances()


async def test_a_worker_stops_without_etcd_too(
    etcd: EtcdServer, etcd_settings: Settings, start_worker: StartWorker
) -> None:
    """It finishes what runs, and does not wait for what cannot answer."""
    worker = await start_worker(etcd_settings)
    async with connected(etcd_settings) as connection:
        call = connection.call(await only_instance(connection), "run", {"n": 20, "every_s": 0.05})
        await anext(call)
        etcd.kill()
        worker.send(signal.SIGTERM)
        assert [item["i"] async for item in call] == list(range(1, 20))
        await worker.says("closed")
        assert await worker.ended() == 0


async def test_both_sides_wait_for_an_etcd_that_is_not_there_yet(etcd: EtcdServer, etcd_settings: Settings) -> None:
    """So the order of starting does not matter."""
    etcd.kill()
    serving = asyncio.create_task(serve(etcd_settings, Handlers().all(), None, None))
    joining = asyncio.create_task(connect(etcd_settings))
    done, _ = await asyncio.wait({serving, joining}, timeout=1)
    assert not done
    etcd.start()
    connection = await joining
    assert await anext(connection.call(await only_instance(connection), "echo", {"a": 1})) == {"a": 1}
    await connection.close()
    await (await serving).close()


async def _until_it_answers(connection: Connection, *, but: int) -> int:
    """The id by which the worker is found again."""
    async with asyncio.timeout(60):
        while True:
            for instance in connection.instances() - {but}:
                try:
                    await anext(connection.call(instance, "echo", {"a": 1}))
                except WorkerLost:
                    continue
                return instance
            await connection.wait_for_change(0.2)


async def _until_closed_there(connection: Connection, instance: int, name: str) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                state = await anext(connection.call(instance, "state", {}))
            except WorkerLost:
                continue
            if name in state["closed"]:
                return


def _caller(settings: Settings, instance: int) -> list[str]:
    module = "tests.integration.cluster.caller_process"
    return [sys.executable, "-m", module, settings.as_json(), str(instance)]
