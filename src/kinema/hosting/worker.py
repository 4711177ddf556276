"""A worker process: one engine, served to the frontends of a cluster until a signal or its device ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any, Protocol

import structlog

from kinema.cluster.host import Host
from kinema.cluster.stock import StockVideos
from kinema.cluster.transport import Handler, ModelCard, Serving
from kinema.engines.registry import create_engine
from kinema.errors import WorkerLost
from kinema.hosting import process
from kinema.request.capabilities import Capabilities
from kinema.settings import ClusterSettings, Settings
from kinema.storage import Storage
from kinema.worker.worker import Worker

log = structlog.get_logger(__name__)

# How often the device is looked at.
_LOOK_S = 1.0
# Streams have ended by then, but for callers that do not read; and a step of a large model takes longer than anybody
# wants to wait for a process that has nothing left to do.
_CLOSE_S, _STOP_S = 10.0, 10.0


class Serve(Protocol):
    """``cluster.dynamo.serve``, or what a test puts in its place."""

    def __call__(
        self,
        settings: ClusterSettings,
        handlers: Mapping[str, Handler],
        card: ModelCard | None,
        videos: Handler | None,
        /,
    ) -> Awaitable[Serving]: ...


def run_worker(settings: Settings) -> None:
    """Until a signal. Raises ConfigError when a part cannot start, WorkerLost when the device ended or hangs."""
    from kinema.cluster import dynamo  # noqa: PLC0415 - an extra, and loaded only by who needs it

    process.run(work(settings, dynamo.serve))


async def work(settings: Settings, serve: Serve) -> None:
    """Load the model, make the probe video, and only then let frontends find this worker.

    The first signal ends it when what runs is finished or has been given back, the second gives back at once.
    """
    process.cancel_on_signals()
    engine = create_engine(settings.loading)
    if settings.storage.url is None or settings.cluster.discovery == "file":
        process.make_folder(settings.data_dir)
    storage = Storage(settings.storage_url, settings.storage.public_url)
    worker = Worker(engine, storage, settings.worker, _new_worker_id(), settings.data_dir)
    exit_code = 1
    try:
        await worker.start(with_probe=True)
        host = Host(worker)
        stock = StockVideos(worker, storage, settings.cluster.max_waiting)
        serving = await serve(settings.transport, host.handlers, _card_of(worker.capabilities), stock.videos)
        log.info("serving", worker_id=worker.worker_id, model=worker.capabilities.model, device=worker.device)
        await _until_the_end(worker, host, serving, settings.cluster.drain_s)
        exit_code = 0
    finally:
        await _stop(worker, exit_code)


async def _until_the_end(worker: Worker, host: Host, serving: Serving, drain_s: float) -> None:
    """Raises WorkerLost when that is the device's end."""
    asked = process.EndSignals()
    lost = asyncio.create_task(_lost(worker))
    await _any(lost, asked.first.wait())
    if not lost.done():
        await _drain(worker, host, serving, drain_s, lost, asked.second)
    if lost.done():
        log.critical("the device is lost", running=len(worker.tasks))
        worker.retire()
        worker.give_back(WorkerLost())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_S):
            await serving.close()
    if lost.done():
        raise WorkerLost(
            "the device thread or the process of another GPU ended, or a step took longer than worker.max_step_s; "
            "start this again"
        )
    lost.cancel()


async def _drain(
    worker: Worker, host: Host, serving: Serving, drain_s: float, lost: asyncio.Task[None], hurry: asyncio.Event
) -> None:
    """Refuse at once, whether or not discovery has heard of it, and give back what is not finished in time."""
    log.info("ending; another signal gives back what runs", running=len(worker.tasks), drain_s=drain_s)
    withdrawing = asyncio.create_task(serving.drain())
    await _any(lost, host.drain(drain_s), hurry.wait())
    await withdrawing


async def _lost(worker: Worker) -> None:
    """Return when the device is gone."""
    while not worker.is_lost:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await worker.wait_for_change()


async def _any(lost: asyncio.Task[None], *waits: Coroutine[Any, Any, object]) -> None:
    """Return when the device is lost or one of them returns, and cancel the others of them."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait([lost, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _stop(worker: Worker, exit_code: int) -> None:
    try:
        async with asyncio.timeout(_STOP_S):
            await worker.stop()
    except TimeoutError:  # threads cannot be interrupted, and the interpreter's own end would wait for them
        log.warning("the device is still in a step; the process ends without it")
        os._exit(exit_code)


def _card_of(can: Capabilities) -> ModelCard:
    """What Dynamo's own frontend is told of the model."""
    return ModelCard(can.model, {"capabilities": can.model_dump(mode="json")})


def _new_worker_id() -> str:
    """In containers all processes may have the same number, and on their host's network the same name."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
