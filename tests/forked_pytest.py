"""The processes of pytest-xdist start at once: they are forked from one that has imported what tests import.

pytest-xdist starts each of its processes as ``PYTHON -u -c CODE``, and a test run may say what that PYTHON is. Here it
is ``forked_python.py``, which asks the process below for one that executes the code.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from kinema.imports import without_collector
from tests.forked import ForkedProcess

# What tests of a package import while they run, and takes longest. Pipelines are imported by their use.
_USED = {
    "tests.contract.diffusers": ["tests.dummies.pipelines"],
    "tests.e2e.openai_sdk": ["openai.resources.videos"],
    "tests.integration.wan": ["diffusers.pipelines.wan.pipeline_wan_i2v", "diffusers.pipelines.wan.pipeline_wan"],
}


class ForkingPython:
    """The process that others are forked from; ``command`` is the PYTHON. Its processes go on when it is stopped.

    ``tests`` are the files and folders of the run.
    """

    def __init__(self, tests: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        address = os.path.join(self._folder.name, "python")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            self._process = ForkedProcess(_serve, listener, tests)
        launcher = Path(__file__).with_name("forked_python.py")
        self.command = shlex.join([sys.executable, "-I", "-S", str(launcher), address])

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _serve(listener: socket.socket, tests: Sequence[str]) -> None:
    """Fork a process for each that connects, as long as the run goes on."""
    with without_collector(), _silence():
        # Collecting the tests imports what they need, and as pytest does: with its assertions, and warnings are errors.
        # What goes wrong is reported by the processes of the run, which collect them again.
        pytest.main([*tests, "--collect-only", "--capture=no", "-n", "0"])
        for name in itertools.chain.from_iterable(_USED[package] for package in _USED.keys() & sys.modules.keys()):
            import_module(name)
    gc.freeze()
    run = multiprocessing.parent_process()
    assert run is not None
    forking = multiprocessing.get_context("fork")
    while listener in wait([listener, run.sentinel]):
        connection, _ = listener.accept()
        with connection:
            forking.Process(target=_execute, args=(listener, connection)).start()
        multiprocessing.active_children()  # takes note of those that ended


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing is printed, though loggers may keep the streams for later."""
    before = [os.dup(number) for number in (1, 2)]
    with open(os.devnull, "w") as silence:
        for number in (1, 2):
            os.dup2(silence.fileno(), number)
    yield
    sys.stdout.flush()
    for number, descriptor in enumerate(before, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _execute(listener: socket.socket, connection: socket.socket) -> None:
    """In the new process: be ``python -c``. Its end closes the connection."""
    listener.close()
    code, descriptors, _, _ = socket.recv_fds(connection, 4096, 3)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    exec(code, {"__name__": "__main__"})
