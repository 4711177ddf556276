"""Settings to running parts, started and stopped in order. The only file that knows every part."""

from __future__ import annotations

import asyncio
import importlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import uvicorn

from kinema.cluster.local import LocalCluster
from kinema.dispatcher import Dispatcher
from kinema.engines.registry import create_engine
from kinema.errors import ConfigError
from kinema.jobs.retention import SqlRetention
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.webhooks import SqlWebhookStore
from kinema.retention import Sweeper
from kinema.server.app import create_app
from kinema.service import GenerationService
from kinema.settings import ServerSettings, Settings
from kinema.storage import Storage
from kinema.webhooks import Webhooks
from kinema.webhooks import check_settings as check_webhooks
from kinema.worker.worker import Worker

log = structlog.get_logger(__name__)

# A client that waits for a video holds its connection open; on shutdown its job goes back to the queue, so there is
# nothing to wait for beyond answers that are being written.
_GRACEFUL_SHUTDOWN_S = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Running:
    """What a frontend works with."""

    service: GenerationService
    webhooks: Webhooks


@asynccontextmanager
async def running_service(settings: Settings) -> AsyncIterator[Running]:
    """The whole service in this process, without HTTP. Raises ConfigError when a part cannot start."""
    check_webhooks(settings.webhooks)
    engine = create_engine(settings.engine)
    _make_folder(settings.data_dir)
    storage = Storage(settings.storage_url)
    async with AsyncExitStack() as stack:
        store = await SqlJobStore.open(settings.database_url)
        stack.push_async_callback(store.close)
        webhooks = Webhooks(SqlWebhookStore(store.database), settings.webhooks)
        stack.push_async_callback(webhooks.stop)
        await webhooks.start()
        worker = Worker(engine, storage, settings.worker)
        stack.push_async_callback(worker.stop)
        await worker.start()
        await worker.probe()
        cluster = LocalCluster(worker)
        dispatcher = Dispatcher(store, cluster, settings.jobs)
        stack.push_async_callback(dispatcher.stop)
        await dispatcher.start()
        sweeper = Sweeper(SqlRetention(store.database), storage, settings.retention)
        stack.push_async_callback(sweeper.stop)
        await sweeper.start()
        service = GenerationService(store, cluster, storage, settings.jobs, settings.retention)
        yield Running(service, webhooks)


def run_server(settings: Settings) -> None:
    """``serve`` on the quickest event loop that there is for this system."""
    loop = None if sys.platform == "win32" else importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(serve(settings))


async def serve(settings: Settings) -> None:
    """Run the HTTP service until a signal ends it. Raises ConfigError when a part cannot start.

    The address is taken before the model is loaded, and listened on after: until then a client is refused.
    """
    sockets = bind(settings.server)
    _cancel_on_signals()
    async with running_service(settings) as running:
        app = create_app(running.service, settings.server, running.webhooks)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_S,
        )
        try:
            await _Server(config).serve(sockets)
        except OSError as exc:  # another process began to listen on this port meanwhile
            raise _refused_address(settings.server, exc) from exc


def _cancel_on_signals() -> None:
    """Until the server takes the signals over, one cancels this task, and what has started is stopped in order."""
    task = asyncio.current_task()
    assert task is not None
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def bind(settings: ServerSettings) -> list[socket.socket]:
    """A bound socket for each address of the host. Raises ConfigError for an unknown host or a port that is taken."""
    try:
        found = socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return [_bound(family, address) for family, address in dict.fromkeys((info[0], info[4]) for info in found)]
    except (OSError, UnicodeError) as exc:
        raise _refused_address(settings, exc) from exc


def _bound(family: socket.AddressFamily, address: Any) -> socket.socket:  # noqa: ANN401 - its shape is the family's
    taken = socket.socket(family)
    try:
        # As asyncio does: a restart need not wait for old connections to time out, and :: leaves IPv4 to 0.0.0.0.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(address)
    except OSError:
        taken.close()
        raise
    return taken


def _refused_address(settings: ServerSettings, exc: OSError | UnicodeError) -> ConfigError:
    reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
    return ConfigError(
        f"server.host = {settings.host!r}, server.port = {settings.port}: {reason}; "
        "give an address of this machine and a free port, or port 0 for any"
    )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"data_dir = {str(path)!r}: {exc.strerror}; give a folder that can be written to") from exc


class _Server(uvicorn.Server):
    """Says where it listens, with the port that the system gave when 0 was asked for; ends with 0 on a signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again at the end, before the parts around the server are stopped."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                log.info("listening", url=f"http://{host}:{port}", docs=f"http://{host}:{port}/docs")
