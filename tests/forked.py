"""Processes of Kinema that start at once: each is forked from one that has imported what they all need.

A start from nothing takes two seconds of a core, most of it for imports, and the suite has some sixty. The process is
as any other in all else: its arguments, environment, folder and signals are its own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

_IMPORTED = ["kinema.cli.app", "kinema.hosting.frontend", "kinema.hosting.worker", "kinema.engines.wan.engine"]


class Forked:
    """``kinema`` with these arguments; what it writes to stderr can be read from ``stderr``.

    ``pid``, ``returncode`` and the methods are those of ``subprocess.Popen``.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        reading, writing = multiprocessing.Pipe(duplex=False)
        with writing:
            self._process = context().Process(target=_run, args=(arguments, dict(environment), folder, writing))
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.stderr = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        reading.close()

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


@cache
def context() -> ForkServerContext:
    """What makes such processes; of any function."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(_IMPORTED)
    return made


def _run(arguments: Sequence[str], environment: Mapping[str, str], folder: Path, stderr: Connection) -> None:
    """In the new process: become ``kinema``."""
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["kinema", *arguments]
    from kinema.cli.app import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without these
