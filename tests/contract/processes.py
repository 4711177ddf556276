"""What the sglang engine promises of the processes under it, as tests: for a stand-in and for the real library.

A subclass says which engine; it is loaded once for all tests of the class.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kinema.engines.base import Step, UInt8Array
from kinema.engines.sglang.engine import SglangEngine
from kinema.engines.sglang.process_group import members_of
from kinema.errors import EngineFailed
from tests.contract.engine import begin, frames_of, make_all

ROOT = Path(__file__).parents[2]
# pytest's ``record_property``: a name and what was measured.
Measure = Callable[[str, object], None]
# Of a video that is still being made when it is cancelled or its process killed. The stand-in knows the word.
LONG = {"prompt": "a red circle [slow]", "num_inference_steps": 60}
# A start of the real library takes 25 s on two idle cores.
_PATIENCE_S = 300.0
# A dead process is noticed at once; the rest is what a loaded machine takes.
_SECONDS = 10.0


class ProcessContract:
    """Tests of one loaded engine, in this order; the last one closes it."""

    @classmethod
    def make(cls, folder: Path) -> SglangEngine:
        """Not loaded. ``folder`` is for whatever it needs to be made."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def temporary(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        """The folder that temporary files go to. No semaphore stays either, whatever was killed meanwhile."""
        folder, before, left = tmp_path_factory.mktemp("t"), tempfile.tempdir, left_in_shared_memory()
        tempfile.tempdir = str(folder)
        yield folder
        tempfile.tempdir = before
        wait_until(lambda: left_in_shared_memory() <= left)

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, temporary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngine]:
        engine = cls.make(tmp_path_factory.mktemp("engine"))
        engine.load()
        yield engine
        engine.close()

    @pytest.fixture(scope="class")
    @classmethod
    def alone(cls, engine: SglangEngine) -> UInt8Array:
        return frames_of(make_all(engine))

    def test_a_cancelled_video_stops_at_its_next_step(
        self, engine: SglangEngine, alone: UInt8Array, record_property: Measure
    ) -> None:
        """The next one does not wait for the rest of it, and nothing is loaded again."""
        group = engine.process_group
        began = time.monotonic()
        make_all(engine, **LONG)
        whole_s = time.monotonic() - began
        outputs = begin(engine, **LONG)
        assert next(outputs) == Step(1, LONG["num_inference_steps"])
        outputs.close()
        began = time.monotonic()
        assert np.array_equal(frames_of(make_all(engine)), alone)
        next_s = time.monotonic() - began
        assert next_s < whole_s
        record_property("cancelled, and the next video there after", f"{next_s:.1f} s")
        assert engine.process_group == group

    def test_a_killed_worker_fails_the_video_in_seconds(
        self, engine: SglangEngine, alone: UInt8Array, record_property: Measure
    ) -> None:
        """The library waits for it for ever. The reason is said, and the next video is as ever."""
        outputs = begin(engine, **LONG)
        next(outputs)
        os.kill(worker_of(engine), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineFailed, match="SIGKILL"):
            list(outputs)
        failed_s = time.monotonic() - began
        assert failed_s < _SECONDS
        assert np.array_equal(frames_of(make_all(engine)), alone)
        record_property("worker killed, failed after", f"{failed_s:.2f} s")
        record_property("and the next video there after", f"{time.monotonic() - began:.0f} s")

    def test_a_process_that_dies_between_two_videos_fails_none(self, engine: SglangEngine, alone: UInt8Array) -> None:
        """The library is loaded again for the next one."""
        group = engine.process_group
        assert group is not None
        os.kill(group, signal.SIGKILL)
        wait_until(lambda: not members_of(group))
        assert np.array_equal(frames_of(make_all(engine)), alone)

    def test_the_death_of_the_librarys_own_process_fails_the_video_in_seconds(
        self, engine: SglangEngine, alone: UInt8Array
    ) -> None:
        """With its worker nothing of it stays, and the next video is as ever."""
        group = engine.process_group
        assert group is not None
        outputs = begin(engine, **LONG)
        next(outputs)
        os.kill(group, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineFailed, match="SIGKILL"):
            list(outputs)
        assert time.monotonic() - began < _SECONDS
        assert members_of(group) == []
        assert np.array_equal(frames_of(make_all(engine)), alone)

    def test_closing_leaves_nothing(self, engine: SglangEngine, temporary: Path, record_property: Measure) -> None:
        """No process, no file, no socket."""
        group = engine.process_group
        assert group is not None
        assert members_of(group)
        make_all(engine)
        began = time.monotonic()
        engine.close()
        record_property("closed after", f"{time.monotonic() - began:.0f} s")
        assert members_of(group) == []
        assert list(temporary.iterdir()) == []
        assert engine.process_group is None

    @pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
    def test_nothing_outlives_a_killed_server(
        self, is_busy: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Whatever the library is at."""
        # Its name is short, for there are sockets in it.
        temporary, left = tmp_path_factory.mktemp("t"), left_in_shared_memory()
        command = [sys.executable, "-c", _SERVER, type(self).__module__, type(self).__qualname__, str(tmp_path)]
        environment = {**os.environ, "TMPDIR": str(temporary)}
        with subprocess.Popen(
            [*command, "busy" * is_busy], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                assert server.stdout is not None
                group = int(server.stdout.readline())
            finally:
                server.kill()
        wait_until(lambda: not members_of(group) and not list(temporary.iterdir()))
        wait_until(lambda: left_in_shared_memory() <= left)


# What ``test_nothing_outlives_a_killed_server`` kills. It says its group when it is where it should be.
_SERVER = f"""
import importlib, sys, time
from pathlib import Path
from tests.contract.engine import begin

module, name, folder, is_busy = sys.argv[1:]
engine = getattr(importlib.import_module(module), name).make(Path(folder))
engine.load()
if is_busy:
    outputs = begin(engine, **{LONG!r})
    next(outputs)
print(engine.process_group, flush=True)
time.sleep(600)
"""


def worker_of(engine: SglangEngine) -> int:
    """The process that computes: of the group neither the first nor Python's own helper."""
    group = engine.process_group
    assert group is not None
    (found,) = (
        pid
        for pid in members_of(group)
        if pid != group and b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return found


def left_in_shared_memory() -> set[str]:
    """Names in /dev/shm that no process has mapped. Those of other tests' servers, as PostgreSQL's, are in use."""
    files = {file.inode(): file.name for file in os.scandir("/dev/shm")}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended
            for line in maps.read_text().splitlines():
                if "/dev/shm/" in line:  # a semaphore is mapped under the name that it had before it was linked
                    files.pop(int(line.split()[4]), None)
    return set(files.values())


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
