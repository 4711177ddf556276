"""The parts around the workers: frontends, etcd, PostgreSQL, and storage."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.faults.deployment import Deployment
from tests.faults.recovery import Recoveries
from tests.faults.scene import LONG_DECODING, LONG_DENOISING, SMALL, Scene, scene

pytestmark = pytest.mark.faults

# Longer than the lease that discovery gives a process.
_PAST_THE_LEASE_S = 13.0


def test_a_frontend_is_killed(cluster: Deployment, recoveries: Recoveries) -> None:
    """Clients go on with the other one, also in the middle of a video's events; what the killed one had is made."""
    with scene(cluster, recoveries, "frontend: SIGKILL") as it, ThreadPoolExecutor(1) as threads:
        doomed = cluster.frontends["frontend-0"]
        followed = cluster.clients.create(LONG_DENOISING)
        following = threads.submit(cluster.clients.follow, followed, doomed.wait_until_said("listening")["url"])
        begin(cluster)
        it.strike_all()
        assert doomed.end(signal.SIGKILL) == -signal.SIGKILL
        numbers = following.result()
        assert numbers == list(range(1, len(cluster.ledger.history(followed)) + 1))
        cluster.clients.wait(it.hit)
        cluster.start_frontend(doomed.name)


@pytest.mark.parametrize(
    ("is_wiped", "away_s"),
    [(False, 0.0), (False, _PAST_THE_LEASE_S), (True, 0.0)],
    ids=["restarted", "away-past-the-lease", "wiped"],
)
def test_etcd_is_killed(is_wiped: bool, away_s: float, cluster: Deployment, recoveries: Recoveries) -> None:
    """What runs goes on, and workers and frontends find each other again, whatever etcd has forgotten."""
    fault = "etcd: restarted empty" if is_wiped else f"etcd: away for {away_s:.0f} s"
    with scene(cluster, recoveries, fault) as it:
        begin(cluster)
        it.strike_all()
        cluster.etcd.kill()
        pass_by(away_s)
        cluster.etcd.restart(wiped=is_wiped)
        go_on(cluster, it)
        for worker_id in cluster.worker_ids():
            cluster.wait_until_worker_works(worker_id, SMALL[0])


def test_postgresql_crashes(cluster: Deployment, recoveries: Recoveries) -> None:
    """Workers go on meanwhile, and what they say is written when it is back; clients are told to come again."""
    with scene(cluster, recoveries, "PostgreSQL: crashed, away for 3 s") as it:
        begin(cluster)
        it.strike_all()
        cluster.postgres.stop(signal.SIGQUIT)
        pass_by(3.0)
        cluster.postgres.start()
        go_on(cluster, it)


def test_storage_fails(cluster: Deployment, recoveries: Recoveries) -> None:
    """Videos that are made meanwhile are stored when it is back."""
    with scene(cluster, recoveries, "storage: failing for 10 s") as it:
        begin(cluster)
        it.strike_all()
        with failing_storage(cluster):
            pass_by(10.0)
        go_on(cluster, it)


def begin(cluster: Deployment) -> None:
    """Long videos are being made."""
    for sent in (LONG_DENOISING, LONG_DECODING):
        video_id = cluster.clients.create(sent)
        cluster.ledger.wait_for(video_id, lambda history: any(entry.stage for entry in history), "being made")


def go_on(cluster: Deployment, it: Scene) -> None:
    """It is back: what was accepted is made, and so is what comes now."""
    it.returned()
    cluster.clients.wait([*it.hit, cluster.clients.create(SMALL[0])])


def pass_by(seconds: float) -> None:
    """The time that the fault lasts."""
    threading.Event().wait(seconds)


@contextmanager
def failing_storage(cluster: Deployment) -> Iterator[None]:
    """A file where the folder of all objects should be."""
    bucket, away = cluster.objects / "bucket", cluster.objects / "away"
    bucket.rename(away)
    bucket.touch()
    try:
        yield
    finally:
        bucket.unlink()
        away.rename(bucket)
