"""The life of a worker process, over a transport in memory: when it is found, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from kinema.cluster.remote import RemoteCluster
from kinema.cluster.transport import Handler, ModelCard, Serving
from kinema.engines.base import Output
from kinema.engines.fake import FakeEngine
from kinema.errors import ConfigError, Drained, WorkerLost
from kinema.events import Completed
from kinema.hosting import worker as hosting
from kinema.request.request import GenerationRequest
from kinema.settings import ClusterSettings, EngineSettings, Settings
from tests.serving import Gate, until
from tests.unit.cluster.members import all_of
from tests.unit.cluster.memory import Network
from tests.unit.worker.tasks import make_task


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """The engine that the process makes is the first of these."""
    engines: list[FakeEngine] = []
    monkeypatch.setattr(hosting, "create_engine", lambda _settings: engines[0])
    return engines


@pytest.fixture
async def network() -> Network:
    return Network()


@pytest.fixture
async def frontend(network: Network) -> AsyncIterator[RemoteCluster]:
    frontend = RemoteCluster(network.connect)
    await frontend.start()
    yield frontend
    await frontend.stop()


def begin(folder: Path, network: Network, **settings: object) -> asyncio.Task[None]:
    async def serve(
        _settings: ClusterSettings, handlers: Mapping[str, Handler], _card: ModelCard | None, _videos: Handler | None
    ) -> Serving:
        return network.serve(handlers)

    given = {"data_dir": folder, "engine": EngineSettings(name="fake"), **settings}
    return asyncio.create_task(hosting.serve_worker(Settings.model_validate(given), serve))


def after_probe(on_output: Gate) -> FakeEngine:
    """The probe passes; everything else is held."""

    def hold(request: GenerationRequest, output: Output) -> None:
        if request.prompt != "test":
            on_output(request, output)

    return FakeEngine(on_output=hold)


async def the_worker(frontend: RemoteCluster) -> str:
    await until(lambda: any(worker.is_ready for worker in frontend.workers()))
    (worker,) = frontend.workers()
    return worker.worker_id


def end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


async def test_nobody_finds_a_worker_that_has_not_made_its_probe(
    tmp_path: Path, network: Network, engines: list[FakeEngine]
) -> None:
    """One that cannot make a video is no worker."""
    gate = Gate()
    engines.append(FakeEngine(on_output=gate))
    process = begin(tmp_path, network)
    await until(gate.has_arrived.is_set)
    assert network.served == {}
    gate.is_open.set()
    await until(lambda: network.served)
    end()
    await process

    def fail(_request: GenerationRequest, _output: Output) -> None:
        raise RuntimeError("boom")

    engines[:] = [FakeEngine(on_output=fail)]
    with pytest.raises(ConfigError, match="boom"):
        await begin(tmp_path, network)
    assert len(network.served) == 1


async def test_a_storage_that_cannot_be_written_stops_the_start(
    tmp_path: Path, network: Network, engines: list[FakeEngine]
) -> None:
    """Before the model is loaded."""
    engines.append(FakeEngine())
    (tmp_path / "files").write_bytes(b"a file where the folder should be")
    with pytest.raises(ConfigError, match=r"storage\.url = .*; give a folder or a bucket that is there"):
        await begin(tmp_path, network)
    assert (engines[0].is_loaded, network.served) == (False, {})


async def test_a_signal_lets_it_finish(
    tmp_path: Path, network: Network, engines: list[FakeEngine], frontend: RemoteCluster
) -> None:
    """And it is gone when it has."""
    gate = Gate()
    engines.append(after_probe(gate))
    process = begin(tmp_path, network)
    running = asyncio.create_task(all_of(frontend.run(await the_worker(frontend), make_task())))
    await until(gate.has_arrived.is_set)
    end()
    await until(lambda: not frontend.workers()[0].is_ready)
    gate.is_open.set()
    assert isinstance((await running)[-1], Completed)
    await process
    await until(lambda: not frontend.workers())
    assert not engines[0].is_loaded


async def test_a_second_signal_makes_it_give_back(
    tmp_path: Path,
    network: Network,
    engines: list[FakeEngine],
    frontend: RemoteCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once, while the device is in a step."""
    monkeypatch.setattr("kinema.worker.worker.GIVE_BACK_S", 0.05)
    gate = Gate()
    engines.append(after_probe(gate))
    process = begin(tmp_path, network)
    running = asyncio.create_task(all_of(frontend.run(await the_worker(frontend), make_task())))
    await until(gate.has_arrived.is_set)
    end()
    await until(lambda: not frontend.workers()[0].is_ready)
    assert not running.done()
    end()
    with pytest.raises(Drained):
        await running
    gate.is_open.set()
    await process


async def test_a_device_that_dies_ends_the_process_with_an_error(
    tmp_path: Path,
    network: Network,
    engines: list[FakeEngine],
    frontend: RemoteCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever started it sees that, and what ran is lost."""
    monkeypatch.setattr(threading, "excepthook", lambda _died: None)

    def die(request: GenerationRequest, _output: Output) -> None:
        if request.prompt != "test":
            raise SystemExit

    engines.append(FakeEngine(on_output=die))
    process = begin(tmp_path, network)
    with pytest.raises(WorkerLost):
        await all_of(frontend.run(await the_worker(frontend), make_task()))
    with pytest.raises(WorkerLost, match="start this again"):
        await process


async def test_an_engine_that_is_lost_ends_the_process_with_an_error(
    tmp_path: Path, network: Network, engines: list[FakeEngine], frontend: RemoteCluster
) -> None:
    """While nothing runs, too: the next video would be lost with it."""
    engines.append(FakeEngine())
    process = begin(tmp_path, network)
    await the_worker(frontend)
    engines[0].is_lost = True
    with pytest.raises(WorkerLost, match="another GPU"):
        await process


async def test_a_device_that_hangs_ends_the_process_with_an_error(
    tmp_path: Path,
    network: Network,
    engines: list[FakeEngine],
    frontend: RemoteCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its video is lost, not given back: it may be what hangs devices. The process does not wait for the step."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(hosting, "_LOOK_S", 0.01)
    monkeypatch.setattr(hosting, "_STOP_S", 0.05)
    gate = Gate()
    engines.append(after_probe(gate))
    process = begin(tmp_path, network, worker={"max_step_s": 2})
    with pytest.raises(WorkerLost):
        await all_of(frontend.run(await the_worker(frontend), make_task()))
    await until(lambda: codes)
    gate.is_open.set()
    with pytest.raises(WorkerLost, match="max_step_s"):
        await process
    assert codes == [1]
