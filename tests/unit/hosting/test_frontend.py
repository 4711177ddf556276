"""The start of a service and what stops it, with an engine that loads when a test lets it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kinema.engines.base import Output, StageReport, Step
from kinema.engines.fake import FakeEngine
from kinema.errors import ConfigError, StorageUnavailable, WorkerLost
from kinema.hosting import frontend as wiring
from kinema.hosting import process
from kinema.ids import JobId
from kinema.job import Job, JobStatus
from kinema.jobs.sql import SqlJobStore
from kinema.media.decoders import Decoders
from kinema.request.request import GenerationRequest
from kinema.service.sweeper import Sweeping
from kinema.settings import (
    EngineSettings,
    JobSettings,
    RetentionSettings,
    ServerSettings,
    Settings,
    StorageSettings,
)
from kinema.storage import OWNER_KEY, Storage
from tests.serving import SMALL, until


async def test_a_taken_port_is_found_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the host and the port."""
    monkeypatch.setattr(wiring, "create_engine", lambda _settings: pytest.fail("the engine was made first"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = Settings(server=ServerSettings(port=port))
        with pytest.raises(
            ConfigError, match=rf"server\.host = '127\.0\.0\.1', server\.port = {port}: Address already"
        ):
            await wiring.serve(taken, wiring.running_service(taken))


async def test_links_that_a_storage_does_not_sign_are_refused(tmp_path: Path) -> None:
    """A folder has none, so no download could be redirected."""
    storage = StorageSettings(url=f"file://{tmp_path}", presign=True)
    settings = fake_service(tmp_path).model_copy(update={"storage": storage})
    with pytest.raises(ConfigError, match=r"storage\.presign = true: file://.* signs no links; accepted with s3, gs"):
        async with wiring.running_service(settings):
            pytest.fail("it started")


@pytest.mark.parametrize("host", ["nowhere.invalid", "203.0.113.1", "a" * 70])
def test_a_host_that_is_not_here_is_refused(host: str) -> None:
    """Unknown, another machine's, and no name at all."""
    with pytest.raises(ConfigError, match=f"server.host = '{host}'"):
        process.bind(ServerSettings(host=host, port=0))


async def test_an_address_of_ipv6_has_brackets_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that the URL opens."""
    server = ServerSettings(host="::1", port=free_port())
    settings = Settings(data_dir=tmp_path, server=server, engine=EngineSettings(name="fake"))
    serving = asyncio.create_task(wiring.serve(settings, wiring.running_service(settings)))
    logged = []

    def has_url() -> bool:
        logged.append(capsys.readouterr().out)
        return f"url=http://[::1]:{server.port}" in "".join(logged)

    await until(has_url)
    os.kill(os.getpid(), signal.SIGTERM)
    await serving


def test_a_bound_port_is_not_open_yet() -> None:
    """A client that comes before there is a service is refused at once, and does not wait."""
    (bound,) = process.bind(ServerSettings(port=0))
    with bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname())


async def test_a_data_folder_that_cannot_be_made_is_refused() -> None:
    """The key and the path, no traceback."""
    settings = Settings(data_dir=Path("/proc/nope"), engine=EngineSettings(name="fake"))
    with pytest.raises(ConfigError, match="data_dir = '/proc/nope'"):
        async with wiring.running_service(settings):
            pytest.fail("it started")


def fake_service(tmp_path: Path, database: str = "jobs", storage: str | None = None) -> Settings:
    return Settings(
        data_dir=tmp_path,
        engine=EngineSettings(name="fake"),
        jobs=JobSettings(database_url=f"sqlite:///{tmp_path}/{database}.db"),
        storage=StorageSettings(url=storage),
        retention=RetentionSettings(sweep_every_s=0.01),
    )


@pytest.fixture(autouse=True)
def _decoders_start_when_an_input_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here sends one, and a process that imports their libraries takes half a second of a core."""
    monkeypatch.setattr(Decoders, "start", lambda _self: None)


@pytest.mark.parametrize("protocol", ["file", "memory"])
async def test_the_storage_of_another_database_is_refused(tmp_path: Path, protocol: str) -> None:
    """Its own database starts with it again and again."""
    storage = f"{protocol}://{tmp_path}/files"
    secrets = set()
    for _ in range(2):
        async with wiring.running_service(fake_service(tmp_path, "first", storage)) as running:
            secrets.add(running.link_secret)
        with pytest.raises(ConfigError, match=r"storage\.url = .* belong to another job database"):
            async with wiring.running_service(fake_service(tmp_path, "second", storage)):
                pytest.fail("it started")
    (secret,) = secrets
    assert len(secret) == 32


async def test_two_frontends_of_one_database_share_its_storage(tmp_path: Path) -> None:
    """They start at once for the first time, and sign links alike."""
    settings = fake_service(tmp_path)
    async with wiring.running_service(settings) as first, wiring.running_service(settings) as second:
        assert first.link_secret == second.link_secret
        assert first.service.sweep_state().sweeping is second.service.sweep_state().sweeping is Sweeping.WORKING


async def test_a_storage_that_does_not_answer_stops_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs wait for it. Nothing is swept until it has told whose it is."""

    def away(*_arguments: object) -> None:
        raise StorageUnavailable("cannot read: Connection refused")

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "read_owner", away)
        patched.setattr(Storage, "put_bytes", away)
        async with wiring.running_service(fake_service(tmp_path)) as running:
            await until(lambda: running.service.sweep_state().sweeping is Sweeping.STOPPED)
            with pytest.raises(StorageUnavailable, match="Connection refused"):
                await running.service.readiness.check()
            patched.undo()
            await until(lambda: running.service.sweep_state().sweeping is Sweeping.WORKING)
            assert (tmp_path / "files" / OWNER_KEY).exists()


class _NoBucket(MemoryFileSystem):
    """Object stores say so at the first call that writes."""

    error: ClassVar[Exception] = FileNotFoundError("The specified bucket does not exist")

    def pipe_file(self, *_arguments: object, **_options: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError("The specified bucket does not exist"), "no such file or bucket"),
        (PermissionError("Access Denied"), "Access Denied"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ],
)
async def test_a_place_that_cannot_be_written_stops_the_start(
    error: Exception, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be found out after the first video was computed."""
    monkeypatch.setattr(_NoBucket, "error", error)
    monkeypatch.setattr("kinema.storage.url_to_fs", lambda _url, **_options: (_NoBucket(), "/bucket"))
    with pytest.raises(ConfigError, match=rf"storage\.url = 'memory://bucket': cannot write .*: {sentence}; give a"):
        async with wiring.running_service(fake_service(tmp_path, storage="memory://bucket")):
            pytest.fail("it started")


async def test_a_file_in_the_place_of_the_folder_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "files").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"storage\.url = .*(Not a directory|File exists); give a folder"):
        async with wiring.running_service(fake_service(tmp_path)):
            pytest.fail("it started")


async def test_a_broken_model_folder_stops_the_start_before_anything_listens(tmp_path: Path) -> None:
    """The files that say what it is are read before torch is."""
    settings = Settings(data_dir=tmp_path, engine=EngineSettings(model=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"model_index\.json is missing"):
        async with wiring.running_service(settings):
            pytest.fail("it started")


@dataclass
class HeldLoad:
    """``on_load`` of a FakeEngine: it reports a stage, and loads when it is told to, or fails."""

    may_end: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def __call__(self, report: StageReport) -> None:
        report("reading weights", 0.25)
        assert self.may_end.wait(20), "nobody let the load end"
        if self.error is not None:
            raise self.error


@dataclass
class Starting:
    """A service on a port of its own, whose engine is held in its load."""

    load: HeldLoad
    engine: FakeEngine
    settings: Settings
    client: httpx.AsyncClient
    serving: asyncio.Task[None]

    async def until_it_reads(self) -> None:
        """Until the port is open, and the engine in the midst of its load."""
        await until_answered(self.client, "/ready", lambda answer: "reading" in answer.text)


@pytest.fixture
async def starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Starting]:
    load = HeldLoad()
    engine = FakeEngine(on_load=load)
    monkeypatch.setattr(wiring, "create_engine", lambda _settings: engine)
    settings = Settings(data_dir=tmp_path, server=ServerSettings(port=free_port()), engine=EngineSettings(name="fake"))
    serving = asyncio.create_task(wiring.serve(settings, wiring.running_service(settings)))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.server.port}", timeout=20) as client:
        yield Starting(load, engine, settings, client, serving)
    load.may_end.set()
    if not serving.done():
        os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.gather(serving, return_exceptions=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


async def until_answered(client: httpx.AsyncClient, path: str, is_so: Callable[[httpx.Response], bool]) -> None:
    """Ask until the answer is as it should be."""
    async with asyncio.timeout(20):
        while True:
            with suppress(httpx.ConnectError):
                if is_so(await client.get(path)):
                    return
            await asyncio.sleep(0.005)


async def test_it_answers_while_the_model_is_loaded(starting: Starting) -> None:
    """It lives, is not ready, and says what it is at and for how long; what the model makes is known already."""
    client = starting.client
    await starting.until_it_reads()
    assert (await client.get("/live")).status_code == 200
    unready = await client.get("/ready")
    said = unready.json()
    assert (unready.status_code, said["status"], said["error"]["code"]) == (503, "starting", "no_worker")
    assert (said["loading"]["stage"], said["loading"]["part"]) == ("reading weights", 0.25)
    assert said["loading"]["seconds"] >= 0
    assert "no worker is ready yet: reading weights, 25% done" in said["error"]["message"]
    health = (await client.get("/health")).json()
    assert (health["status"], health["models"], health["jobs_waiting"]) == ("starting", ["fake"], 0)
    assert health["loading"]["stage"] == "reading weights"
    before = (await client.get("/v1/models")).json()
    asked = {**SMALL, "seed": 7}
    estimate = (await client.post("/v1/videos/estimate", json=asked)).json()
    assert estimate["size"] == SMALL["size"]

    starting.load.may_end.set()
    await until_answered(client, "/ready", lambda answer: answer.json() == {"status": "ready"})
    worker = {"model": "fake", "device": "cpu", "ready": True, "memory": None, "parked": 0, "resumed": 0}
    health = {"status": "ready", "models": ["fake"], "workers": [worker], "jobs_waiting": 0}
    swept = {"sweeping": "working", "files_held": 0, "bytes_held": 0}
    assert (await client.get("/health")).json() == health | swept
    assert (await client.get("/v1/models")).json() == before
    assert (await client.post("/v1/videos/estimate", json=asked)).json() == estimate


async def test_jobs_are_accepted_while_the_model_is_loaded(starting: Starting) -> None:
    """They wait for it, as does a call for the finished video, and are made when it is there."""
    client = starting.client
    await starting.until_it_reads()
    job = (await client.post("/v1/videos", json=SMALL)).json()
    assert (job["status"], job["queue_position"]) == ("queued", 1)
    call = asyncio.create_task(client.post("/v1/videos/generations", json=SMALL))
    await until_answered(client, "/health", lambda answer: answer.json()["jobs_waiting"] == 2)
    assert (await client.get(f"/v1/videos/{job['id']}")).json()["status"] == "queued"

    starting.load.may_end.set()
    assert (await call).json()["status"] == "completed"
    await until_answered(client, f"/v1/videos/{job['id']}", lambda answer: answer.json()["status"] == "completed")


async def test_no_job_runs_before_the_trial_video_is_made(starting: Starting) -> None:
    """A model that loads but makes no video never gets one."""
    seen: list[str] = []
    starting.engine._on_output = lambda request, _output: seen.append(request.prompt)
    await starting.until_it_reads()
    job = (await starting.client.post("/v1/videos", json=SMALL)).json()
    starting.load.may_end.set()
    path = f"/v1/videos/{job['id']}"
    await until_answered(starting.client, path, lambda answer: answer.json()["status"] == "completed")
    first = seen.index(SMALL["prompt"])
    assert set(seen[:first]) == {"test"}
    assert set(seen[first:]) == {SMALL["prompt"]}


async def test_a_load_that_fails_ends_it_and_keeps_the_jobs(
    starting: Starting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits hears that the server stops; the next start makes what was accepted."""
    monkeypatch.setattr(process, "_GRACEFUL_SHUTDOWN_S", 0.1)
    await starting.until_it_reads()
    job = (await starting.client.post("/v1/videos", json=SMALL)).json()
    call = asyncio.create_task(starting.client.post("/v1/videos/generations", json=SMALL))
    await until_answered(starting.client, "/health", lambda answer: answer.json()["jobs_waiting"] == 2)
    starting.load.error = ConfigError("the model folder has no weights")
    starting.load.may_end.set()
    with pytest.raises(ConfigError, match="the model folder has no weights"):
        await starting.serving
    stopped = (await call).json()["error"]
    assert stopped["code"] == "server_stopping"
    store = await SqlJobStore.open(starting.settings.database_url)
    try:
        for job_id in (job["id"], stopped["id"]):
            assert (await store.get(JobId(job_id))).status is JobStatus.QUEUED
    finally:
        await store.close()


class HeldDownload:
    """Stands for the hub's client: a download that takes as long as the test likes, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, _name: str, **_how: object) -> str:
        self.has_begun.set()
        assert self.may_end.wait(20)
        assert self._error is not None
        raise self._error


@pytest.fixture
def hub_settings(tmp_path: Path) -> Settings:
    """A model of the hub, which is not here yet."""
    return Settings(
        data_dir=tmp_path, server=ServerSettings(port=free_port()), engine=EngineSettings(model="some/model")
    )


async def test_a_signal_ends_it_while_the_model_is_downloaded(
    hub_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once; the loop goes on meanwhile, and nobody waits for the download."""
    download = HeldDownload()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    serving = asyncio.create_task(wiring.serve(hub_settings, wiring.running_service(hub_settings)))
    await until(download.has_begun.is_set)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(serving, 20)
    assert not download.may_end.is_set()
    download.may_end.set()


async def test_a_download_that_fails_stops_the_start(hub_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sentence with the hub's reason."""
    download = HeldDownload(OSError("no route"))
    download.may_end.set()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ConfigError, match=r"engine\.model = 'some/model'.* the hub did not give it: no route"):
        await wiring.serve(hub_settings, wiring.running_service(hub_settings))


async def test_a_signal_ends_it_while_the_model_is_loaded(starting: Starting) -> None:
    """At once, though the thread that loads goes on: the process is to end without it."""
    await starting.until_it_reads()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await starting.serving
    assert not starting.engine.is_loaded


async def test_a_service_whose_engine_is_lost_ends_with_an_error(
    starting: Starting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever started it sees that; it would never make a video again."""
    monkeypatch.setattr("kinema.worker.worker._LOOK_S", 0.01)
    starting.load.may_end.set()
    await until_answered(starting.client, "/ready", lambda answer: answer.status_code == 200)
    starting.engine.is_lost = True
    with pytest.raises(WorkerLost, match="start this again"):
        await starting.serving
    assert not starting.engine.is_loaded


class DeviceFails:
    """``on_output`` of a FakeEngine whose device fails in each video but the trial one, while it is told to."""

    def __init__(self) -> None:
        self.is_broken = True

    def __call__(self, request: GenerationRequest, output: Output) -> None:
        if self.is_broken and request.prompt != "test" and output == Step(2, 2):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DeviceFails, Settings]:
    """Each start has a new engine on the same device, and the same jobs."""
    fails = DeviceFails()
    monkeypatch.setattr(wiring, "create_engine", lambda _settings: FakeEngine(on_output=fails))
    server = ServerSettings(port=free_port())
    jobs = JobSettings(retry_s=0, max_attempts=3)
    return fails, Settings(data_dir=tmp_path, server=server, jobs=jobs, engine=EngineSettings(name="fake"))


@asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[tuple[httpx.AsyncClient, asyncio.Task[None]]]:
    """A service that is ready or has begun to make its jobs."""
    serving = asyncio.create_task(wiring.serve(settings, wiring.running_service(settings)))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.server.port}", timeout=20) as client:
        yield client, serving


async def ends_with_a_loss(serving: asyncio.Task[None]) -> None:
    with pytest.raises(WorkerLost, match="the device failed"):
        await asyncio.wait_for(serving, 20)


async def job_of(settings: Settings, job_id: str) -> Job:
    """The job as the database has it, while no service runs."""
    store = await SqlJobStore.open(settings.database_url)
    try:
        return await store.get(JobId(job_id))
    finally:
        await store.close()


async def test_a_device_that_fails_ends_the_service_and_its_jobs_are_made_later(
    failing: tuple[DeviceFails, Settings],
) -> None:
    """The process ends with an error, for its supervisor; the next start makes what was lost."""
    fails, settings = failing
    async with started(settings) as (client, serving):
        await until_answered(client, "/ready", lambda answer: answer.status_code == 200)
        answers = await asyncio.gather(*(client.post("/v1/videos", json=SMALL) for _ in range(2)))
        ids = [answer.json()["id"] for answer in answers]
        await ends_with_a_loss(serving)
    for job_id in ids:
        job = await job_of(settings, job_id)
        assert (job.status.is_terminal, job.losses <= 1) == (False, True)
    fails.is_broken = False
    async with started(settings) as (client, serving):
        for job_id in ids:
            path = f"/v1/videos/{job_id}"
            await until_answered(client, path, lambda answer: answer.json()["status"] == "completed")
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 20)


async def test_a_job_that_breaks_the_device_each_time_does_not_live_for_ever(
    failing: tuple[DeviceFails, Settings],
) -> None:
    """Each loss counts, although the service ends in order after it."""
    _, settings = failing
    job_id = ""
    for start in range(3):
        async with started(settings) as (client, serving):
            if not start:
                await until_answered(client, "/ready", lambda answer: answer.status_code == 200)
                job_id = (await client.post("/v1/videos", json=SMALL)).json()["id"]
            await ends_with_a_loss(serving)
    job = await job_of(settings, job_id)
    assert (job.status, job.losses) == (JobStatus.FAILED, 2)
    assert job.error is not None
    assert job.error.code == "worker_lost"
