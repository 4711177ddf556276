"""How a process of the service lives: its event loop, the signals that end it, and the address that it listens on.

Knows nothing of what the process is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI

from kinema.errors import ConfigError
from kinema.settings import ServerSettings

log = structlog.get_logger(__name__)

# A client that waits for a video holds its connection open; on shutdown its job goes back to the queue, so there is
# nothing to wait for beyond answers that are being written.
_GRACEFUL_SHUTDOWN_S = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Do it on the quickest event loop that there is for this system."""
    loop = None if sys.platform == "win32" else importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work)


def cancel_on_signals() -> None:
    """From now on a signal cancels this task, and what has started is stopped in order; until they are taken over."""
    task = asyncio.current_task()
    assert task is not None
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


class EndSignals:
    """Takes the signals over: the first asks for the end, the second is in a hurry."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._take)

    def _take(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def make_folder(path: Path) -> None:
    """Raises ConfigError when the data folder cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"data_dir = {str(path)!r}: {exc.strerror}; give a folder that can be written to") from exc


def bind(settings: ServerSettings) -> list[socket.socket]:
    """A bound socket for each address of the host. Raises ConfigError for an unknown host or a port that is taken."""
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
    """Answer on the bound sockets until a signal. What ``beside`` gives runs from the moment that they are listened on;
    its end is the end of this, too, and what it raises is raised here.

    Raises ConfigError when one of the sockets cannot be listened on.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_S
    )
    server = _Server(config, beside)
    try:
        await server.serve(sockets)
    except OSError as exc:  # another process began to listen on this port meanwhile
        raise _refused_address(settings, exc) from exc
    finally:
        await server.end_beside()


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


class _Server(uvicorn.Server):
    """Says where it listens, with the port that the system gave when 0 was asked for; ends with 0 on a signal."""

    def __init__(self, config: uvicorn.Config, beside: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        super().__init__(config)
        self._begin_beside = beside
        self._beside: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again at the end, before the parts around the server are stopped."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def end_beside(self) -> None:
        """Stop what runs beside the server. Raises what it raised by itself."""
        if self._beside is None:
            return
        self._beside.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._beside

    def _end(self, _beside: asyncio.Task[None]) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                log.info("listening", url=f"http://{host}:{port}", docs=f"http://{host}:{port}/docs")
        if self._begin_beside is not None:
            self._beside = asyncio.create_task(self._begin_beside(), name="beside the server")
            self._beside.add_done_callback(self._end)
