"""A worker process: it serves one engine to the frontends of a cluster, until a signal or the loss of its device."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Awaitable, Coroutine, Mapping
from functools import partial
from typing import Any, Protocol

import structlog

from kinema.cluster.host import Host
from kinema.cluster.stock import StockVideos
from kinema.cluster.transport import Handler, ModelCard, Serving
from kinema.engines.registry import create_engine
from kinema.errors import WorkerLost
from kinema.hosting import process
from kinema.media.decoders import Decoders
from kinema.request.capabilities import Capabilities
from kinema.settings import ClusterSettings, Settings
from kinema.storage import Storage
from kinema.worker.worker import Worker

log = structlog.get_logger(__name__)

# The device is checked this often.
_LOOK_S = 1.0
# In this time all streams end, unless a caller does not read its stream. A step of a large model may take longer than
# the second time, but a process that has nothing left to do should not be waited for.
_CLOSE_S, _STOP_S = 10.0, 10.0


class Serve(Protocol):
    """The type of ``cluster.dynamo.serve``; tests have another function of this type."""

    def __call__(
        self,
        settings: ClusterSettings,
        handlers: Mapping[str, Handler],
        card: ModelCard | None,
        videos: Handler | None,
        /,
    ) -> Awaitable[Serving]: ...


def run_worker(settings: Settings) -> None:
    """Run a worker until a signal. Raises ConfigError when a part cannot start, WorkerLost when the device ended or
    hangs."""
    from kinema.cluster import dynamo  # noqa: PLC0415 - an extra, and loaded only by who needs it

    process.run(serve_worker(settings, dynamo.serve))


async def serve_worker(settings: Settings, serve: Serve) -> None:
    """Load the model, make the trial video, and register the worker only then, so that frontends find a ready one.

    After the first signal it ends when the running videos are finished or given back; the second gives them back at
    once.
    """
    process.cancel_on_signals()
    engine = await process.on_thread(partial(create_engine, settings.loading))
    if settings.storage.url is None or settings.cluster.discovery == "file":
        process.make_folder(settings.data_dir)
    storage = Storage(settings.storage_url, settings.storage.public_url)
    await process.check_storage(storage)
    decoders = Decoders(settings.inputs)
    worker = Worker(engine, storage, settings.worker, _new_worker_id(), settings.data_dir, decoders)
    exit_code = 1
    try:
        await worker.start(with_probe=True)
        host = Host(worker)
        stock = StockVideos(worker, storage, settings.cluster.max_waiting, decoders)
        serving = await serve(settings.transport, host.handlers, _card_of(worker.capabilities), stock.videos)
        log.info("serving", worker_id=worker.worker_id, model=worker.capabilities.model, device=worker.device)
        await _until_the_end(worker, host, serving, settings.cluster.drain_s)
        exit_code = 0
    finally:
        await _stop(worker, exit_code)
        decoders.stop()


async def _until_the_end(worker: Worker, host: Host, serving: Serving, drain_s: float) -> None:
    """Wait for a signal or the loss of the device, and end in order. Raises WorkerLost after a loss."""
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
            "the device failed, its thread or the process of another GPU ended, or a step took longer than "
            "worker.max_step_s; start this again"
        )
    lost.cancel()


async def _drain(
    worker: Worker, host: Host, serving: Serving, drain_s: float, lost: asyncio.Task[None], hurry: asyncio.Event
) -> None:
    """Refuse new tasks at once, even from frontends that do not know yet, and give back what is not finished in
    time."""
    log.info("ending; another signal gives back what runs", running=len(worker.tasks), drain_s=drain_s)
    withdrawing = asyncio.create_task(serving.drain())
    await _any(lost, host.drain(drain_s), hurry.wait())
    await withdrawing


async def _lost(worker: Worker) -> None:
    """Return when the device is lost."""
    while not worker.is_lost:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await worker.wait_for_change()


async def _any(lost: asyncio.Task[None], *waits: Coroutine[Any, Any, object]) -> None:
    """Return when the device is lost or one of ``waits`` returns, and cancel the other waits."""
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
    """The description of the model for Dynamo's own frontend. It is written once, and LoRAs come and go."""
    return ModelCard(can.model, {"capabilities": can.model_dump(mode="json", exclude={"loras"})})


def _new_worker_id() -> str:
    """A new id with random digits: in containers all processes may have the same number, and the same host name."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
