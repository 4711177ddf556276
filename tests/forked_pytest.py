"""The processes of pytest-xdist start at once: they are forked from one that has imported what tests import.

pytest-xdist starts each of its processes as ``PYTHON -u -c CODE``, and a test run may say what that PYTHON is. Here it
is ``launcher.py``, for a process that executes the code.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from kinema.imports import without_collector
from tests.forked_programs import ForkingPrograms

# What tests of a package import while they run, and takes longest. Pipelines are imported by their use.
_USED = {
    "tests.contract.diffusers": ["tests.dummies.pipelines"],
    "tests.e2e.openai_sdk": ["openai.resources.videos"],
    "tests.integration.wan": ["diffusers.pipelines.wan.pipeline_wan_i2v", "diffusers.pipelines.wan.pipeline_wan"],
}


def forking_python(tests: Sequence[str]) -> ForkingPrograms:
    """Its command is the PYTHON for a run of these files and folders."""
    return ForkingPrograms(_execute, _collect, tests)


def _collect(tests: Sequence[str]) -> None:
    """Collecting the tests imports what they need, and as pytest does: with its assertions, and warnings are errors.

    What goes wrong is reported by the processes of the run, which collect them again.
    """
    with without_collector(), _silence():
        pytest.main([*tests, "--collect-only", "--capture=no", "-n", "0"])
        for name in itertools.chain.from_iterable(_USED[package] for package in _USED.keys() & sys.modules.keys()):
            import_module(name)


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


def _execute(arguments: Sequence[str], _environment: Mapping[str, str], _folder: Path) -> None:
    """In the new process: be ``python -c``. It has the environment and the folder of the run already."""
    exec(arguments[-1], {"__name__": "__main__"})
