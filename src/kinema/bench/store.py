"""``kinema bench store``: what the job database costs when it has many jobs, finished or waiting.

It calls the store as the service does, without HTTP. The database is filled by SQL with copies of one job.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import cast

import structlog
from rich.table import Table
from sqlalchemy import Connection, make_url, text
from sqlalchemy.schema import CreateSchema

from kinema.bench.filling import fill
from kinema.cluster.base import Cluster, WorkerInfo
from kinema.engines.fake import FakeEngine
from kinema.events import Artifact, Completed, Progress, Started, Timings
from kinema.ids import JobId, new_job_id
from kinema.job import Job
from kinema.jobs.database import Database, open_engine
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits, Submission
from kinema.request.request import GenerationRequest
from kinema.service.queue import QueueView
from kinema.settings import sqlite_url
from kinema.shell import err, out

_MODEL = "wan"
_KEYS = [f"{number:064x}" for number in range(8)]
_PAGE = 20
# A film of 81 frames in 50 steps, of which the decode makes one more event for every four frames.
_STEPS, _CHUNKS = 50, 21
_REQUEST = GenerationRequest(
    model=_MODEL,
    prompt="A red circle moves to the right over a white floor, slowly, in the light of a late afternoon in summer.",
    negative_prompt="",
    width=832,
    height=480,
    num_frames=81,
    fps=16,
    num_inference_steps=_STEPS,
    guidance_scale=5.0,
    flow_shift=3.0,
    seed=7,
)
Call = Callable[[], Awaitable[object]]
_UNLIMITED = QueueLimits(max_queued=10**9)
# Finished jobs are older than what counts as arrivals.
_QUIET_S = 3600.0


@dataclass(frozen=True)
class StoreReport:
    """Milliseconds of a call, and of this process's processors in it, by the number of finished jobs; jobs a second,
    and the longest time in which the event loop did nothing else, by the number of waiting jobs."""

    calls_ms: dict[int, dict[str, float]] = field(default_factory=dict)
    calls_cpu_ms: dict[int, dict[str, float]] = field(default_factory=dict)
    jobs_per_s: dict[int, float] = field(default_factory=dict)
    loop_held_ms: dict[int, float] = field(default_factory=dict)


def measure_store(
    database: str | None,
    finished: Sequence[int],
    waiting: Sequence[int],
    num_workers: int,
    calls: int,
    *,
    is_json: bool,
) -> None:
    """Measure in this empty database, or in a temporary SQLite file, and print. Raises ServiceError."""
    # What the store logs is not for who reads the figures.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    with TemporaryDirectory(prefix="kinema-bench-") as folder:
        url = database or sqlite_url(Path(folder) / "kinema.db")
        report = asyncio.run(_measure(url, sorted(finished), sorted(waiting), num_workers, calls))
    _show(report, is_json=is_json)


async def _measure(
    url: str, finished: Sequence[int], waiting: Sequence[int], num_workers: int, calls: int
) -> StoreReport:
    """Databases of all sizes are asked in turn, so that a machine that is busy for a while changes all figures."""
    report = StoreReport()
    async with AsyncExitStack() as stack:
        subjects: dict[int, _Subject] = {}
        for count in finished:
            with err.status(f"{count:,} finished jobs"):
                store = await SqlJobStore.open(await _part(url, f"kinema_{count}"))
                stack.push_async_callback(store.close)
                subjects[count] = _Subject(store, num_workers)
                await subjects[count].begin()
                await subjects[count].have_finished(count)
        with err.status("calls"):
            timed = await _time_in_turn({count: subject.calls() for count, subject in subjects.items()}, calls)
        for count, figures in timed.items():
            report.calls_ms[count] = {name: ms for name, (ms, _) in figures.items()}
            report.calls_cpu_ms[count] = {name: cpu_ms for name, (_, cpu_ms) in figures.items()}
        subject = subjects[finished[-1]]
        for count in waiting:
            with err.status(f"{count:,} waiting jobs"):
                await subject.have_waiting(count)
                report.jobs_per_s[count] = await subject.jobs_per_s(calls)
                report.loop_held_ms[count] = await subject.loop_held_ms()
    return report


async def _part(text_url: str, name: str) -> str:
    """The URL of a database of this name beside others: a schema of a PostgreSQL database, or an SQLite file."""
    url = make_url(text_url)
    if url.get_backend_name() == "sqlite":
        return url.set(database=f"{url.database}.{name}").render_as_string(hide_password=False)

    def make_schema() -> None:
        engine = open_engine(text_url)
        with engine.begin() as connection:
            connection.execute(CreateSchema(name))
        engine.dispose()

    await asyncio.to_thread(make_schema)
    options = f"{url.query.get('options', '')} -csearch_path={name}".strip()
    return url.update_query_dict({"options": options}).render_as_string(hide_password=False)


class _Subject:
    """The store that is measured, and what is in it."""

    def __init__(self, store: SqlJobStore, num_workers: int) -> None:
        self._store = store
        self._workers = [_worker(number) for number in range(num_workers)]
        self._num_finished = 0
        self._num_waiting = 0

    async def begin(self) -> None:
        """Make the job that the finished ones are copies of, and one that may be claimed."""
        gc.freeze()  # as a server does when it has imported what it needs
        self._finished = await self._make_one()
        self._num_finished = 1
        await self._submit(_KEYS[0])
        self._num_waiting = 1

    async def have_finished(self, count: int) -> None:
        await self._fill(self._finished, self._num_finished, count, time.time() - _QUIET_S)
        self._num_finished = count

    async def have_waiting(self, count: int) -> None:
        like = await self._submit(_KEYS[0])  # one that was never claimed
        await self._fill(like.id, 10**9 + self._num_waiting, count + 10**9, time.time())
        self._num_waiting = count

    async def _fill(self, like: JobId, have: int, want: int, newest_at: float) -> None:
        database, count = self._store.database, want - have
        await fill(database, like, first=have, count=count, key_ids=_KEYS, newest_at=newest_at)
        await _analyze(self._store.database)

    def calls(self) -> dict[str, Call]:
        """What is timed, by its name."""
        job_id = self._finished

        async def claim() -> None:
            job = await self._store.claim([_MODEL], "bench", 60)
            assert job is not None
            await self._store.give_back("bench", job.id, is_lost=False)

        async def estimate() -> None:
            await self._view().estimate(_REQUEST, _KEYS[0])

        return {
            "list": lambda: self._store.list_page(_KEYS[0], after=None, limit=_PAGE, is_ascending=False),
            "get": lambda: self._store.get(job_id),
            "claim and give back": claim,
            "estimate": estimate,
            "unknown model": lambda: self._store.has_jobs_of("nobody"),
            "times of a new model": lambda: self._store.recent_times("nobody"),
        }

    async def jobs_per_s(self, calls: int) -> float:
        """Submit, claim and finish, one after the other."""

        async def one() -> None:
            await self._submit(_KEYS[0])
            job = await self._store.claim([_MODEL], "bench", 60)
            assert job is not None
            await self._finish(job)

        return 1000 / await _median_ms(one, calls)

    async def loop_held_ms(self) -> float:
        """The longest time for which the event loop does nothing else, while the queue's view is read twice."""
        view = self._view()
        longest, is_over = 0.0, False

        async def watch() -> None:
            nonlocal longest
            last = time.perf_counter()
            while not is_over:
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0)
        await view.outlooks()
        await view.estimate(_REQUEST, _KEYS[0])
        is_over = True
        await watching
        return longest * 1000

    def _view(self) -> QueueView:
        return QueueView(self._store, cast("Cluster", _Workers(self._workers)))

    async def _submit(self, key_id: str) -> Job:
        job = Job(id=new_job_id(), request=_REQUEST, created_at=time.time(), key_id=key_id)
        return await self._store.create(job, limits=_UNLIMITED, submission=Submission(job.id))

    async def _make_one(self) -> JobId:
        await self._submit(_KEYS[0])
        job = await self._store.claim([_MODEL], "bench", 60)
        assert job is not None
        await self._finish(job)
        return job.id

    async def _finish(self, job: Job) -> None:
        """As the events of a quick video are recorded, in few transactions."""
        await self._store.record(job.id, Started(worker_id="w" * 32, attempt=job.attempt), attempt=job.attempt)
        await self._store.record(job.id, *_progress(), attempt=job.attempt)
        await self._store.record(job.id, _completed(job), attempt=job.attempt)


@dataclass(frozen=True)
class _Workers:
    """As much of a cluster as the queue's view asks for."""

    all: Sequence[WorkerInfo]

    def workers(self) -> Sequence[WorkerInfo]:
        return self.all


def _worker(number: int) -> WorkerInfo:
    return WorkerInfo(f"{number:032x}", FakeEngine(_MODEL).capabilities, free_slots=1, is_ready=True)


def _progress() -> list[Progress]:
    steps = [Progress(stage="denoise", step=step, total=_STEPS) for step in range(1, _STEPS + 1)]
    return steps + [Progress(stage="decode", step=chunk, total=_CHUNKS) for chunk in range(1, _CHUNKS + 1)]


def _completed(job: Job) -> Completed:
    def made(name: str, media_type: str) -> Artifact:
        return Artifact(key=f"{job.id}/1/{name}", media_type=media_type, size_bytes=1_234_567, etag=job.id[6:])

    video = made("video.mp4", "video/mp4").model_copy(update={"manifest": made("manifest.json", "application/json")})
    return Completed(
        artifact=video,
        thumbnail=made("thumbnail.webp", "image/webp"),
        spritesheet=made("spritesheet.jpg", "image/jpeg"),
        timings=Timings(denoise_s=40.0, first_step_s=1.0, decode_s=3.5, delivery_s=0.2, total_s=44.0, device_s=43.5),
    )


async def _time_in_turn(of: Mapping[int, Mapping[str, Call]], calls: int) -> dict[int, dict[str, tuple[float, float]]]:
    """The median milliseconds of each call of each database, and those of this process's processors."""
    found: dict[int, dict[str, tuple[float, float]]] = {count: {} for count in of}
    for name in next(iter(of.values())):
        timed = await _timed([of_one[name] for of_one in of.values()], calls)
        for count, (seconds, cpu_s) in zip(of, timed, strict=True):
            found[count][name] = 1000 * median(seconds), 1000 * median(cpu_s)
    return found


async def _median_ms(call: Call, calls: int) -> float:
    [(seconds, _)] = await _timed([call], calls)
    return 1000 * median(seconds)


async def _timed(some: Sequence[Call], calls: int) -> list[tuple[list[float], list[float]]]:
    """The seconds of each call, and of this process's processors in it: a busy machine changes the first more than the
    second. They take turns."""
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in some]
    for call in some:
        await call()
    for _ in range(calls):
        for call, (seconds, cpu_s) in zip(some, found, strict=True):
            began, cpu_began = time.perf_counter(), time.process_time()
            await call()
            seconds.append(time.perf_counter() - began)
            cpu_s.append(time.process_time() - cpu_began)
    return found


async def _analyze(database: Database) -> None:
    """What PostgreSQL does by itself after a while; SQLite has no such thing."""

    def analyze(connection: Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.execute(text("ANALYZE"))

    await database.write(analyze)


def _show(report: StoreReport, *, is_json: bool) -> None:
    if is_json:
        out.print_json(json.dumps(asdict(report)))
        return
    if report.calls_ms:
        _table("ms a call, finished jobs:", {f"{count:,}": calls for count, calls in report.calls_ms.items()})
        columns = {f"{count:,}": calls for count, calls in report.calls_cpu_ms.items()}
        _table("\nof it in this process, ms:", columns)
    if report.jobs_per_s:
        columns = {
            f"{count:,}": {
                "submit, claim, finish: jobs/s": jobs_per_s,
                "event loop held, ms": report.loop_held_ms[count],
            }
            for count, jobs_per_s in report.jobs_per_s.items()
        }
        _table("\nwaiting jobs:", columns)


def _table(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    table = Table(title, *columns, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{figures[name]:,.2f}" for figures in columns.values()))
    out.print(table)
