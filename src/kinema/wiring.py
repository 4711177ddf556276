"""Settings to running parts, started and stopped in order. The only file that knows every part."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import structlog
import uvicorn

from kinema.cluster.local import LocalCluster
from kinema.dispatcher import Dispatcher
from kinema.engines.registry import create_engine
from kinema.jobs.sql import SqlJobStore
from kinema.server.app import create_app
from kinema.service import GenerationService
from kinema.settings import Settings
from kinema.storage import Storage
from kinema.worker.worker import Worker

log = structlog.get_logger(__name__)

# A client that waits for a video holds its connection open; on shutdown its job goes back to the queue, so there is
# nothing to wait for beyond answers that are being written.
_GRACEFUL_SHUTDOWN_S = 3


@asynccontextmanager
async def running_service(settings: Settings) -> AsyncIterator[GenerationService]:
    """The whole service in this process, without HTTP. Raises ConfigError when a part cannot start."""
    engine = create_engine(settings.engine)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    storage = Storage(settings.storage_url)
    async with AsyncExitStack() as stack:
        store = await SqlJobStore.open(settings.database_url)
        stack.push_async_callback(store.close)
        worker = Worker(engine, storage, settings.worker)
        stack.push_async_callback(worker.stop)
        await worker.start()
        await worker.probe()
        cluster = LocalCluster(worker)
        dispatcher = Dispatcher(store, cluster, settings.jobs)
        stack.push_async_callback(dispatcher.stop)
        await dispatcher.start()
        yield GenerationService(store, cluster, storage, settings.jobs)


async def serve(settings: Settings) -> None:
    """Run the HTTP service until a signal ends it."""
    async with running_service(settings) as service:
        app = create_app(service, settings.server)
        config = uvicorn.Config(
            app,
            host=settings.server.host,
            port=settings.server.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_S,
        )
        await _Server(config).serve()


class _Server(uvicorn.Server):
    """Says where it listens, with the port that the system gave when 0 was asked for; ends with 0 on a signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again at the end, before the parts around the server are stopped."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                log.info("listening", url=f"http://{host}:{port}", docs=f"http://{host}:{port}/docs")
