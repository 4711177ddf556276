"""The clusters that faults happen to, the proof that none of them outlives the tests, and the table at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.etcd import EtcdServer, running_etcd
from tests.faults.deployment import Deployment
from tests.faults.processes import until
from tests.faults.recovery import Recoveries
from tests.faults.scene import ALL_BODIES
from tests.forked import pids_of_helpers, start_forking
from tests.postgres import PostgresServer

_RECOVERIES = pytest.StashKey[Recoveries]()
# In the environment of every process that the suite starts, so that each of them can be found, whoever its parent is.
_MARK = "KEPT_BY_FAULT_SUITE"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECOVERIES] = Recoveries()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[_RECOVERIES]
    if found.lines:
        terminalreporter.write_sep("=", "recovery times, from the fault on")
        for line in found.table():
            terminalreporter.write_line(line)
    for note in found.notes:
        terminalreporter.write_line(note)


@pytest.fixture(scope="session")
def recoveries(request: pytest.FixtureRequest) -> Recoveries:
    return request.config.stash[_RECOVERIES]


@pytest.fixture(scope="session", autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Set up before everything else, so that it looks when all else is gone."""
    mark = f"{_MARK}={uuid4().hex}"
    os.environ.update([mark.split("=", 1)])
    yield
    del os.environ[_MARK]
    until(lambda: not _processes_with(mark), f"all processes are gone, but {_processes_with(mark)}", 10)


def _processes_with(mark: str) -> list[str]:
    """The command lines of the processes with that in their environment, without this one and those that fork."""
    found, ours = [], {os.getpid(), *pids_of_helpers()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0") and int(process.name) not in ours:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def _one_thread_each(_nothing_stays: None) -> Iterator[None]:
    """There are more processes than cores, and sums of floats have the same order everywhere. What is forked takes the
    number from the process that imports torch for it, which begins now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        start_forking()
        yield


@pytest.fixture(scope="session")
def etcd(_nothing_stays: None) -> Iterator[EtcdServer]:
    with running_etcd() as server:
        yield server


@pytest.fixture(scope="session")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, etcd: EtcdServer, postgres: PostgresServer
) -> Iterator[Deployment]:
    """Two frontends and three workers with the bundled model, one for all tests; they have learned what is right."""
    with (
        postgres.database() as url,
        running(
            tmp_path_factory.mktemp("cluster"),
            etcd=etcd,
            postgres=postgres,
            database_url=url,
            engine="wan",
            num_workers=3,
            # Shorter than the longest videos take: those are given back when a worker is asked to end.
            settings={"KINEMA_CLUSTER_DRAIN_S": "1", "KINEMA_WORKER_MAX_ACTIVE": "2"},
        ) as deployment,
    ):
        deployment.make_undisturbed(ALL_BODIES)
        yield deployment


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Deployment]:
    """At the end every process has ended as it should, and nothing listens any more."""
    deployment = Deployment(folder, **options)
    try:
        deployment.make_whole()
        yield deployment
    finally:
        exit_codes = deployment.stop()
    assert set(exit_codes.values()) == {0}, f"{exit_codes}\n{deployment.tails()}"
    assert deployment.listening_ports() == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failure shows what the processes said last."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Deployment):
                report.sections.append(("logs of the processes", value.tails()))
    return report
