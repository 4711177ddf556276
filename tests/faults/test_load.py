"""Many short videos over many workers: none lost and none doubled while workers and frontends die, freeze and are cut
off, and no worker idle for nothing."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from kinema.bench.filling import fill
from kinema.ids import JobId
from kinema.jobs.database import Database
from tests.etcd import EtcdServer
from tests.faults.checks import check_all_made_once
from tests.faults.clients import Body
from tests.faults.conftest import running
from tests.faults.deployment import Deployment
from tests.faults.ledger import OTHER_KEY
from tests.faults.line import Line, line_to
from tests.faults.processes import Process
from tests.faults.recovery import Recoveries
from tests.faults.scene import body
from tests.postgres import PostgresServer

pytestmark = pytest.mark.faults

_NUM_WORKERS = 8
_NUM_JOBS = 300
_KILL_EVERY_S = 5.0
_DISTURB_EVERY_S = 2.0
# Finished videos of others, behind which all of this happens.
_NUM_FINISHED = 10_000
_LEASE_S = 4.0
# A frontend is frozen, or cut off from the database, for so long: others have what it ran when it goes on.
_AWAY_S = 2 * _LEASE_S
_FRONTENDS = ("frontend-0", "frontend-1")
# What the fake engine takes for a step of such a prompt.
_STEP_S = 0.2
_AT_ONCE = 4


def slow(steps: int, seed: int) -> Body:
    return {**body(seed, steps=steps), "prompt": "waves [slow]"}


@pytest.fixture(scope="module")
def lines(postgres: PostgresServer) -> Iterator[dict[str, Line]]:
    """By which each frontend reaches PostgreSQL."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(line_to(postgres.port)) for name in _FRONTENDS}


@pytest.fixture(scope="module")
def crowd(
    tmp_path_factory: pytest.TempPathFactory, etcd: EtcdServer, postgres: PostgresServer, lines: dict[str, Line]
) -> Iterator[Deployment]:
    """Two frontends, and eight workers of one slot with the fake engine."""
    with (
        postgres.database() as url,
        running(
            tmp_path_factory.mktemp("crowd"),
            etcd=etcd,
            postgres=postgres,
            database_url=url,
            engine="fake",
            num_workers=_NUM_WORKERS,
            num_frontends=len(_FRONTENDS),
            own_database_urls={
                name: url.replace(f":{postgres.port}/", f":{line.port}/") for name, line in lines.items()
            },
            settings={
                "KINEMA_WORKER_MAX_ACTIVE": "1",
                "KINEMA_JOBS_MAX_QUEUED": str(2 * _NUM_JOBS),
                "KINEMA_JOBS_LEASE_S": str(_LEASE_S),
                "KINEMA_CLUSTER_NAMESPACE": "crowd",
            },
        ) as deployment,
    ):
        yield deployment


def test_three_hundred_videos_while_workers_and_frontends_die(
    crowd: Deployment, lines: dict[str, Line], recoveries: Recoveries
) -> None:
    """Every five seconds one of eight workers is killed and started again, and one frontend after the other is frozen
    for longer than its leases, is killed, or is cut off from the database for longer than these: all videos are made,
    each once."""
    bodies = [slow(3, seed) for seed in range(3)]
    crowd.make_undisturbed(bodies)
    asyncio.run(have_finished(crowd, _NUM_FINISHED))
    started = time.monotonic()
    with killing_workers(crowd) as killed, disturbing_frontends(crowd, lines) as disturbed:
        made = create_all(crowd, list(itertools.islice(itertools.cycle(bodies), _NUM_JOBS)))
        crowd.clients.wait(list(made))
    took_s = time.monotonic() - started
    check_all_made_once(crowd, made)
    begun_twice = sum(attempt > 1 for attempt in crowd.ledger.attempts().values())
    assert len(killed) > 1, "too few workers were killed for this to say anything"
    assert {"frozen", "killed", "cut off"} == set(disturbed), "too few frontends were disturbed to say anything"
    recoveries.notes.append(
        f"{_NUM_JOBS} videos on {_NUM_WORKERS} workers in {took_s:.0f} s, {len(killed)} of them killed, "
        f"frontends {' and '.join(disturbed)}: 0 lost, 0 doubled, {begun_twice} begun again"
    )


def test_the_last_video_is_made_when_a_perfect_schedule_would_have_it(
    crowd: Deployment, recoveries: Recoveries
) -> None:
    """Durations are spread 1 to 20: a worker that waits for nothing would show in the time of the last video."""
    crowd.make_whole()
    steps = [1 + (7 * number) % 20 for number in range(60)]
    made = create_all(crowd, [slow(count, seed=0) for count in steps])
    crowd.clients.wait(list(made))
    histories = crowd.ledger.histories()
    first, last = (edge(histories[one][index].at for one in made) for edge, index in ((min, 0), (max, -1)))
    # In the order in which they were accepted, which is the order of their ids.
    durations = [_STEP_S * int(made[one]["num_inference_steps"]) for one in sorted(made)]
    makespan_s, perfect_s = last - first, list_schedule(durations, _NUM_WORKERS)
    assert makespan_s <= 1.15 * perfect_s, f"{makespan_s:.2f} s, and {perfect_s:.2f} s would be perfect"
    recoveries.notes.append(
        f"{len(made)} videos of {_STEP_S:.1f} to {20 * _STEP_S:.1f} s on {_NUM_WORKERS} workers: all made after "
        f"{makespan_s:.1f} s, {makespan_s / perfect_s:.2f} times a perfect list schedule"
    )


def list_schedule(durations: Sequence[float], num_slots: int) -> float:
    """When the last one ends if each, in this order, begins at once in the slot that is free first."""
    free_at = [0.0] * num_slots
    for duration in durations:
        heapq.heappush(free_at, heapq.heappop(free_at) + duration)
    return max(free_at)


def create_all(crowd: Deployment, bodies: Sequence[Body]) -> dict[str, Body]:
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        ids = list(threads.map(crowd.clients.create, bodies))
    return dict(zip(ids, bodies, strict=True))


async def have_finished(crowd: Deployment, count: int) -> None:
    """Fill the database with copies of a finished video, which belong to another key."""
    database = await Database.open(crowd.database_url)
    try:
        like = JobId(next(iter(crowd.clients.accepted)))
        await fill(database, like, first=0, count=count, key_ids=[OTHER_KEY], newest_at=time.time() - 3600)
    finally:
        await database.close()


@contextmanager
def killing_workers(crowd: Deployment) -> Iterator[list[str]]:
    """One after the other is killed and started again meanwhile; the names of those that were."""
    killed: list[str] = []
    is_over = threading.Event()

    def kill() -> None:
        for name in itertools.cycle(crowd.workers):
            if is_over.wait(_KILL_EVERY_S):
                return
            crowd.workers[name].end(signal.SIGKILL)
            killed.append(name)
            crowd.start_worker(name)

    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill)
        try:
            yield killed
        finally:
            is_over.set()
        killing.result()


@contextmanager
def disturbing_frontends(crowd: Deployment, lines: dict[str, Line]) -> Iterator[list[str]]:
    """In turn, one is frozen for a while, one is killed and started again, and one is cut off from the database; what
    has happened to them."""
    disturbed: list[str] = []
    is_over = threading.Event()

    def disturb() -> None:
        for name, what in zip(
            itertools.cycle(crowd.frontends), itertools.cycle(["frozen", "killed", "cut off"]), strict=False
        ):
            crowd.clients.urls = [url_of(one) for one in crowd.frontends.values() if one.name != name]
            if is_over.wait(_DISTURB_EVERY_S):
                return
            match what:
                case "frozen":
                    crowd.frontends[name].send(signal.SIGSTOP)
                    is_over.wait(_AWAY_S)
                    crowd.frontends[name].send(signal.SIGCONT)
                case "killed":
                    crowd.frontends[name].end(signal.SIGKILL)
                    crowd.start_frontend(name).wait_until_said("listening")
                case "cut off":
                    lines[name].cut()
                    is_over.wait(_AWAY_S)
                    lines[name].mend()
            disturbed.append(what)

    with ThreadPoolExecutor(1) as threads:
        disturbing = threads.submit(disturb)
        try:
            yield disturbed
        finally:
            is_over.set()
        disturbing.result()
        crowd.clients.urls = [url_of(one) for one in crowd.frontends.values()]


def url_of(frontend: Process) -> str:
    return str(frontend.wait_until_said("listening")["url"])
