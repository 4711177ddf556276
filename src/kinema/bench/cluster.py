"""``kinema bench cluster``: an hour of a large cluster, in virtual time.

The dispatchers, the job stores with their database, and what frontends know of workers are the service's own; workers
and the network are simulated. HTTP and storage are not there. A transaction takes the time that it took on this
machine, behind the others of the same threads of its frontend: the database has processors enough.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from heapq import heapreplace
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar, cast

import structlog
from rich.table import Table

from kinema.bench.recorded import recorded_costs, simulated_request
from kinema.bench.report import percentile
from kinema.bench.simulated_workers import Execution, Ledger, Network, NetworkConnection, SimulatedWorker
from kinema.bench.virtual_time import VirtualLoop, run_in_virtual_time
from kinema.bench.workload import VideoClass, poisson
from kinema.cluster.remote import RemoteCluster
from kinema.ids import JobId, new_job_id
from kinema.job import Job, JobStatus
from kinema.jobs.database import Database, Transaction, Writer
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from kinema.request.request import GenerationRequest
from kinema.service.dispatcher import Dispatcher
from kinema.settings import JobSettings, sqlite_url
from kinema.shell import err, out

T = TypeVar("T")
OnProgress = Callable[[float, int], None]

# A tenth of the time for four of five videos, as docs/scheduling.md has them.
_CLASSES = [
    VideoClass("short", {"num_frames": 17, "num_inference_steps": 40}, 0.8),
    VideoClass("long", {"num_frames": 81, "num_inference_steps": 50}, 0.2),
]
# The first key sends as many as the seven others together.
_KEYS = {f"{number:064x}": 7.0 if number == 0 else 1.0 for number in range(8)}
_UNLIMITED = QueueLimits(max_queued=10**9)
_EPOCH = 1.8e9
# Seconds after which a lost worker is there again.
_BACK_AFTER_S = 60.0
# A cluster that does so much longer nothing new has lost the rest.
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Plan:
    """A cluster, and what is asked of it. ``load`` is the work that arrives as a share of what the workers can do.

    ``lost_workers`` die while they work and come back, ``lost_frontends`` die for good. ``turns`` are the events of a
    video between its start and its end.
    """

    workers: int = 1000
    frontends: int = 16
    jobs: int = 36_000
    per_s: float = 10.0
    load: float = 1.1
    slots: int = 1
    turns: int = 8
    lost_workers: int = 0
    lost_frontends: int = 0
    seed: int = 1
    thread_factor: float = 1.0


@dataclass(frozen=True)
class KeyReport:
    """The jobs of a key, and the seconds that they waited."""

    jobs: int
    wait_p50_s: float
    wait_p99_s: float


@dataclass(frozen=True)
class ClusterReport:
    """What became of the jobs. Times are in seconds of the simulated clock, but for ``took_s``; the database and a
    frontend take shares of one processor.

    Some jobs are ``made_again``: their video was whole when the frontend died that was to record it. ``videos_counted``
    are those that the keys' usage has.
    """

    jobs: int
    lost: int
    doubled: int
    made_again: int
    videos_counted: int
    makespan_s: float
    list_schedule_s: float
    slot_wait_p50_s: float
    slot_wait_p99_s: float
    claims: int
    empty_claims: int
    claim_p99_s: float
    given_back: int
    refused_by_workers: int
    renewals: int
    losses: int
    jobs_of_frontends: tuple[float, float]
    busy_share_of_workers: tuple[float, float]
    keys: dict[str, KeyReport]
    database_share: float
    frontend_share: float
    took_s: float

    @property
    def makespan_ratio(self) -> float:
        return self.makespan_s / self.list_schedule_s


def measure_cluster(plan: Plan, database: str | None, *, is_json: bool) -> None:
    """Simulate on this empty database, or on a temporary SQLite file, and print. Raises ServiceError."""
    # What the parts log is not for who reads the figures.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    with TemporaryDirectory(prefix="kinema-bench-") as folder, err.status("simulating") as status:
        url = database or sqlite_url(Path(folder) / "kinema.db")
        report = simulate(plan, url, lambda now, done: status.update(f"{now:,.0f} s, {done:,} of {plan.jobs:,} jobs"))
    if is_json:
        out.print_json(json.dumps(asdict(report) | {"makespan_ratio": report.makespan_ratio}))
    else:
        _show(report)


def simulate(
    plan: Plan, url: str, on_progress: Callable[[float, int], None] = lambda _now, _done: None
) -> ClusterReport:
    """Play the plan on this empty database."""
    return run_in_virtual_time(_Simulation(plan, url, on_progress).run(), plan.thread_factor)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A job that comes ``at_s`` seconds after the start."""

    at_s: float
    request: GenerationRequest
    key_id: str
    seconds: float


@dataclass
class _Calls:
    """What all dispatchers have asked of the database."""

    claim_s: list[float] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)


class _Database(Database):
    """A database whose frontend may die: then nothing comes back from it."""

    is_cut_off = False

    async def write(self, transaction: Transaction[T], writer: Writer = Writer.REQUESTS) -> T:
        await self._stop_if_cut_off()
        return await super().write(transaction, writer)

    async def read(self, transaction: Transaction[T]) -> T:
        await self._stop_if_cut_off()
        return await super().read(transaction)

    async def _stop_if_cut_off(self) -> None:
        if self.is_cut_off:
            await asyncio.Event().wait()


class _Store(SqlJobStore):
    """A store that counts the calls of a dispatcher."""

    def __init__(self, database: Database, clock: Callable[[], float], calls: _Calls) -> None:
        super().__init__(database, clock)
        self._calls = calls
        self.num_claimed = 0

    async def claim(
        self,
        models: Sequence[str],
        owner: str,
        lease_s: float,
        *,
        without_losses: Sequence[str] = (),
        only_loras: Mapping[str, Collection[str]] | None = None,
        owners_have_workers: bool = True,
    ) -> Job | None:
        began = _now()
        job = await super().claim(
            models,
            owner,
            lease_s,
            without_losses=without_losses,
            only_loras=only_loras,
            owners_have_workers=owners_have_workers,
        )
        self._calls.claim_s.append(_now() - began)
        self._calls.counted["claims"] += 1
        self._calls.counted["empty"] += job is None
        self.num_claimed += job is not None
        return job

    async def renew(self, owner: str, lease_s: float) -> None:
        self._calls.counted["renewals"] += 1
        await super().renew(owner, lease_s)

    async def give_back(
        self, owner: str, job_id: JobId, *, is_lost: bool, wait_s: float = 0.0, attempt: int | None = None
    ) -> None:
        self._calls.counted["given back"] += not is_lost
        await super().give_back(owner, job_id, is_lost=is_lost, wait_s=wait_s, attempt=attempt)


class _Frontend:
    """A frontend without HTTP, from ``start`` to ``stop``."""

    def __init__(self, network: Network, calls: _Calls) -> None:
        self._connection = NetworkConnection(network)
        self._cluster = RemoteCluster(self._connect)
        self._calls = calls
        self.is_alive = True

    async def start(self, url: str) -> None:
        self._database = cast("_Database", await _Database.open(url))
        self.store = _Store(self._database, _clock, self._calls)
        self.store.signals.start()
        self._dispatcher = Dispatcher(self.store, self._cluster, JobSettings())
        await self._cluster.start()
        await self._dispatcher.start()

    def die(self) -> None:
        self.is_alive = False
        self._connection.cut_off()
        self._database.is_cut_off = True

    async def stop(self) -> None:
        if self.is_alive:
            await self._dispatcher.stop()
            await self._cluster.stop()
        await self.store.close()

    async def _connect(self) -> NetworkConnection:
        return self._connection


class _Simulation:
    """One run of a plan."""

    def __init__(self, plan: Plan, url: str, on_progress: OnProgress) -> None:
        self._plan = plan
        self._url = url
        self._on_progress = on_progress
        self._draw = random.Random(plan.seed)  # noqa: S311 - a cluster that can be played again
        self._asked = self._make_jobs()
        self._ids: dict[JobId, _Asked] = {}
        self._calls, self._ledger = _Calls(), Ledger()

    def _make_jobs(self) -> list[_Asked]:
        """The arrivals, with times of a device that make up the load."""
        plan, costs = self._plan, recorded_costs()
        requests = {one.name: simulated_request(dict(one.body)) for one in _CLASSES}
        alone = {name: costs.remaining_s(request) for name, request in requests.items()}
        mean_s = sum(one.share * alone[one.name] for one in _CLASSES)
        scale = plan.load * plan.workers / (plan.per_s * mean_s)
        arrivals = poisson(_CLASSES, plan.per_s, plan.jobs, plan.seed)
        # With draws of its own: with those of the arrivals some keys would send nothing but long videos.
        draw = random.Random(f"keys {plan.seed}")  # noqa: S311 - as above
        keys = draw.choices(list(_KEYS), list(_KEYS.values()), k=plan.jobs)
        return [
            _Asked(one.at_s, requests[one.name], key_id, scale * alone[one.name])
            for one, key_id in zip(arrivals, keys, strict=True)
        ]

    async def run(self) -> ClusterReport:
        self._began_s = time.perf_counter()
        self._network = Network()
        self._frontends = [_Frontend(self._network, self._calls) for _ in range(self._plan.frontends)]
        seconds = {asked.request.num_frames: asked.seconds for asked in self._asked}
        model = self._asked[0].request.model
        for number in range(self._plan.workers):
            worker = SimulatedWorker(
                _worker_name(number),
                model,
                self._plan.slots,
                self._plan.turns,
                lambda request: seconds[request.num_frames],
                self._ledger,
            )
            self._network.join(worker)
        async with AsyncExitStack() as stack:
            for frontend in self._frontends:
                await frontend.start(self._url)
                stack.push_async_callback(frontend.stop)
            self._began_at = _now()
            losing = [asyncio.create_task(part) for part in (self._lose_workers(), self._lose_frontends())]
            await self._submit_all()
            await self._wait_for_all()
            for task in losing:
                task.cancel()
            return await self._report()

    async def _submit_all(self) -> None:
        submitting: set[asyncio.Task[None]] = set()
        for asked in self._asked:
            await asyncio.sleep(max(self._began_at + asked.at_s - _now(), 0.0))
            task = asyncio.create_task(self._submit(asked))
            submitting.add(task)
            task.add_done_callback(submitting.discard)
            self._on_progress(_now(), len(self._ledger.executions))
        await asyncio.gather(*submitting)

    async def _submit(self, asked: _Asked) -> None:
        frontend = self._draw.choice([one for one in self._frontends if one.is_alive])
        created_at = _EPOCH + _now()
        job_id = new_job_id(created_at)
        self._ids[job_id] = asked
        job = Job(id=job_id, request=asked.request, key_id=asked.key_id, created_at=created_at)
        await frontend.store.create(job, limits=_UNLIMITED)

    async def _wait_for_all(self) -> None:
        known, changed_at = -1, _now()
        while len(self._ledger.made) < self._plan.jobs:
            await asyncio.sleep(1.0)
            if len(self._ledger.taken_at) != known:
                known, changed_at = len(self._ledger.taken_at), _now()
            if _now() > changed_at + _PATIENCE_S:
                return  # the others are lost
        for asked_id in self._ids:  # the end of the last ones may not be recorded yet
            await self._a_store().wait_for_end(asked_id)

    def _a_store(self) -> SqlJobStore:
        return next(one.store for one in self._frontends if one.is_alive)

    async def _lose_workers(self) -> None:
        """At times that are spread over the arrivals."""
        last_s = self._asked[-1].at_s
        for at_s in sorted(self._draw.uniform(0, last_s) for _ in range(self._plan.lost_workers)):
            await asyncio.sleep(max(self._began_at + at_s - _now(), 0.0))
            worker = await self._network.lose(self._draw.choice(list(self._network.workers)))
            asyncio.get_running_loop().call_later(_BACK_AFTER_S, self._network.join, worker)

    async def _lose_frontends(self) -> None:
        last_s, count = self._asked[-1].at_s, self._plan.lost_frontends
        for number, frontend in enumerate(self._frontends[:count]):
            await asyncio.sleep(max(self._began_at + last_s * (number + 1) / (count + 1) - _now(), 0.0))
            frontend.die()

    async def _report(self) -> ClusterReport:
        store = self._a_store()
        jobs = await asyncio.gather(*map(store.get, self._ids))
        days = [datetime.fromtimestamp(_EPOCH + at_s, UTC).date() for at_s in (0.0, _now())]
        usage = await store.usage(None, *days)
        whole = [one for some in self._ledger.executions.values() for one in some if one.is_whole]
        makespan_s = max(one.ended_at for one in whole) - self._began_at
        counted, loop = self._calls.counted, cast("VirtualLoop", asyncio.get_running_loop())
        took_s = time.perf_counter() - self._began_s
        slot_waits = slot_waits_of([self._began_at + asked.at_s for asked in self._asked], self._ledger)
        return ClusterReport(
            jobs=len(jobs),
            lost=sum(job.status is not JobStatus.COMPLETED for job in jobs),
            doubled=sum(_is_doubled(some) for some in self._ledger.executions.values()),
            made_again=len(whole) - len(self._ledger.made),
            videos_counted=sum(day.num_videos for day in usage),
            makespan_s=makespan_s,
            list_schedule_s=list_schedule_s([(asked.at_s, asked.seconds) for asked in self._asked], self._plan.workers),
            slot_wait_p50_s=percentile(slot_waits, 50),
            slot_wait_p99_s=percentile(slot_waits, 99),
            claims=counted["claims"],
            empty_claims=counted["empty"],
            claim_p99_s=percentile(self._calls.claim_s, 99),
            given_back=counted["given back"],
            refused_by_workers=self._ledger.num_refused,
            renewals=counted["renewals"],
            losses=sum(job.losses + job.takeovers for job in jobs),
            jobs_of_frontends=_least_and_most([one.store.num_claimed for one in self._frontends if one.is_alive]),
            busy_share_of_workers=_least_and_most(self._busy_shares(makespan_s)),
            keys=self._keys(),
            database_share=loop.threads_s / makespan_s,
            frontend_share=(took_s - loop.threads_s) / self._plan.frontends / makespan_s,
            took_s=took_s,
        )

    def _busy_shares(self, makespan_s: float) -> list[float]:
        busy_s = dict.fromkeys((_worker_name(number) for number in range(self._plan.workers)), 0.0)
        for one in chain.from_iterable(self._ledger.executions.values()):
            busy_s[one.worker_id] += one.ended_at - one.began_at
        return [seconds / makespan_s for seconds in busy_s.values()]

    def _keys(self) -> dict[str, KeyReport]:
        waits_s: dict[str, list[float]] = {key_id: [] for key_id in _KEYS}
        for job_id, asked in self._ids.items():
            if some := self._ledger.executions[job_id]:
                began_at = min(one.began_at for one in some)
                waits_s[asked.key_id].append(began_at - self._began_at - asked.at_s)
        return {
            str(number): KeyReport(len(some), percentile(some, 50), percentile(some, 99))
            for number, some in enumerate(waits_s.values())
        }


def list_schedule_s(jobs: Sequence[tuple[float, float]], machines: int) -> float:
    """When the last of these jobs, as arrival and seconds, ends if each takes the machine that is free first."""
    free_at, last = [0.0] * machines, 0.0
    for arrives_at, seconds in jobs:
        end = max(free_at[0], arrives_at) + seconds
        heapreplace(free_at, end)
        last = max(last, end)
    return last


def slot_waits_of(arrived_at: Sequence[float], ledger: Ledger) -> list[float]:
    """How long a job waited beside a free slot, for each job that began.

    Such a wait begins when there is one more pair of a waiting job and a free slot, whichever; a job that begins ends
    the longest one. A job that begins again only takes its slot away.
    """
    changes = [(at, 0, "job") for at in arrived_at]
    changes += [(at, 0, "slot") for at in ledger.freed_at]
    changes += [(at, 1, "lost slot") for at in ledger.lost_at]
    changes += [(at, 2, "start" if is_first else "start again") for at, is_first in ledger.taken_at]
    jobs = slots = 0
    pairs_since: deque[float] = deque()
    waits = []
    for at, _, change in sorted(changes):
        if change == "start":
            waits.append(at - pairs_since.popleft() if pairs_since else 0.0)
        jobs += {"job": 1, "start": -1}.get(change, 0)
        slots += {"slot": 1}.get(change, -1 if change != "job" else 0)
        while len(pairs_since) < min(jobs, slots):
            pairs_since.append(at)
        while len(pairs_since) > max(min(jobs, slots), 0):
            pairs_since.pop()
    return waits


def _is_doubled(executions: Sequence[Execution]) -> bool:
    """Whether the job was made by two workers at a time."""
    ordered = sorted(executions, key=lambda one: one.began_at)
    return any(after.began_at < before.ended_at for before, after in pairwise(ordered))


def _least_and_most(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _worker_name(number: int) -> str:
    return f"{number:032x}"


def _clock() -> float:
    return _EPOCH + _now()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _show(report: ClusterReport) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, figure in _told(report):
        table.add_row(name, figure)
    out.print(table)
    keys = Table("key", "jobs", "waited, p50 s", "p99 s", box=None, pad_edge=False, header_style="bold")
    for column in keys.columns[1:]:
        column.justify = "right"
    for name, key in report.keys.items():
        keys.add_row(name, f"{key.jobs:,}", f"{key.wait_p50_s:,.1f}", f"{key.wait_p99_s:,.1f}")
    out.print()
    out.print(keys)


def _told(report: ClusterReport) -> list[tuple[str, str]]:
    least_jobs, most_jobs = report.jobs_of_frontends
    least_busy, most_busy = report.busy_share_of_workers
    return [
        ("jobs; lost; doubled", f"{report.jobs:,}; {report.lost}; {report.doubled}"),
        ("made again; videos in the usage", f"{report.made_again}; {report.videos_counted:,}"),
        ("makespan; of a list schedule", f"{report.makespan_s:,.1f} s; {report.list_schedule_s:,.1f} s"),
        ("ratio", f"{report.makespan_ratio:.4f}"),
        ("wait for a free slot, p50; p99", f"{report.slot_wait_p50_s:.3f} s; {report.slot_wait_p99_s:.3f} s"),
        ("claims; without a job; p99", f"{report.claims:,}; {report.empty_claims:,}; {report.claim_p99_s:.3f} s"),
        ("given back; refused by a worker", f"{report.given_back:,}; {report.refused_by_workers:,}"),
        ("renewals of leases; losses of jobs", f"{report.renewals:,}; {report.losses:,}"),
        ("jobs of a frontend, least; most", f"{least_jobs:,.0f}; {most_jobs:,.0f}"),
        ("a worker is busy, least; most", f"{least_busy:.1%}; {most_busy:.1%}"),
        ("processor of the database", f"{report.database_share:.0%}"),
        ("processor of a frontend", f"{report.frontend_share:.1%}"),
        ("the simulation took", f"{report.took_s:,.0f} s"),
    ]
