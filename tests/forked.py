"""Processes of Kinema that start at once: each is forked from one that has imported what they all need.

A start from nothing takes two seconds of a core, most of it for imports, and the suite has some seventy. The process is
as any other in all else: its arguments, environment, folder and signals are its own, and it ends as a program does.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


class ForkedProcess:
    """Runs a function; ``pid``, ``returncode`` and the methods are those of ``subprocess.Popen``."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._process = context().Process(target=function, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("kinema", timeout)
        return code


class Forked(ForkedProcess):
    """``kinema`` with these arguments; what it writes to stderr can be read from ``stderr``."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        reading, writing = multiprocessing.Pipe(duplex=False)
        with writing:
            super().__init__(_run, arguments, dict(environment), folder, writing)
        self.stderr = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        reading.close()


def forked_with_log(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> ForkedProcess:
    """``kinema`` with these arguments; what it writes is added to the log."""
    return ForkedProcess(run_with_log, arguments, dict(environment), folder, log)


def forked_rank(its: socket.socket) -> ForkedProcess:
    """What ``start_process`` of the wan engine's ranks starts."""
    return ForkedProcess(_follow, Connection(os.dup(its.fileno())))


def start_forking() -> None:
    """Begin with the imports now, rather than for the first process that is forked."""
    context()
    forkserver.ensure_running()


def pids_of_helpers() -> set[int | None]:
    """The process that all are forked from, and multiprocessing's tracker of resources. They end with this process."""
    return {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}


@cache
def context() -> ForkServerContext:
    """What makes such processes; of any function."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.forked_imports"])
    return made


def _run(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, stderr: Connection) -> None:
    """In the new process: become ``kinema``."""
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    _become_kinema(arguments, environment, folder)


def run_with_log(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> None:
    """In the new process: become ``kinema``."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _become_kinema(arguments, environment, folder)


def _become_kinema(arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(folder)
    sys.argv = ["kinema", *arguments]
    from kinema.cli.app import main

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


def _follow(its: Connection) -> None:
    """In the new process: be a rank."""
    from kinema.engines.wan.ranks.follower import main

    main(its.fileno())
