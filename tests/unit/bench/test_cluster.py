"""``kinema bench cluster``: a small cluster in virtual time, on the real dispatcher and database."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from kinema.bench.cluster import Plan, list_schedule_s, simulate, slot_waits_of
from kinema.bench.simulated_workers import Ledger
from kinema.bench.virtual_time import NothingHappens, VirtualLoop, run_in_virtual_time
from kinema.cli.app import app

# A poll of the database: a frontend on SQLite hears no sooner of what others accepted.
POLL_S = 1.0


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'kinema.db'}"


def test_each_job_is_made_once_and_no_worker_waits_beside_one(tmp_path: Path) -> None:
    """The frontends share the queue: whoever accepted a job, the first free worker takes it."""
    report = simulate(Plan(6, 3, jobs=30, per_s=2.0, turns=2, thread_factor=0.0), url_in(tmp_path))
    assert (report.jobs, report.lost, report.doubled, report.videos_counted) == (30, 0, 0, 30)
    assert sum(key.jobs for key in report.keys.values()) == 30
    assert report.claims - report.empty_claims == 30 + report.given_back
    assert report.slot_wait_p99_s < POLL_S + 0.2
    assert report.made_again == 0
    assert report.makespan_ratio < 1.3
    least, most = report.busy_share_of_workers
    assert 0 < least <= most <= 1


def test_each_job_is_made_once_though_workers_and_frontends_die(tmp_path: Path) -> None:
    """A dead worker's job is tried again at once, a dead frontend's when its leases have run out."""
    plan = Plan(4, 3, jobs=16, per_s=1.0, turns=2, thread_factor=0.0, lost_workers=2, lost_frontends=1)
    report = simulate(plan, url_in(tmp_path))
    assert (report.jobs, report.lost, report.doubled, report.videos_counted) == (16, 0, 0, 16)
    assert report.losses > 0


def test_a_list_schedule_gives_each_job_the_first_free_machine() -> None:
    """In the order of their arrival, and none before it."""
    assert list_schedule_s([(0, 4), (0, 1), (0, 2), (9, 1)], machines=2) == 10
    assert list_schedule_s([(0, 4), (0, 1), (0, 2), (1, 6)], machines=2) == 9


def test_a_wait_begins_with_a_free_slot_and_a_waiting_job() -> None:
    """Whichever they are: it does not matter which of the jobs takes which of the slots."""
    ledger = Ledger(freed_at=[0.0, 5.0], taken_at=[(2.0, True), (7.0, True), (9.0, False)])
    assert slot_waits_of([1.0, 1.5, 4.0], ledger) == [1.0, 2.0]


def test_virtual_time_jumps_and_threads_take_theirs() -> None:
    """An hour's sleep takes none; what threads have worked passes, as many at a time as a pool has."""

    async def hour() -> tuple[float, float, float]:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(3600)
        slept_until = loop.time()
        took_s = []
        for num_threads in (1, 3):
            began = loop.time()
            with ThreadPoolExecutor(num_threads) as pool:
                await asyncio.gather(*(loop.run_in_executor(pool, time.sleep, 0.002) for _ in range(3)))
            took_s.append(loop.time() - began)
        return slept_until, *took_s

    began = time.perf_counter()
    slept_until, alone_s, together_s = run_in_virtual_time(hour(), thread_factor=1000)
    assert slept_until == pytest.approx(3600)
    assert alone_s >= 6
    assert together_s >= 2
    assert time.perf_counter() - began < 30


def test_virtual_time_does_not_wait_for_what_never_comes() -> None:
    """Tasks that all wait for each other are an error, and no test that hangs."""
    with pytest.raises(NothingHappens):
        run_in_virtual_time(asyncio.Event().wait())
    loop = VirtualLoop()
    assert loop.time() == 0
    loop.close()


def test_the_command_prints_all_figures() -> None:
    """As one JSON object for programs, and as a table for people."""
    logging = structlog.get_config()
    command = ["bench", "cluster", "--workers", "2", "--frontends", "2", "--jobs", "4", "--turns", "1"]
    told, shown = (CliRunner().invoke(app, [*command, *more]).stdout for more in (["--json"], []))
    structlog.configure(**logging)
    report = json.loads(told)
    assert (report["jobs"], report["lost"], report["doubled"]) == (4, 0, 0)
    assert "4; 0; 0" in shown
    assert list(report["keys"]) == [str(number) for number in range(8)]
