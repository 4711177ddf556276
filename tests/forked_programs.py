"""Programs that others start, and that start at once: each runs in a process that is forked from one with all imports.

What is started is ``launcher.py``, a small program. ``forked.py`` is for the processes that tests start themselves.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from tests.forked import ForkedProcess

_LAUNCHER = Path(__file__).with_name("launcher.py")


class ForkingPrograms:
    """A process that forks for each launcher. It ends with this one, and the last of those that it forked.

    ``prepare`` is called in it first, with these arguments; ``become`` in each new process, with the arguments,
    environment and folder of its launcher.
    """

    def __init__(
        self,
        become: Callable[[Sequence[str], Mapping[str, str], Path], None],
        prepare: Callable[..., None] | None = None,
        *arguments: object,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        address = os.path.join(self._folder.name, "socket")
        self._alive, its = socket.socketpair()
        with socket.socket(socket.AF_UNIX) as listener, its:
            listener.bind(address)
            listener.listen()
            ForkedProcess(_serve, listener, its, become, prepare, arguments)
        # What a launcher is started with, before its arguments.
        self.command = [sys.executable, "-I", "-S", str(_LAUNCHER), address]

    def stop(self) -> None:
        """Fork no more."""
        self._alive.close()
        self._folder.cleanup()


def _serve(
    listener: socket.socket,
    alive: socket.socket,
    become: Callable[..., None],
    prepare: Callable[..., None] | None,
    arguments: Sequence[Any],
) -> None:
    if prepare is not None:
        prepare(*arguments)
    gc.freeze()
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forking = multiprocessing.get_context("fork")
    running: dict[socket.socket, ForkProcess] = {}

    def run(arguments: Sequence[str], environment: Mapping[str, str], folder: str, streams: Sequence[int]) -> None:
        """In the new process, which is in a group of its own: the signals of a group come from its launcher."""
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, interrupt)
        for unused in (listener, alive, *running):
            unused.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        become(arguments, environment, Path(folder))

    asking: list[Any] = [listener, alive]
    while asking or running:
        ready = wait([*asking, *running, *(process.sentinel for process in running.values())])
        if alive in ready:
            asking = []
        for launcher, process in list(running.items()):
            if process.sentinel in ready:
                process.join()
                with suppress(OSError):  # it has ended
                    launcher.sendall(str(process.exitcode).encode())
                running.pop(launcher).close()
                launcher.close()
            elif launcher in ready:
                for number in _received(launcher) or [signal.SIGKILL]:
                    os.kill(process.pid, number)  # type: ignore[arg-type]
        if listener in ready:
            launcher, _ = listener.accept()
            with suppress(ValueError, OSError):  # it has ended before it said what to run
                order, streams = _read_order(launcher)
                running[launcher] = forking.Process(target=run, args=(*order, streams))
                running[launcher].start()
                for stream in streams:
                    os.close(stream)


def _read_order(launcher: socket.socket) -> tuple[list[Any], list[int]]:
    """Its arguments, environment and folder, and its streams."""
    _, streams, _, _ = socket.recv_fds(launcher, 1, 3)
    with launcher.makefile() as lines:
        return json.loads(lines.readline()), streams


def _received(launcher: socket.socket) -> bytes:
    """The numbers of its signals; none when it has ended."""
    with suppress(ConnectionResetError):
        return launcher.recv(16)
    return b""
