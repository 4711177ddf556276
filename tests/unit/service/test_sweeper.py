"""What the sweeper removes, and what it leaves alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from sqlalchemy import delete
from structlog.testing import capture_logs

from kinema.engines.fake import FakeEngine
from kinema.errors import JobNotFound, StorageUnavailable
from kinema.events import Artifact, Cancelled, Completed, Failed, Preview, Progress, Started
from kinema.ids import JobId, new_job_id
from kinema.job import Job, JobStatus
from kinema.jobs.chores import Chore, Chores
from kinema.jobs.identity import Identity
from kinema.jobs.retention import SqlRetention
from kinema.jobs.schema import jobs
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from kinema.request.options import GenerationOptions
from kinema.service.pairing import Pairing
from kinema.service.sweeper import GRACE_S, Sweeper, Sweeping, SweepState
from kinema.settings import RetentionSettings
from kinema.storage import (
    OWNER_KEY,
    Storage,
    StoredJob,
    checkpoint_key,
    image_key,
    input_key,
    temporary_key,
    video_key,
)
from tests.serving import Gate, events_of, has_heard_of_cancel, make_job, serving, until

HOUR_S = 3600.0
KEEP_ONE_HOUR = RetentionSettings(keep_h=1)
OPTIONS = GenerationOptions(prompt="a red circle", size="64x64", num_frames=5, num_inference_steps=2)
FOR_EVER = RetentionSettings(keep_h=float("inf"))

_RUNNING = ["queued", "started", "progress", "preview"]
IDENTITY = Identity("a" * 32, b"secret")


@dataclass
class Clock:
    """The real time, because files are written at it, and as much later as a test says."""

    later_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.later_s


class Flaky(Storage):
    """Storage that can be away, or refuse to delete some jobs' files."""

    is_away = False
    refused: frozenset[str] = frozenset()
    num_deletions = 0

    def list_jobs(self):
        if self.is_away:
            raise StorageUnavailable("cannot list the files: away")
        return super().list_jobs()

    def delete_job(self, job_id):
        self.num_deletions += 1
        if self.is_away or job_id in self.refused:
            raise StorageUnavailable(f"cannot delete the files of {job_id}: away")
        super().delete_job(job_id)

    def delete_input(self, name):
        if name in self.refused:
            raise StorageUnavailable("cannot delete an input: away")
        super().delete_input(name)


@dataclass
class Kept:
    """A store and a storage that are paired, with jobs in them."""

    store: SqlJobStore
    storage: Flaky
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.storage.write_owner(IDENTITY.store_id)

    def sweeper(self, settings: RetentionSettings, chores: Chores | None = None) -> Sweeper:
        return Sweeper(
            SqlRetention(self.store.database),
            self.store.inputs,
            self.storage,
            Pairing(IDENTITY, SqlRetention(self.store.database), self.storage),
            settings,
            self.clock,
            chores,
        )

    async def sweep(self, settings: RetentionSettings = KEEP_ONE_HOUR) -> None:
        await self.sweeper(settings).sweep()

    async def with_input(self, digest: str, num_bytes: int) -> Job:
        """A job that is to be created, with an input that is stored and held for it."""
        job = make_job()
        held = (await self.store.inputs.hold(job.id, "", {digest: num_bytes}))[digest]
        self.storage.put_bytes(input_key(held.name), bytes(num_bytes), "image/png")
        return job.model_copy(update={"request": job.request.model_copy(update={"image_key": input_key(held.name)})})

    async def queued(self, job: Job | None = None) -> Job:
        job = job or make_job()
        await self.store.create(job, limits=QueueLimits())
        self.storage.put_bytes(image_key(job.id), b"image", "image/png")
        return job

    async def running(self, attempt: int = 1, job: Job | None = None) -> Job:
        job = await self.queued(job)
        await self.store.record(job.id, Started(worker_id="w", attempt=attempt))
        return job

    async def completed(self, job: Job | None = None, num_bytes: int = 1000, attempt: int = 1) -> Job:
        job = await self.running(attempt, job)
        artifact = self.storage.put_bytes(video_key(job.id, attempt), bytes(num_bytes), "video/mp4")
        await self.store.record(job.id, Completed(artifact=artifact))
        return job

    def names(self, job: Job) -> set[str]:
        stored = self.storage.list_jobs().get(job.id)
        return set() if stored is None else set(stored.sizes)

    async def is_known(self, job: Job) -> bool:
        try:
            await self.store.get(job.id)
        except JobNotFound:
            return False
        return True


@pytest.fixture(params=["file", "memory"])
async def kept(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kept]:
    store = await SqlJobStore.open("sqlite://")
    yield Kept(store, Flaky(f"{request.param}://{tmp_path}/files"))
    await store.close()


async def test_a_job_past_its_time_goes_with_its_files(kept: Kept) -> None:
    """However it ended, and not a second earlier than it was said; another that ended later stays."""
    old = await kept.completed()
    failed = await kept.running()
    await kept.store.record(failed.id, Failed(code="engine_failed", message="no"))
    cancelled = await kept.queued()
    await kept.store.record(cancelled.id, Cancelled())
    expires_at = KEEP_ONE_HOUR.expires_at((await kept.store.get(old.id)).finished_at)
    assert expires_at is not None
    kept.clock.later_s = expires_at - time.time() - 1
    await kept.sweep()
    assert all([await kept.is_known(job) for job in (old, failed, cancelled)])
    kept.clock.later_s += 2
    await kept.sweep()
    for job in (old, failed, cancelled):
        assert not await kept.is_known(job)
        assert kept.names(job) == set()


async def test_jobs_that_have_not_ended_are_never_touched(kept: Kept) -> None:
    """Whatever their age, and also when the disk is full."""
    waiting, running = await kept.queued(), await kept.running()
    kept.storage.put_bytes(video_key(running.id, 1), b"nearly there", "video/mp4")
    kept.clock.later_s = 1000 * HOUR_S
    with capture_logs() as logs:
        await kept.sweep(RetentionSettings(keep_h=1, max_disk_gb=1e-9))
    assert kept.names(waiting) == {"input.png"}
    assert kept.names(running) == {"input.png", "1.mp4"}
    assert [line["log_level"] for line in logs] == ["warning"]


async def test_for_ever_is_for_ever(kept: Kept) -> None:
    """Neither inf nor no number at all lets anything expire."""
    job = await kept.completed()
    kept.clock.later_s = 1e9
    for settings in (FOR_EVER, RetentionSettings(keep_h=None)):
        await kept.sweep(settings)
        assert settings.expires_at((await kept.store.get(job.id)).finished_at) is None
    assert "1.mp4" in kept.names(job)


async def test_a_job_that_ended_long_ago_keeps_its_last_event(kept: Kept) -> None:
    """And its newest preview. A client that comes later reads the end; one whose connection broke may read on for some
    time. The events of a running job all stay."""
    job, running = await kept.running(), await kept.running()
    for one in (job, running):
        await kept.store.record(
            one.id, Progress(stage="denoise", step=1, total=2), Preview(step=1, total=2, b64_jpeg="")
        )
    await kept.store.record(job.id, Cancelled())
    kept.clock.later_s = GRACE_S - 60
    await kept.sweep()
    assert [event.type for event in await events_of(kept.store, job.id)] == [*_RUNNING, "cancelled"]
    kept.clock.later_s = GRACE_S + 60
    await kept.sweep()
    assert [event.type for event in await events_of(kept.store, job.id)] == ["preview", "cancelled"]
    assert [stored.seq async for stored in kept.store.watch(job.id, after_seq=2)] == [4, 5]
    assert [stored.event.type async for stored in kept.store.watch(running.id, is_following=False)] == _RUNNING


def test_only_what_has_ended_expires() -> None:
    """And then exactly ``keep_h`` hours after its end."""
    assert KEEP_ONE_HOUR.expires_at(None) is None
    assert KEEP_ONE_HOUR.expires_at(1000.0) == 1000.0 + HOUR_S


async def test_files_whose_row_is_gone_go_with_the_next_sweep(kept: Kept) -> None:
    """As after a crash between the two; files that are just being submitted are given time for their row."""
    job = await kept.completed()
    await kept.store.delete(job.id)
    fresh = new_job_id()
    kept.storage.put_bytes(image_key(fresh), b"x", "image/png")
    kept.clock.later_s = GRACE_S - 1
    await kept.sweep()
    assert set(kept.storage.list_jobs()) == {job.id, fresh}
    kept.clock.later_s = GRACE_S + 1
    await kept.sweep()
    assert kept.storage.list_jobs() == {}


async def test_the_oldest_ended_jobs_make_room(kept: Kept) -> None:
    """Only as many as have to go; jobs without files are not worth it."""
    jobs = [await kept.completed(num_bytes=1000) for _ in range(4)]
    empty = await kept.queued()
    await kept.store.record(empty.id, Cancelled())
    kept.storage.delete_job(empty.id)
    # Four videos of 1000 bytes with input images of 5 each: two fit.
    await kept.sweep(RetentionSettings(max_disk_gb=2020e-9))
    assert [await kept.is_known(job) for job in jobs] == [False, False, True, True]
    assert [bool(kept.names(job)) for job in jobs] == [False, False, True, True]
    assert await kept.is_known(empty)


async def test_starred_jobs_stay_where_others_make_room_or_expire(kept: Kept) -> None:
    """With their files; a younger job goes in the place of one."""
    starred, young = [await kept.completed(num_bytes=1000) for _ in range(2)]
    await kept.store.star(starred.id, is_starred=True)
    await kept.sweep(RetentionSettings(max_disk_gb=1100e-9))
    kept.clock.later_s = 7200
    await kept.sweep(RetentionSettings(keep_h=1))
    assert [await kept.is_known(job) for job in (starred, young)] == [True, False]
    assert [bool(kept.names(job)) for job in (starred, young)] == [True, False]


async def test_inputs_take_room_and_go_with_the_last_job_that_uses_them(kept: Kept) -> None:
    """Two old jobs share a film of 5000 bytes and a new one has its own; with the last of the two as much room is made
    that the other videos stay."""
    first, second = await kept.with_input("a" * 64, 5000), await kept.with_input("a" * 64, 5000)
    jobs = [await kept.completed(job) for job in (first, second, await kept.with_input("b" * 64, 3000))]
    plain = await kept.completed()
    # In all 12,020 bytes: each of the jobs has 1000 and 5 in its folder.
    for max_bytes, left in (
        (12020, [True] * 4),
        (12019, [False, True, True, True]),
        (10000, [False, False, True, True]),
    ):
        await kept.sweep(RetentionSettings(max_disk_gb=max_bytes * 1e-9))
        assert [await kept.is_known(job) for job in (*jobs, plain)] == left


async def test_videos_make_room_for_an_input_in_use(kept: Kept) -> None:
    """It stays as long as a job needs it, and what is too much then is said."""
    done = await kept.completed()
    waiting = await kept.with_input("a" * 64, 5000)
    await kept.store.create(waiting, limits=QueueLimits())
    with capture_logs() as logs:
        await kept.sweep(RetentionSettings(max_disk_gb=4000e-9))
    assert [await kept.is_known(job) for job in (done, waiting)] == [False, True]
    assert [line["log_level"] for line in logs] == ["warning", "info"]
    assert [input_key(name) for name in kept.storage.list_inputs()] == [waiting.request.image_key]


async def test_files_of_older_attempts_go_once_the_job_has_ended(kept: Kept) -> None:
    """All of them when it ended without a video; the input stays, and a running job loses nothing."""
    done, running, failed = await kept.running(2), await kept.running(2), await kept.running(2)
    for job in (done, running, failed):
        for name in ("1.webp", "2.webp") if job is failed else ("1.mp4", "1.webp", "2.mp4"):
            kept.storage.put_bytes(f"videos/{job.id}/{name}", b"x", "video/mp4")
    artifact = Artifact(key=video_key(done.id, 2), media_type="video/mp4", size_bytes=1, etag="e")
    await kept.store.record(done.id, Completed(artifact=artifact))
    await kept.store.record(failed.id, Failed(code="worker_lost", message="lost"))
    await kept.sweep(FOR_EVER)
    assert kept.names(done) == {"input.png", "1.mp4", "1.webp", "2.mp4"}
    kept.clock.later_s = GRACE_S + 1
    await kept.sweep(FOR_EVER)
    assert kept.names(done) == {"input.png", "2.mp4"}
    assert kept.names(failed) == {"input.png"}
    assert kept.names(running) == {"input.png", "1.mp4", "1.webp", "2.mp4"}


async def test_old_attempts_do_not_cost_a_job_its_place(kept: Kept) -> None:
    """They go first, and what is left may fit."""
    job = await kept.completed(num_bytes=1000, attempt=2)
    kept.storage.put_bytes(video_key(job.id, 1), bytes(1000), "video/mp4")
    kept.clock.later_s = GRACE_S + 1
    await kept.sweep(RetentionSettings(max_disk_gb=1500e-9))
    assert kept.names(job) == {"input.png", "2.mp4"}


async def test_unfinished_files_of_killed_processes_go(tmp_path: Path) -> None:
    """With the job's end; and a folder that has become empty goes too when it is nobody's."""
    store = await SqlJobStore.open("sqlite://")
    kept = Kept(store, Flaky(f"file://{tmp_path}"))
    job, running = await kept.completed(), await kept.running()
    for each in (job, running):
        (tmp_path / "videos" / each.id / ".1.mp4.0123.part").write_bytes(b"half")
        kept.storage.put_bytes(checkpoint_key(each.id), b"latents", "application/octet-stream")
    empty = tmp_path / "videos" / new_job_id()
    empty.mkdir()
    kept.clock.later_s = GRACE_S + 1
    await kept.sweep(FOR_EVER)
    assert kept.names(job) == {"input.png", "1.mp4"}
    assert kept.names(running) == {"input.png", ".1.mp4.0123.part", "checkpoint"}
    assert not empty.exists()
    await store.close()


async def test_what_is_not_a_jobs_is_not_ours(tmp_path: Path) -> None:
    """Other files in the folder are left alone, however old."""
    store = await SqlJobStore.open("sqlite://")
    kept = Kept(store, Flaky(f"file://{tmp_path}"), Clock(1e9))
    theirs = ("mine.txt", "videos/holiday.mp4", "videos/holidays/beach.mp4")
    for path in theirs:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    await kept.sweep(RetentionSettings(keep_h=1, max_disk_gb=1e-9))
    assert all((tmp_path / path).exists() for path in theirs)
    await store.close()


async def test_while_storage_is_away_no_row_is_deleted(kept: Kept) -> None:
    """It is said in the log once, and when storage is back the sweep goes on by itself."""
    job = await kept.completed()
    kept.clock.later_s = 2 * HOUR_S
    kept.storage.is_away = True
    sweeper = kept.sweeper(RetentionSettings(keep_h=1, sweep_every_s=0.001))
    with capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(StorageUnavailable):
                await sweeper.sweep()
        assert await kept.is_known(job)
        await sweeper.start()
        await until(lambda: [line for line in logs if line["log_level"] == "warning"])
        kept.storage.is_away = False
        await until(lambda: not kept.storage.list_jobs())
        await sweeper.stop()
    assert len([line for line in logs if line["log_level"] == "warning"]) == 1
    assert not await kept.is_known(job)


async def test_files_that_could_not_be_deleted_go_with_the_next_sweep(kept: Kept) -> None:
    """Their rows are gone by then; the files of the other jobs were deleted all the same."""
    stuck, other = await kept.completed(), await kept.completed()
    kept.clock.later_s = 2 * HOUR_S
    kept.storage.refused = frozenset({stuck.id})
    with pytest.raises(StorageUnavailable):
        await kept.sweep()
    assert [await kept.is_known(job) for job in (stuck, other)] == [False, False]
    assert set(kept.storage.list_jobs()) == {stuck.id}
    kept.storage.refused = frozenset()
    await kept.sweep()
    assert kept.storage.list_jobs() == {}


async def test_a_storage_that_refuses_everything_is_not_asked_for_everything(kept: Kept) -> None:
    """A store that answers after a timeout would keep a sweep busy for hours."""
    jobs = [await kept.completed() for _ in range(20)]
    kept.clock.later_s = 2 * HOUR_S
    kept.storage.refused = frozenset(job.id for job in jobs)
    with pytest.raises(StorageUnavailable):
        await kept.sweep()
    assert kept.storage.num_deletions < 10


async def test_two_sweepers_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Both delete the same, nothing else goes and neither fails."""
    store = await SqlJobStore.open(f"sqlite:///{tmp_path}/jobs.db")
    kept = Kept(store, Flaky(f"file://{tmp_path}/files"))
    expired = [await kept.completed() for _ in range(120)]
    orphans = [await kept.completed() for _ in range(40)]
    for job in orphans:
        await store.delete(job.id)
    kept.clock.later_s = 2 * HOUR_S
    running = await kept.running()
    await asyncio.gather(*(kept.sweep() for _ in range(3)))
    assert set(kept.storage.list_jobs()) == {running.id}
    assert not any([await kept.is_known(job) for job in expired])
    await store.close()


async def test_expired_jobs_go_without_a_list_of_all_files(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own files too, and no others; the list is made at the start, and rarely after it."""
    sweeper = kept.sweeper(RetentionSettings(keep_h=1, sweep_every_s=0.001))
    old, num_lists, list_jobs = await kept.completed(), 0, kept.storage.list_jobs

    def listed() -> dict[JobId, StoredJob]:
        nonlocal num_lists
        num_lists += 1
        return list_jobs()

    kept.clock.later_s = 2 * HOUR_S
    await sweeper.expire()
    assert not await kept.is_known(old)
    assert kept.names(old) == set()
    running = await kept.running()
    await sweeper.expire()
    assert kept.names(running) == {"input.png"}
    monkeypatch.setattr(kept.storage, "list_jobs", listed)
    expire, num_expired = sweeper.expire, 0

    async def counted() -> None:
        nonlocal num_expired
        num_expired += 1
        await expire()

    monkeypatch.setattr(sweeper, "expire", counted)
    await sweeper.start()
    await until(lambda: num_expired == 10)
    await sweeper.stop()
    assert num_lists == 1


async def test_one_of_all_servers_lists_the_files(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others know what it found, and expire jobs all the same. After a failed listing another one tries."""
    settings = RetentionSettings(keep_h=1, sweep_every_s=0.001, max_disk_gb=1)
    database = kept.store.database
    sweepers = [kept.sweeper(settings, Chores(database, f"server-{number}")) for number in range(3)]
    num_lists, list_jobs, is_going_on = 0, kept.storage.list_jobs, threading.Event()

    def listed() -> dict[JobId, StoredJob]:
        nonlocal num_lists
        num_lists += 1
        is_going_on.wait(20)
        if num_lists == 1:
            raise StorageUnavailable("away")
        return list_jobs()

    await unknown_videos(kept, 3)
    kept.clock.later_s = 2 * HOUR_S
    old = await kept.completed()
    monkeypatch.setattr(kept.storage, "list_jobs", listed)
    for sweeper in sweepers:
        await sweeper.start()
    await until(lambda: num_lists == 1)
    kept.clock.later_s = 4 * HOUR_S
    await until(lambda: old.id not in list_jobs())
    assert num_lists == 1
    is_going_on.set()
    await until(lambda: all(sweeper.state.num_files == 3 for sweeper in sweepers))
    for sweeper in sweepers:
        await sweeper.stop()


async def test_a_restart_does_not_list_the_files_again(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """When they were listed a moment ago; what was found then is known at once."""
    await unknown_videos(kept, 2)
    for number in range(2):
        chores = Chores(kept.store.database, f"server-{number}")
        sweeper = kept.sweeper(KEEP_ONE_HOUR, chores)
        await sweeper.start()
        async with asyncio.timeout(20):
            while await chores.found(Chore.LISTING) is None or sweeper.state.num_files != 2:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        await sweeper.stop()
        monkeypatch.setattr(kept.storage, "list_jobs", lambda: pytest.fail("listed again"))


async def test_jobs_are_pruned_by_age_and_end(kept: Kept) -> None:
    """With their files, however many; first only counted. Jobs that have not ended stay, and those that are newer."""
    failed, cancelled = await kept.running(), await kept.queued()
    await kept.store.record(failed.id, Failed(code="c", message="m"))
    await kept.store.request_cancel(cancelled.id)
    done = [await kept.completed() for _ in range(203)]
    running, long_ago, now = await kept.running(), time.time() - 60, time.time() + 60
    sweeper = kept.sweeper(FOR_EVER)
    ends = set(JobStatus)
    assert await sweeper.prune(long_ago, ends, removes=True) == {}
    counted = {JobStatus.COMPLETED: 203, JobStatus.FAILED: 1, JobStatus.CANCELLED: 1}
    assert await sweeper.prune(now, ends, removes=False) == counted
    assert await kept.is_known(done[0])
    assert await sweeper.prune(now, {JobStatus.FAILED}, removes=True) == {JobStatus.FAILED: 1}
    assert not await kept.is_known(failed)
    assert await kept.is_known(cancelled)
    assert await sweeper.prune(now, {JobStatus.COMPLETED}, removes=True) == {JobStatus.COMPLETED: 203}
    assert set(kept.storage.list_jobs()) == {running.id, cancelled.id}
    assert await sweeper.prune(now, ends, removes=True) == {JobStatus.CANCELLED: 1}
    assert await kept.is_known(running)


async def test_a_sweeper_sweeps_soon_after_its_start_and_again(kept: Kept) -> None:
    """Until it is stopped."""
    sweeper = kept.sweeper(RetentionSettings(keep_h=1, sweep_every_s=0.001))
    kept.clock.later_s = 2 * HOUR_S
    await sweeper.start()
    for _ in range(2):
        await kept.completed()
        await until(lambda: not kept.storage.list_jobs())
    await sweeper.stop()
    job = await kept.completed()
    await asyncio.gather(*(kept.store.get(job.id) for _ in range(10)))
    assert kept.names(job)


# --- A database that does not know the files ------------------------------------------------------------------------


async def unknown_videos(kept: Kept, count: int, num_bytes: int = 1000) -> list[JobId]:
    """Videos of jobs that the database never had, which were stored long ago."""
    ids = [new_job_id() for _ in range(count)]
    for job_id in ids:
        kept.storage.put_bytes(video_key(job_id, 1), bytes(num_bytes), "video/mp4")
    kept.clock.later_s = 24 * HOUR_S
    return ids


@pytest.mark.parametrize("count", [1, 50])
async def test_videos_that_the_database_never_had_are_kept(kept: Kept, count: int) -> None:
    """Be it one of many, or all that there are. It is told once, and in numbers, until somebody removes them."""
    known = [await kept.completed() for _ in range(60 - count)]
    unknown = await unknown_videos(kept, count)
    sweeper = kept.sweeper(FOR_EVER)
    with capture_logs() as logs:
        for _ in range(3):
            await sweeper.sweep()
    assert set(kept.storage.list_jobs()) == {*unknown, *(job.id for job in known)}
    assert sweeper.state == SweepState(Sweeping.HELD, num_files=count, size_bytes=1000 * count)
    (line,) = logs
    assert (line["log_level"], line["files"], line["bytes"]) == ("warning", count, 1000 * count)
    assert "`kinema storage sweep` lists them" in line["event"]

    found = await sweeper.find_leftovers()
    assert (set(found.unknown), set(found.deleted)) == (set(unknown), set())
    await sweeper.remove(found)
    await sweeper.sweep()
    assert set(kept.storage.list_jobs()) == {job.id for job in known}
    assert sweeper.state == SweepState()


async def test_only_a_few_inputs_of_unknown_jobs_go_by_themselves(kept: Kept) -> None:
    """A refused submission leaves one; many were those of another database's queue. No part of them goes then."""
    for count, is_kept in ((5, False), (6, True)):
        for _ in range(count):
            kept.storage.put_bytes(image_key(new_job_id()), b"image", "image/png")
        kept.clock.later_s = GRACE_S + 1
        sweeper = kept.sweeper(FOR_EVER)
        await sweeper.sweep()
        assert len(kept.storage.list_jobs()) == (count if is_kept else 0)
        assert (sweeper.state.sweeping is Sweeping.HELD) == is_kept


def unknown_inputs(kept: Kept, count: int) -> list[str]:
    """Inputs that the database never had."""
    names = [f"{number:064x}-{number:016x}" for number in range(count)]
    for name in names:
        kept.storage.put_bytes(input_key(name), b"film", "application/octet-stream")
    return names


async def test_a_few_unknown_inputs_go_by_themselves_and_many_are_kept(kept: Kept) -> None:
    """Those of another database's videos are many, or come with a video. None goes while it may still be written."""
    for count, video, is_kept in ((5, [], False), (6, [], True), (1, [new_job_id()], True)):
        kept.clock.later_s = GRACE_S - 1
        names = unknown_inputs(kept, count)
        for job_id in video:
            kept.storage.put_bytes(video_key(job_id, 1), bytes(10), "video/mp4")
        sweeper = kept.sweeper(FOR_EVER)
        await sweeper.sweep()
        assert set(kept.storage.list_inputs()) == {*names}
        assert sweeper.state == SweepState()
        kept.clock.later_s = GRACE_S + 1
        await sweeper.sweep()
        assert set(kept.storage.list_inputs()) == ({*names} if is_kept else set())
        num_files = (count + len(video)) * is_kept
        assert (sweeper.state.sweeping is Sweeping.HELD, sweeper.state.num_files) == (is_kept, num_files)
        await sweeper.remove(await sweeper.find_leftovers())
        assert (kept.storage.list_inputs(), kept.storage.list_jobs()) == ({}, {})


async def test_inputs_of_the_database_stay(kept: Kept) -> None:
    """Those that a job uses, that a submission holds, and that are about to be deleted by somebody else."""
    used, held, dropped = [await kept.with_input(digest * 64, 5) for digest in "abc"]
    await kept.store.inputs.let_go(dropped.id, "")
    await kept.store.create(used, limits=QueueLimits())
    kept.clock.later_s = 24 * HOUR_S
    sweeper = kept.sweeper(FOR_EVER)
    await sweeper.sweep()
    assert {input_key(name) for name in kept.storage.list_inputs()} == {
        job.request.image_key for job in (used, held, dropped)
    }
    assert (await sweeper.find_leftovers()).is_empty


async def test_unfinished_inputs_of_killed_processes_go(tmp_path: Path) -> None:
    """However many they are: no database needs them. Other files there are not ours."""
    store = await SqlJobStore.open("sqlite://")
    kept = Kept(store, Flaky(f"file://{tmp_path}"), Clock(GRACE_S + 1))
    (tmp_path / "inputs").mkdir()
    for number in range(20):
        (tmp_path / "inputs" / f".{'a' * 64}-{'b' * 16}.{number:016x}.part").write_bytes(b"half")
    (tmp_path / "inputs/holiday.png").write_bytes(b"x")
    sweeper = kept.sweeper(FOR_EVER)
    await sweeper.sweep()
    assert [path.name for path in (tmp_path / "inputs").iterdir()] == ["holiday.png"]
    assert sweeper.state == SweepState()
    await store.close()


async def test_an_input_that_cannot_be_deleted_is_tried_again(kept: Kept) -> None:
    """The others go all the same."""
    stuck, *_ = unknown_inputs(kept, 3)
    kept.clock.later_s = GRACE_S + 1
    kept.storage.refused = frozenset({stuck})
    with pytest.raises(StorageUnavailable):
        await kept.sweep()
    assert set(kept.storage.list_inputs()) == {stuck}
    kept.storage.refused = frozenset()
    await kept.sweep()
    assert kept.storage.list_inputs() == {}


async def test_the_uses_of_jobs_that_do_not_exist_end(kept: Kept) -> None:
    """A server of an older version has deleted a job and left them. The input may go then."""
    gone, there = [await kept.with_input(digest * 64, 5) for digest in "ab"]
    for job in (gone, there):
        await kept.store.create(job, limits=QueueLimits())
    await kept.store.database.write(lambda connection: connection.execute(delete(jobs).where(jobs.c.id == gone.id)))
    await kept.sweep()
    assert [input_key(name) for name in await kept.store.inputs.dropped(9)] == [gone.request.image_key]
    assert await kept.store.inputs.stored_bytes("") == 5
    assert kept.store.inputs.has_dropped.is_set()


async def test_the_video_of_a_job_that_then_failed_is_kept(kept: Kept) -> None:
    """It waited in an older copy of the database, from which it was made again, in vain. Its video stays with the files
    beside it until a person removes it, or the job goes."""
    removed, expired = await kept.queued(), await kept.queued()
    for job in (removed, expired):
        for name in ("1.mp4", "1.webp", "2.webp", "checkpoint"):
            kept.storage.put_bytes(f"videos/{job.id}/{name}", b"x", "video/mp4")
        await kept.store.record(job.id, Failed(code="engine_failed", message="no"))
    kept.clock.later_s = GRACE_S + 1
    unknown_inputs(kept, 1)
    sweeper = kept.sweeper(KEEP_ONE_HOUR)
    with capture_logs() as logs:
        for _ in range(2):
            await sweeper.sweep()
    assert kept.names(removed) == kept.names(expired) == {"input.png", "1.mp4", "1.webp"}
    assert sweeper.state == SweepState(Sweeping.HELD, num_files=4, size_bytes=4)
    assert [line["files"] for line in logs if line["log_level"] == "warning"] == [4]
    assert kept.storage.list_inputs() == {}

    found = await sweeper.find_leftovers()
    assert found.failed == {
        job.id: StoredJob({"1.mp4": 1, "1.webp": 1}, found.failed[job.id].modified_at) for job in (removed, expired)
    }
    await sweeper.remove(replace(found, failed={removed.id: found.failed[removed.id]}))
    assert kept.names(removed) == {"input.png"}
    assert await kept.is_known(removed)
    kept.clock.later_s = 2 * HOUR_S
    await sweeper.sweep()
    assert kept.storage.list_jobs() == {}


async def test_a_database_that_is_older_than_its_storage_loses_nothing(tmp_path: Path) -> None:
    """It was restored from a copy: videos that were made since stay, as do those that the copy knows."""
    path = tmp_path / "jobs.db"
    store = await SqlJobStore.open(f"sqlite:///{path}")
    kept = Kept(store, Flaky(f"file://{tmp_path}/files"))
    before, running = await kept.completed(), await kept.running()
    await store.close()
    copy = path.read_bytes()
    kept.store = store = await SqlJobStore.open(f"sqlite:///{path}")
    since = [await kept.completed(), await kept.queued()]
    await store.close()
    path.write_bytes(copy)
    for beside in ("-wal", "-shm"):
        path.with_name(path.name + beside).unlink(missing_ok=True)
    kept.store = store = await SqlJobStore.open(f"sqlite:///{path}")
    kept.clock.later_s = 24 * HOUR_S
    sweeper = kept.sweeper(RetentionSettings(keep_h=None, max_disk_gb=1500e-9))
    await sweeper.sweep()
    assert set(kept.storage.list_jobs()) == {before.id, running.id, *(job.id for job in since)}
    assert "1.mp4" in kept.names(before)
    assert sweeper.state.num_files == 3
    await store.close()


async def test_unknown_videos_push_no_known_one_out(kept: Kept) -> None:
    """The budget is for the videos of the database."""
    known = await kept.completed(num_bytes=1000)
    await unknown_videos(kept, 3)
    await kept.sweep(RetentionSettings(keep_h=None, max_disk_gb=1100e-9))
    assert await kept.is_known(known)
    assert "1.mp4" in kept.names(known)
    await kept.sweep(RetentionSettings(keep_h=None, max_disk_gb=900e-9))
    assert not await kept.is_known(known)


async def test_what_a_sweep_was_stopped_at_goes_with_the_next_one(kept: Kept) -> None:
    """However much it is: the database remembers which jobs it had."""
    expired = [await kept.completed() for _ in range(12)]
    jobs = SqlRetention(kept.store.database)
    assert len(await jobs.forget_ended_before(time.time() + 1, limit=1000)) == len(expired)
    unknown = await unknown_videos(kept, 1)
    await kept.sweep(FOR_EVER)
    assert set(kept.storage.list_jobs()) == set(unknown)


async def test_a_deleted_job_is_remembered_for_a_day_and_as_long_as_it_has_files(kept: Kept) -> None:
    """A worker may store a file late; storage may be away. Files that stay keep no other job remembered."""
    job, *stuck = [await kept.completed() for _ in range(6)]
    for each in (job, *stuck):
        await kept.store.delete(each.id)
    jobs, ids = SqlRetention(kept.store.database), {each.id for each in stuck}
    kept.storage.delete_job(job.id)
    kept.storage.refused = frozenset(ids)
    for later_s, remembered in ((GRACE_S + 1, {job.id, *ids}), (25 * HOUR_S, ids)):
        kept.clock.later_s = later_s
        with pytest.raises(StorageUnavailable):
            await kept.sweep(FOR_EVER)
        assert await jobs.deleted([job.id, *ids, new_job_id()]) == remembered
    kept.storage.refused = frozenset()
    await kept.sweep(FOR_EVER)
    assert kept.storage.list_jobs() == {}
    await kept.sweep(FOR_EVER)
    assert await jobs.deleted([job.id, *ids]) == set()


async def test_videos_for_another_frontend_go_after_their_time(kept: Kept) -> None:
    """A worker has marked them, and no database knows them."""
    job_id = new_job_id()
    kept.storage.put_bytes(temporary_key(job_id), b"", "text/plain")
    kept.storage.put_bytes(video_key(job_id, 1), b"video", "video/mp4")
    await kept.sweep(FOR_EVER)
    assert set(kept.storage.list_jobs()) == {job_id}
    kept.clock.later_s = GRACE_S + 1
    await kept.sweep(FOR_EVER)
    assert kept.storage.list_jobs() == {}


@pytest.mark.parametrize("owner", ["b" * 32, None])
async def test_nothing_goes_while_the_storage_is_not_the_databases(
    kept: Kept, tmp_path: Path, owner: str | None
) -> None:
    """Another one has taken it meanwhile, or the disk is not mounted any more; neither a row nor a file goes."""
    kept = Kept(kept.store, Flaky(f"file://{tmp_path}/mounted"))
    job = await kept.completed()
    kept.clock.later_s = 2 * HOUR_S
    if owner is None:
        kept.storage.delete(OWNER_KEY)
        kept.storage.delete_job(job.id)
    else:
        kept.storage.write_owner(owner)
    sweeper = kept.sweeper(RetentionSettings(keep_h=1, sweep_every_s=0.001))
    with capture_logs() as logs:
        await sweeper.start()
        await until(lambda: sweeper.state.sweeping is Sweeping.STOPPED)
        await sweeper.stop()
    assert await kept.is_known(job)
    assert owner is None or "1.mp4" in kept.names(job)
    assert "storage.url" in logs[0]["reason"]


# --- Deleting through the service ----------------------------------------------------------------------------------


async def test_a_deleted_job_takes_its_files_along() -> None:
    """One that waits and one that is finished."""
    async with serving(is_dispatching=False) as it:
        kept = Kept(it.store, it.storage)  # type: ignore[arg-type]
        waiting, done = await kept.queued(), await kept.completed()
        for job in (waiting, done):
            await it.service.delete(job.id)
            with pytest.raises(JobNotFound):
                await it.service.get(job.id)
        assert it.storage.list_jobs() == {}
        with pytest.raises(JobNotFound):
            await it.service.delete(done.id)


async def test_a_deleted_job_that_runs_is_stopped_and_its_slot_is_free() -> None:
    """Nothing of it is left, and whoever waited for it hears that it is gone."""
    gate = Gate()
    async with serving(FakeEngine(on_output=gate)) as it:
        kept = Kept(it.store, it.storage)  # type: ignore[arg-type]
        job = await kept.queued()
        waiting = asyncio.create_task(it.service.wait(job.id))
        assert await asyncio.to_thread(gate.has_arrived.wait, 20)
        free = it.worker.free_slots
        await it.service.delete(job.id)
        with pytest.raises(JobNotFound):
            await waiting
        await until(lambda: has_heard_of_cancel(it))
        gate.is_open.set()
        await until(lambda: it.worker.free_slots == free + 1 and not it.dispatcher._runs)
        assert it.engine.num_running == 0
        assert it.storage.list_jobs() == {}
        following = await kept.queued()
        assert (await it.service.wait(following.id)).status.is_terminal


async def test_a_file_that_is_stored_after_the_deletion_goes_with_a_later_sweep(monkeypatch) -> None:
    """A worker that is too far to be stopped leaves no orphan for good."""
    async with serving(is_dispatching=False) as it:
        kept = Kept(it.store, it.storage)  # type: ignore[arg-type]
        job = await it.service.submit(OPTIONS)
        put_file = it.storage.put_file

        def late(path: Path, key: str, media_type: str, sha256: Callable[[], str]) -> Artifact:
            asyncio.run_coroutine_threadsafe(it.service.delete(job.id), loop).result(20)
            return put_file(path, key, media_type, sha256)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(it.storage, "put_file", late)
        monkeypatch.setattr(it.worker, "cancel", ignore)
        await it.dispatcher.start()
        await until(lambda: job.id in it.storage.list_jobs() and not it.dispatcher._runs)
        assert not await kept.is_known(job)
        kept.clock.later_s = GRACE_S + 1
        await kept.sweep()
        assert it.storage.list_jobs() == {}


async def test_a_deletion_while_storage_is_away_succeeds(tmp_path: Path) -> None:
    """The client's job is gone; the log says that its files are not yet."""
    storage = Flaky(f"file://{tmp_path}")
    async with serving(is_dispatching=False, storage=storage) as it:
        kept = Kept(it.store, storage)
        job = await kept.completed()
        storage.is_away = True
        with capture_logs() as logs:
            await it.service.delete(job.id)
        assert [line["job_id"] for line in logs] == [job.id]
        assert not await kept.is_known(job)
        storage.is_away = False
        kept.clock.later_s = GRACE_S + 1
        await kept.sweep()
        assert storage.list_jobs() == {}


async def ignore(_job_id: JobId) -> None:
    """A cancel that does not arrive."""
