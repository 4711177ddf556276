"""The whole service in a test: the real parts around the fake engine, a database and a storage in memory."""

from __future__ import annotations

import asyncio
import atexit
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from uuid import uuid4

import httpx
from fastapi import FastAPI

from kinema.cluster.local import LocalCluster
from kinema.engines.base import Output
from kinema.engines.fake import FakeEngine
from kinema.events import Event
from kinema.ids import JobId, new_job_id
from kinema.job import Job
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.webhook_store import SqlWebhookStore
from kinema.media.decoders import Decoders
from kinema.request.request import GenerationRequest
from kinema.server.app import create_app
from kinema.service.dispatcher import Dispatcher
from kinema.service.intake import Intake
from kinema.service.service import GenerationService
from kinema.service.webhooks import Webhooks
from kinema.settings import InputSettings, JobSettings, ServerSettings, StorageSettings, WebhookSettings, WorkerSettings
from kinema.storage import Storage
from kinema.worker.worker import Worker
from tests.described import DescribedTransport

REQUEST = GenerationRequest(
    model="fake",
    prompt="a red circle moves right",
    negative_prompt="",
    width=64,
    height=64,
    num_frames=5,
    fps=8,
    num_inference_steps=2,
    guidance_scale=5.0,
    flow_shift=3.0,
    seed=7,
)
# What a client sends for the smallest video.
SMALL = {"prompt": "a red circle moves right", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}


@cache
def decoders() -> Decoders:
    """Those of all tests: their server imports for half a second."""
    shared = Decoders(InputSettings())
    atexit.register(shared.stop)
    return shared


def make_job(**changes: object) -> Job:
    return Job(id=new_job_id(), request=REQUEST, created_at=time.time()).model_copy(update=changes)


@dataclass
class Gate:
    """Holds every generation before its outputs until it is opened; ``on_output`` of a FakeEngine."""

    is_open: threading.Event = field(default_factory=threading.Event)
    has_arrived: threading.Event = field(default_factory=threading.Event)

    def __call__(self, _request: GenerationRequest, _output: Output) -> None:
        self.has_arrived.set()
        assert self.is_open.wait(20), "nobody opened the gate"


@dataclass
class Serving:
    """The parts, to look at and to push."""

    engine: FakeEngine
    store: SqlJobStore
    storage: Storage
    worker: Worker
    dispatcher: Dispatcher
    service: GenerationService
    app: FastAPI
    client: httpx.AsyncClient


@asynccontextmanager
async def serving(
    engine: FakeEngine | None = None,
    *,
    storage: Storage | None = None,
    server: ServerSettings | None = None,
    jobs: JobSettings | None = None,
    webhooks: WebhookSettings | None = None,
    space: StorageSettings | None = None,
    is_dispatching: bool = True,
) -> AsyncIterator[Serving]:
    engine, jobs, server = engine or FakeEngine(), jobs or JobSettings(), server or ServerSettings()
    storage = storage or Storage(f"memory://{uuid4().hex}")
    async with AsyncExitStack() as stack:
        store = await SqlJobStore.open("sqlite://")
        stack.push_async_callback(store.close)
        worker = Worker(engine, storage, WorkerSettings(max_active=2, storage_patience_s=0))
        stack.push_async_callback(worker.stop)
        await worker.start()
        cluster = LocalCluster(worker)
        dispatcher = Dispatcher(store, cluster, jobs)
        stack.push_async_callback(dispatcher.stop)
        if is_dispatching:
            await dispatcher.start()
        intake = Intake(decoders(), InputSettings().max_at_once)
        shared = jobs.shared_by(server.num_keys)
        service = GenerationService(store, cluster, storage, shared, intake, space=space, keys=server.keys_by_id)
        stack.push_async_callback(service.inputs.stop)
        await service.inputs.start()
        sender = Webhooks(SqlWebhookStore(store.database), webhooks or WebhookSettings(), poll_s=0.01)
        stack.push_async_callback(sender.stop)
        if webhooks is not None:
            await sender.start()
        app = create_app(service, server, sender, secrets.token_bytes(32))
        client = httpx.AsyncClient(transport=DescribedTransport(app), base_url="http://test")
        await stack.enter_async_context(client)
        yield Serving(engine, store, storage, worker, dispatcher, service, app, client)


async def until(condition: Callable[[], object], patience_s: float = 20) -> None:
    """Wait for what other tasks or threads bring about."""
    async with asyncio.timeout(patience_s):
        while not condition():  # noqa: ASYNC110 - it also turns true in other threads and processes
            await asyncio.sleep(0.002)


def has_heard_of_cancel(it: Serving) -> bool:
    """Whether the worker was told to stop a generation."""
    return any(generation.is_cancelled for generation in it.worker._generations.values())


async def events_of(store: SqlJobStore, job_id: JobId) -> Sequence[Event]:
    """All events of a job, once it has ended."""
    return [stored.event async for stored in store.watch(job_id)]
