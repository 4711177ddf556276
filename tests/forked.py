"""Processes of Kinema that start at once: each is forked from one that has imported what they all need.

A start from nothing takes two seconds of a core, most of it for imports, and the suite has some seventy. The process is
as any other in all else: its arguments, environment, folder and signals are its own, and it ends as a program does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from tests.forking import Open

# The descriptor of a socket; who has it may ask for a process. The processes that are forked have it too.
control: int | None = None
_helpers: set[int] = set()


class ForkedProcess:
    """Runs a function; ``pid``, ``returncode`` and the methods are those of ``subprocess.Popen``.

    Connections and sockets may be among the arguments; they are open in both processes.
    """

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        mine, its = socket.socketpair()
        with its, socket.socket(fileno=os.dup(start_forking())) as asked:
            socket.send_fds(asked, [b"1"], [its.fileno(), asked.fileno()])
        files = [argument for argument in arguments if isinstance(argument, Connection | socket.socket)]
        socket.send_fds(mine, [b"1"], [file.fileno() for file in files])
        self._client = Connection(mine.detach())
        self._client.send((function, [_closed(argument) for argument in arguments]))
        self.pid: int = self._client.recv()
        self.returncode: int | None = None
        self._hearing = threading.Lock()

    def poll(self) -> int | None:
        if self.returncode is None and self._client.poll():
            self._hear_its_end()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended, and that was not heard yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and self._client.poll(timeout):
            self._hear_its_end()
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("kinema", timeout)
        return self.returncode

    def _hear_its_end(self) -> None:
        with self._hearing:  # another thread may have heard of it meanwhile
            if self.returncode is None:
                self.returncode = self._client.recv()


def _closed(argument: object) -> object:
    if isinstance(argument, Connection):
        return Open(Connection)
    return Open(_socket) if isinstance(argument, socket.socket) else argument


def _socket(descriptor: int) -> socket.socket:
    return socket.socket(fileno=descriptor)


class Forked(ForkedProcess):
    """``kinema`` with these arguments; what it writes to stderr can be read from ``stderr``."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        reading, writing = Pipe(duplex=False)
        with writing:
            super().__init__(_run, arguments, dict(environment), folder, writing)
        self.stderr = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        reading.close()


def forked_with_log(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> ForkedProcess:
    """``kinema`` with these arguments; what it writes is added to the log."""
    return ForkedProcess(run_with_log, arguments, dict(environment), folder, log)


def forked_rank(its: socket.socket) -> ForkedProcess:
    """What ``start_process`` of the wan engine's ranks starts."""
    return ForkedProcess(_follow, its)


def start_forking() -> int:
    """Begin with the imports now, rather than for the first process that is forked."""
    global control  # noqa: PLW0603 - one for all tests
    if control is None:
        mine, its = socket.socketpair()
        with its, open(os.devnull, "r+b") as silence:
            os.set_inheritable(its.fileno(), True)
            code = f"import sys; sys.path[:] = {sys.path!r}; from tests.forking import main; main({its.fileno()})"
            streams = [(os.POSIX_SPAWN_DUP2, silence.fileno(), number) for number in (0, 1)]
            _helpers.add(os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ, file_actions=streams))
        control = mine.detach()
    return control


def pids_of_helpers() -> set[int]:
    """The process that all are forked from. It ends with the last of them, and this one."""
    return _helpers


def _run(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, stderr: Connection) -> None:
    """In the new process: become ``kinema``."""
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    become_kinema(arguments, environment, folder)


def run_with_log(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> None:
    """In the new process: become ``kinema``."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    become_kinema(arguments, environment, folder)


def become_kinema(arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    """In the new process."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(folder)
    sys.argv = ["kinema", *arguments]
    from kinema.cli.app import main
    from kinema.media import decoders

    decoders.start_process = _forked_decoders  # type: ignore[assignment]
    code: Any = 1
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    # As a program ends: threads are joined, functions at exit run, modules are torn down. multiprocessing's own end
    # leaves all of this out.
    ctypes.pythonapi.Py_Exit(code)


def _follow(its: socket.socket) -> None:
    """In the new process: be a rank."""
    from kinema.engines.wan.ranks.follower import main

    main(its.fileno())


def _forked_decoders(its: socket.socket) -> ForkedProcess:
    """What ``start_process`` of the decoders starts."""
    with Connection(os.dup(2)) as stderr:
        return ForkedProcess(_decode, its, stderr)


def _decode(its: socket.socket, stderr: Connection) -> None:
    """In the new process: be the one that decoders are forked from."""
    from kinema.media.decoder_process import main

    os.setsid()
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    main(its.detach())
