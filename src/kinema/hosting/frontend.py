"""The frontend: settings become parts, which are started and stopped in order. Only ``hosting/`` knows all parts."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import structlog

from kinema.cluster.base import Cluster
from kinema.cluster.local import LocalCluster
from kinema.cluster.remote import RemoteCluster
from kinema.engines.base import Engine
from kinema.engines.registry import create_engine
from kinema.errors import ConfigError, StorageUnavailable, WorkerLost
from kinema.hosting import descriptors, process
from kinema.jobs.chores import Chores
from kinema.jobs.identity import read_identity
from kinema.jobs.key_names import name_keys
from kinema.jobs.retention import SqlRetention
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.webhook_store import SqlWebhookStore
from kinema.media.decoders import Decoders
from kinema.server.app import create_app
from kinema.server.keys import named_digests
from kinema.service.dispatcher import Dispatcher
from kinema.service.intake import Intake
from kinema.service.pairing import Pairing
from kinema.service.service import GenerationService
from kinema.service.sweeper import Sweeper
from kinema.service.webhooks import Webhooks
from kinema.service.webhooks import check_settings as check_webhooks
from kinema.settings import Settings
from kinema.storage import Storage
from kinema.worker.worker import Worker

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Running:
    """The parts that a frontend works with, and the worker of this process if it has one, which is not started yet."""

    service: GenerationService
    webhooks: Webhooks
    link_secret: bytes = field(repr=False)
    worker: Worker | None = None


def run_server(settings: Settings) -> None:
    """Run the whole service in this process, until a signal. Raises ConfigError when a part cannot start."""
    process.run(serve(settings, running_service(settings)))


def run_frontend(settings: Settings) -> None:
    """Run the service without a worker of its own, until a signal. Raises ConfigError when a part cannot start."""
    process.run(serve(settings, running_frontend(settings)))


async def serve(settings: Settings, starting: AbstractAsyncContextManager[Running]) -> None:
    """Answer over HTTP until a signal.

    The address is taken first, then the parts start, and then the address listens. A worker of this process starts
    after that, so jobs are accepted while its model is loaded, and wait.

    Raises ConfigError when a part cannot start. Raises WorkerLost when the worker loses its device; the process has to
    be started again. Raises CancelledError after a signal that came while the model was loaded: the thread that loads
    cannot be interrupted, so the process has to end without that thread.
    """
    descriptors.raise_limit()
    process.keep_memory_small()
    sockets = process.bind(settings.server)
    process.cancel_on_signals()
    async with AsyncExitStack() as stack:
        for bound in sockets:  # also when nothing ever listens
            stack.callback(bound.close)
        running = await stack.enter_async_context(starting)
        app = create_app(running.service, settings.server, running.webhooks, running.link_secret, settings.data_dir)
        worker = running.worker
        beside = None if worker is None else partial(_run_worker, worker)
        await process.listen(app, settings.server, sockets, beside)
    if worker is not None and worker.still_loads:
        raise asyncio.CancelledError


async def _run_worker(worker: Worker) -> None:
    """Start the worker and wait for a loss of its device. Raises ConfigError, or WorkerLost when that has happened."""
    await worker.start(with_probe=True)
    await worker.wait_for_loss()
    worker.retire()
    # The stop that follows would give its jobs back as sound ones, so that one that breaks devices lived for ever.
    worker.give_back(WorkerLost())
    raise WorkerLost("the device failed, or its thread or the process of another GPU ended; start this again")


@asynccontextmanager
async def running_service(settings: Settings) -> AsyncIterator[Running]:
    """Start the whole service in this process, but for HTTP and its worker. Raises ConfigError when a part fails."""
    engine = await process.on_thread(partial(create_engine, settings.loading))
    async with _running(settings, partial(_own_worker, settings, engine)) as running:
        yield running


@asynccontextmanager
async def running_frontend(settings: Settings) -> AsyncIterator[Running]:
    """Start the service of a cluster, but for HTTP; workers of other processes come and go. Raises ConfigError."""
    from kinema.cluster import dynamo  # noqa: PLC0415 - an extra, and loaded only by who needs it

    cluster = RemoteCluster(partial(dynamo.connect, settings.transport))
    async with _running(settings, lambda _storage, _decoders: _started(cluster)) as running:
        yield running


@asynccontextmanager
async def _own_worker(
    settings: Settings, engine: Engine, storage: Storage, decoders: Decoders
) -> AsyncIterator[tuple[Cluster, Worker | None]]:
    worker = Worker(engine, storage, settings.worker, data_dir=settings.data_dir, decoders=decoders)
    try:
        yield LocalCluster(worker), worker
    finally:
        await worker.stop()


@asynccontextmanager
async def _started(cluster: RemoteCluster) -> AsyncIterator[tuple[Cluster, Worker | None]]:
    await cluster.start()
    try:
        yield cluster, None
    finally:
        await cluster.stop()


# Starts the cluster of this frontend, and the worker of this process if it has one.
StartsCluster = Callable[[Storage, Decoders], AbstractAsyncContextManager[tuple[Cluster, Worker | None]]]


@asynccontextmanager
async def _running(settings: Settings, cluster_over: StartsCluster) -> AsyncIterator[Running]:
    check_webhooks(settings.webhooks)
    process.make_folder(settings.data_dir)
    storage = Storage(settings.storage_url)
    if settings.storage.presign and not storage.has_links:
        raise ConfigError(f"storage.presign = true: {storage.name} signs no links; accepted with s3, gs and az")
    decoders = Decoders(settings.inputs)
    async with AsyncExitStack() as stack:
        stack.callback(decoders.stop)
        decoders.start()
        store = await SqlJobStore.open(settings.database_url)
        stack.push_async_callback(store.close)
        identity, jobs = await read_identity(store.database), SqlRetention(store.database)
        await name_keys(store.database, named_digests(settings.server.keys_by_id))
        pairing = Pairing(identity, jobs, storage)
        await process.check_storage(storage)
        await _check_pairing(pairing)
        webhooks = Webhooks(SqlWebhookStore(store.database), settings.webhooks)
        stack.push_async_callback(webhooks.stop)
        await webhooks.start()
        cluster, worker = await stack.enter_async_context(cluster_over(storage, decoders))
        dispatcher = Dispatcher(store, cluster, settings.jobs)
        stack.push_async_callback(dispatcher.stop)
        await dispatcher.start()
        chores = Chores(store.database, secrets.token_hex(16))
        sweeper = Sweeper(jobs, store.inputs, storage, pairing, settings.retention, chores=chores)
        stack.push_async_callback(sweeper.stop)
        await sweeper.start()
        intake = Intake(decoders, settings.inputs.max_at_once)
        service = GenerationService(
            store,
            cluster,
            storage,
            settings.queue,
            intake,
            settings.retention,
            settings.storage,
            lambda: sweeper.state,
            settings.server.keys_by_id,
        )
        stack.push_async_callback(service.inputs.stop)
        stack.push_async_callback(service.readiness.stop)
        await service.inputs.start()
        yield Running(service, webhooks, identity.link_secret, worker)


async def _check_pairing(pairing: Pairing) -> None:
    """Refuse the storage of another database. Raises ConfigError. One that cannot be reached is checked later."""
    try:
        await pairing.check()
    except StorageUnavailable as exc:
        log.warning("the storage was not reached; nothing is removed there until it was checked", reason=exc.message)
