"""The parts around the workers: frontends, etcd, PostgreSQL, and storage."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import compress

import pytest

from tests.faults.deployment import Deployment
from tests.faults.processes import Process, until
from tests.faults.recovery import Recoveries
from tests.faults.scene import LONG_DECODING, LONG_DENOISING, SMALL, Scene, scene

pytestmark = pytest.mark.faults

# Longer than the lease that discovery gives a process.
_PAST_THE_LEASE_S = 13.0
# PostgreSQL ends a transaction whose client is silent for three seconds; the rest is for two busy cores.
_ACCEPTED_S = 8.0


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


def test_a_frontend_freezes_inside_a_transaction(cluster: Deployment, recoveries: Recoveries) -> None:
    """It has the lock of all submissions. The other one accepts videos within seconds, and makes what the frozen one
    had; when that one goes on, it does no harm."""
    with scene(cluster, recoveries, "frontend: SIGSTOP in a transaction") as it:
        begin(cluster)
        with frozen_in_a_submission(cluster) as frozen:
            it.strike_all()
            urls, is_other = cluster.clients.urls, [one is not frozen for one in cluster.frontends.values()]
            cluster.clients.urls = list(compress(urls, is_other))
            began = time.monotonic()
            accepted = cluster.clients.create(SMALL[0])
            accepted_s = time.monotonic() - began
            cluster.clients.wait([accepted, *it.hit])
        it.returned()
        cluster.clients.urls = urls
        cluster.clients.wait([cluster.clients.create(SMALL[0]) for _ in urls])
    assert accepted_s < _ACCEPTED_S
    recoveries.notes.append(f"while a frontend was frozen in a transaction: a video was accepted in {accepted_s:.1f} s")


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


@contextmanager
def frozen_in_a_submission(cluster: Deployment) -> Iterator[Process]:
    """A frontend that is frozen between two statements of a submission; it goes on at the end of this."""
    with ExitStack() as stack:
        submitter = stack.enter_context(cluster.ledger.submitter())
        with cluster.ledger.held_submissions():
            name, _ = until(submitter, "a submission is in its transaction")
            frozen = cluster.frontends[name]
            frozen.send(signal.SIGSTOP)
            stack.callback(frozen.send, signal.SIGCONT)
        until(lambda: submitter() == (name, "idle in transaction"), "it is frozen in there")
        yield frozen


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
