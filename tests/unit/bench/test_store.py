"""``kinema bench store``."""

from __future__ import annotations

import json

import structlog
from typer.testing import CliRunner

from kinema.bench.filling import fill
from kinema.cli.app import app
from kinema.job import JobStatus
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from tests.serving import events_of, make_job
from tests.unit.jobs.test_sql import COMPLETED


async def test_copies_are_jobs_like_any_other() -> None:
    """With ids and times of their own, in the order of their age, in equal parts to the keys."""
    store = await SqlJobStore.open("sqlite://")
    job = await store.create(make_job(key_id="a"), limits=QueueLimits())
    await store.claim(["fake"], "w", 60)
    await store.record(job.id, COMPLETED, attempt=1)
    await fill(store.database, job.id, first=1, count=6, key_ids=["b", "c"], newest_at=5000.0)
    listed, _ = await store.list_page("c", after=None, limit=10, is_ascending=False)
    assert [one.created_at for one in listed] == [4998.0, 4996.0, 4994.0]
    copy = await store.get(listed[0].id)
    assert copy.status is JobStatus.COMPLETED
    assert copy.request == job.request
    assert await events_of(store, copy.id) == [COMPLETED]
    await store.close()


def test_each_figure_is_told_for_each_number_of_jobs() -> None:
    """As one JSON object for programs."""
    command = ["bench", "store", "--calls", "1", "--workers", "2", "--json"]
    logging = structlog.get_config()
    found = CliRunner().invoke(app, [*command, "--finished", "2", "--finished", "4", "--waiting", "3"])
    structlog.configure(**logging)
    report = json.loads(found.stdout)
    assert list(report["calls_ms"]) == ["2", "4"]
    assert all(ms > 0 for calls in report["calls_ms"].values() for ms in calls.values())
    assert report["jobs_per_s"]["3"] > 0
    assert report["loop_held_ms"]["3"] > 0
