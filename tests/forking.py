"""The process that others are forked from: it has imported what ``kinema`` imports until it is ready.

``forked.py`` is the other side. multiprocessing has such a process too, but one that was forked from it starts another
for those that it forks itself; so each process of a run of the tests would have its own.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, NamedTuple

from kinema.imports import without_collector

_NAMES = [
    "httpcore",
    "kinema.cli.app",
    "kinema.engines.wan.engine",
    "kinema.engines.wan.ranks.follower",
    "kinema.hosting.frontend",
    "kinema.hosting.logs",
    "kinema.hosting.worker",
    "kinema.media.decoder_process",
    "kinema.settings_sources",
    "sqlalchemy.dialects.sqlite",
    "uvicorn.lifespan.on",
    "uvloop",
]
_MAX_FILES = 16


class Open(NamedTuple):
    """Stands for an argument that is open; its descriptor comes beside the others."""

    of: Callable[[int], Any]


class _Forked(NamedTuple):
    process: ForkProcess
    client: Connection


def main(control_fd: int) -> None:
    """Fork for all who have the other end of this socket, until the last of them ends."""
    with without_collector():
        for name in _NAMES:
            import_module(name)
    control = socket.socket(fileno=control_fd)
    woken, wakes = socket.socketpair()
    woken.setblocking(False)
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: list[_Forked] = []

    def become(order: socket.socket, others: socket.socket) -> None:
        """In the new process."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, interrupt)
        for unused in (control, woken, wakes, *(one.client for one in running)):
            unused.close()
        _run(order, others)

    while True:
        ready = wait([control, woken])
        if woken in ready:
            with suppress(BlockingIOError):
                woken.recv(4096)
            running = [one for one in running if not _has_ended(one)]
        if control in ready:
            _, (*descriptors,), _, _ = socket.recv_fds(control, 1, 2)
            if not descriptors:
                return
            order, others = (socket.socket(fileno=descriptor) for descriptor in descriptors)
            process = multiprocessing.get_context("fork").Process(target=become, args=(order, others))
            with order, others:
                process.start()
                client = Connection(order.detach())
            running.append(_Forked(process, client))
            _tell(client, process.pid)


def _has_ended(one: _Forked) -> bool:
    if one.process.exitcode is None:
        return False
    _tell(one.client, one.process.exitcode)
    one.client.close()
    return True


def _tell(client: Connection, number: int | None) -> None:
    with suppress(OSError):  # it has ended
        client.send(number)


def _run(order: socket.socket, others: socket.socket) -> None:
    """Call the function that was ordered."""
    from tests import forked

    forked.control = others.detach()
    _, descriptors, _, _ = socket.recv_fds(order, 1, _MAX_FILES)
    with Connection(order.detach()) as client:
        function, arguments = client.recv()
    at = iter(descriptors)
    function(*(argument.of(next(at)) if isinstance(argument, Open) else argument for argument in arguments))
