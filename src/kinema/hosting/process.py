"""The parts of every process of the service: its event loop, the signals that end it, and the address it listens on.

This file does not know what the process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
import uvicorn
from fastapi import FastAPI

from kinema.errors import ConfigError, StorageUnavailable
from kinema.files import keep_private, make_private_folder, withdraw_rights
from kinema.hosting import descriptors
from kinema.hosting.acceptor import Acceptor
from kinema.server.connections import Connections
from kinema.server.limits import LimitedProtocol
from kinema.settings import ServerSettings
from kinema.storage import Storage, is_wrong_place

log = structlog.get_logger(__name__)

# What a service has in its data folder, by the beginnings of the names; a disk of its own has lost+found.
_OWN = ("kinema.", ".kinema-", "files", "costs", "discovery", "weights-cache", "kernels", "lost+found")

_T = TypeVar("_T")

# A client that waits for a video holds its connection open. At the end of the process its job goes back to the queue,
# so only answers that are being written are waited for.
_GRACEFUL_SHUTDOWN_S = 3
# Longer than clients keep a connection that nobody uses, most of them for 5 s, balancers for 60 s: a server that closes
# first may meet a request that is on its way. At a limit, idle connections are closed earlier.
_KEEP_IDLE_S = 75
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Less than a large body, and more than most else that is allocated again and again. glibc gives blocks beneath it back
# from the end of its heap alone, when twice as much is free there; that is the proportion which it chooses by itself.
_LARGE_BLOCK_BYTES = 8 * 2**20
# Threads that share a heap wait for each other only while they allocate, and most wait for the interpreter's lock.
_NUM_HEAPS = 2
# A trim takes some milliseconds.
_TRIM_EVERY_S = 60.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # in glibc's malloc.h


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` to its end, on uvloop where the system has it. What it writes is for this user alone."""
    keep_private()
    loop = None if sys.platform == "win32" else importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main)


def keep_memory_small() -> None:
    """Have glibc give freed memory back to the system, for the rest of this process. Call it before there are threads.

    By itself glibc counts a block as small, up to 32 MiB, once one of its size was freed. Then bodies leave holes in
    the heap: after twelve of 24 MB a server kept 170 MB for ever. And it gives each new thread a heap, up to eight for
    each core, which all grow to the most that one of their threads ever held.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BLOCK_BYTES)
        mallopt(_M_ARENA_MAX, _NUM_HEAPS)


async def _trim_heaps() -> None:
    """Have glibc give free pages within its heaps back, from time to time, until this is cancelled.

    By itself it gives back their ends alone. Encoders leave holes: after 300 videos 31 MB were in use, and 99 MB free.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    while trim is not None:
        await asyncio.sleep(_TRIM_EVERY_S)
        await asyncio.to_thread(trim, 0)


def cancel_on_signals() -> None:
    """Let SIGINT and SIGTERM cancel the current task, so that its parts are stopped in order, until somebody else
    handles these signals."""
    task = asyncio.current_task()
    assert task is not None
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


async def on_thread(call: Callable[[], _T]) -> _T:
    """Call it on a thread of its own, while the event loop goes on and signals are handled. A download takes minutes.

    When this is cancelled, the thread is left alone, and the process ends without it.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def work() -> None:
        try:
            result = call()
        except BaseException as exc:  # raised by whoever waits
            tell(partial(done.set_exception, exc))
        else:
            tell(partial(done.set_result, result))

    def tell(end: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(lambda: None if done.done() else end())

    threading.Thread(target=work, name="preparing", daemon=True).start()
    return await done


class EndSignals:
    """Handles SIGINT and SIGTERM from now on. The event ``first`` is set by the first signal, ``second`` by the
    second."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._take)

    def _take(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def check_storage(storage: Storage) -> None:
    """Write to the storage before anything is accepted or loaded. Raises ConfigError for a place that does not exist or
    may not be written. One that is away or full is waited for: a line in the log, and ``/ready``, say so."""
    try:
        await asyncio.to_thread(storage.check)
    except StorageUnavailable as exc:
        if is_wrong_place(exc):
            raise ConfigError(
                f"storage.url = {storage.name!r}: {exc.message}; give a folder or a bucket that is there and may be "
                "written"
            ) from exc
        log.warning("the storage cannot be written now", reason=exc.message)


def make_folder(path: Path) -> None:
    """Make the data folder, for this user alone. Raises ConfigError when that fails.

    One that has other things than a service's keeps its rights: it may be a home, or the root of the disk. What is
    written into it is private by itself.
    """
    try:
        make_private_folder(path.absolute())
        others = [entry.name for entry in path.iterdir() if not entry.name.startswith(_OWN)]
    except OSError as exc:
        raise ConfigError(f"data_dir = {str(path)!r}: {exc.strerror}; give a folder that can be written to") from exc
    if others:
        log.warning("the data folder has other files too, so it keeps its rights", folder=str(path), such_as=others[0])
    else:
        withdraw_rights(path)


def bind(settings: ServerSettings) -> list[socket.socket]:
    """Bind a socket to each address of the host. Raises ConfigError for an unknown host or a port that is in use."""
    try:
        found = socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return [_bound(family, address) for family, address in dict.fromkeys((info[0], info[4]) for info in found)]
    except (OSError, UnicodeError) as exc:
        raise _refused_address(settings, exc) from exc


async def listen(
    app: FastAPI,
    settings: ServerSettings,
    sockets: list[socket.socket],
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Answer on the bound sockets until a signal.

    The coroutine of ``beside`` begins when the sockets listen. When it ends, the server ends, too, and an exception of
    it is raised here. Raises ConfigError when one of the sockets cannot listen.
    """
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=settings.proxies,
        timeout_keep_alive=_KEEP_IDLE_S,
        timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_S,
    )
    server = _Server(config, Connections(settings, descriptors.max_connections), beside)
    trimming = asyncio.create_task(_trim_heaps(), name="trim heaps")
    try:
        await server.serve(sockets)
    except OSError as exc:  # meanwhile another process has begun to listen on this port
        raise _refused_address(settings, exc) from exc
    finally:
        trimming.cancel()
        await server.end_beside()


def _bound(family: socket.AddressFamily, address: Any) -> socket.socket:  # noqa: ANN401 - its shape is the family's
    taken = socket.socket(family)
    try:
        # The same options as asyncio's: a restart need not wait for old connections, and :: leaves IPv4 to 0.0.0.0.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        taken.bind(address)
    except OSError:
        taken.close()
        raise
    return taken


def _url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


def _refused_address(settings: ServerSettings, exc: OSError | UnicodeError) -> ConfigError:
    reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
    return ConfigError(
        f"server.host = {settings.host!r}, server.port = {settings.port}: {reason}; "
        "give an address of this machine and a free port, or port 0 for any"
    )


class _Server(uvicorn.Server):
    """Logs the address on which it listens, with the port that the system chose for port 0, and ends on a signal."""

    def __init__(
        self,
        config: uvicorn.Config,
        connections: Connections,
        beside: Callable[[], Coroutine[Any, Any, None]] | None,
    ) -> None:
        super().__init__(config)
        self._connections = connections
        self._acceptor: Acceptor | None = None
        self._begin_beside = beside
        self._beside: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals in place of uvicorn, which raises them again at its end and so skips the stop of all
        parts."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def end_beside(self) -> None:
        """Cancel the coroutine beside the server. Raises the exception with which it has ended before."""
        if self._beside is None:
            return
        self._beside.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._beside

    def _end(self, _beside: asyncio.Task[None]) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._acceptor = Acceptor(sockets or (), self._connections, self._protocol)
        self._acceptor.start()
        for listening in sockets or ():
            url = _url_of(listening)
            log.info("listening", url=url, docs=f"{url}/docs")
        if self._begin_beside is not None:
            self._beside = asyncio.create_task(self._begin_beside(), name="beside the server")
            self._beside.add_done_callback(self._end)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
        await super().shutdown(sockets)

    def _protocol(self, *, is_welcome: bool) -> LimitedProtocol:
        given = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
        return LimitedProtocol(self._connections, is_welcome=is_welcome, **given)
