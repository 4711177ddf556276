"""A frontend and its workers as real processes: they find each other, share the work, and leave without losing any."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server_process import Process, Server, start_process, steps_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Dynamo's runtime exists for Linux alone")

QUICK = {"prompt": "waves", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
# The fake engine's word for 0.2 s a step.
SLOW = {"prompt": "waves [slow]", "size": "64x64", "num_frames": 5}
LOST = "an attempt was lost"
ENDING = "ending; another signal gives back what runs"
PATIENCE_S = 60


class Cluster:
    """Processes that find each other by files in one folder; all are stopped at the end."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._num_workers = 0

    def frontend(self) -> Server:
        started, line = self._start("frontend", "frontend", "--port", "0", until="listening")
        return Server(started.process, started.log, started.reader, line["url"])

    def worker(self, model: str = "fake") -> Process:
        self._num_workers += 1
        name = f"worker-{self._num_workers}"
        return self._start(name, "worker", "--engine", "fake", "--model", model, until="serving")[0]

    def _start(self, name: str, *command: str, until: str) -> tuple[Process, dict[str, Any]]:
        options = ("--data-dir", str(self.folder / "data"), "--discovery", "file")
        started, line = start_process(self.folder / f"{name}.log", *command, *options, until=until)
        self._stack.callback(started.stop, signal.SIGKILL)
        return started, line


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("KINEMA_CLUSTER_HOST", "127.0.0.1")
    monkeypatch.setenv("KINEMA_WORKER_MAX_ACTIVE", "1")
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def models(client: httpx.Client) -> set[str]:
    return {model["id"] for model in client.get("/v1/models").raise_for_status().json()["data"]}


def create(client: httpx.Client, **body: object) -> str:
    return client.post("/v1/videos", json=body).raise_for_status().json()["id"]


def status(client: httpx.Client, video_id: str) -> str:
    return client.get(f"/v1/videos/{video_id}").raise_for_status().json()["status"]


def wait_until(client: httpx.Client, video_id: str, wanted: str) -> None:
    until(lambda: status(client, video_id) == wanted)


def check_is_made_once(cluster: Cluster, client: httpx.Client, video_id: str) -> None:
    """One file in storage, and it is what the API gives."""
    wait_until(client, video_id, "completed")
    (stored,) = (cluster.folder / "data" / "files").glob(f"videos/{video_id}/*.mp4")
    assert client.get(f"/v1/videos/{video_id}/content").raise_for_status().content == stored.read_bytes()


def start_on_the_only_worker(client: httpx.Client, **body: object) -> str:
    until(lambda: client.get("/ready").status_code == 200)
    video = create(client, **SLOW, **body)
    wait_until(client, video, "in_progress")
    return video


def test_a_frontend_is_up_before_its_workers(cluster: Cluster) -> None:
    """It answers, is not ready, and has no models; the first worker changes that, and two models share one address."""
    with cluster.frontend().client() as client:
        assert client.get("/live").status_code == 200
        assert client.get("/ready").status_code == 503
        assert models(client) == set()
        cluster.worker("one")
        until(lambda: client.get("/ready").status_code == 200)
        assert models(client) == {"one"}
        second = cluster.worker("two")
        until(lambda: models(client) == {"one", "two"})
        for model in ("one", "two"):
            check_is_made_once(cluster, client, create(client, model=model, **QUICK))
        assert second.stop() == 0
        until(lambda: models(client) == {"one"})


def test_two_workers_share_the_work(cluster: Cluster) -> None:
    """Each runs one video at a time, and none waits while one of them is free."""
    workers = [cluster.worker(), cluster.worker()]
    with cluster.frontend().client() as client:
        until(lambda: client.get("/ready").status_code == 200)
        videos = [create(client, **SLOW, num_inference_steps=15) for _ in range(2)]
        until(lambda: all(status(client, video) == "in_progress" for video in videos))
        for video in videos:
            check_is_made_once(cluster, client, video)
    assert [worker.stop() for worker in workers] == [0, 0]


def test_a_worker_that_is_told_to_end_finishes_first(cluster: Cluster) -> None:
    """And takes no more: what waits is made by another worker."""
    leaving = cluster.worker()
    frontend = cluster.frontend()
    with frontend.client() as client:
        video = start_on_the_only_worker(client, num_inference_steps=15)
        waiting = create(client, **QUICK)
        leaving.process.send_signal(signal.SIGTERM)
        assert leaving.process.wait(timeout=20) == 0
        wait_until(client, video, "completed")
        assert status(client, waiting) == "queued"
        cluster.worker()
        for made in (video, waiting):
            check_is_made_once(cluster, client, made)
    assert frontend.said(LOST) == []


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_worker_that_may_not_finish_gives_back(
    cluster: Cluster, num_signals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its time to drain, or at once at the second signal; that is no loss, and another worker goes on."""
    monkeypatch.setenv("KINEMA_CLUSTER_DRAIN_S", "0.3" if num_signals == 1 else "600")
    leaving = cluster.worker()
    frontend = cluster.frontend()
    with frontend.client() as client:
        video = start_on_the_only_worker(client, num_inference_steps=40)
        cluster.worker()
        for _ in range(num_signals):
            leaving.process.send_signal(signal.SIGTERM)
            until(lambda: len(leaving.said(ENDING)) == 1)
        assert leaving.process.wait(timeout=6) == 0
        check_is_made_once(cluster, client, video)
        steps = list(chain.from_iterable(steps_of(client, video)))
    assert len(steps) == len(set(steps)), "a step was taken twice"
    assert steps[-1] == 40
    assert frontend.said(LOST) == []
    assert len(frontend.said("a job goes back to the queue")) >= 1


def test_what_a_killed_worker_ran_is_made_by_another(cluster: Cluster) -> None:
    """The frontend hears of it at once, long before discovery does."""
    doomed = cluster.worker()
    frontend = cluster.frontend()
    with frontend.client() as client:
        video = start_on_the_only_worker(client, num_inference_steps=25)
        cluster.worker()
        assert doomed.stop(signal.SIGKILL) == -signal.SIGKILL
        check_is_made_once(cluster, client, video)
    assert len(frontend.said(LOST)) == 1


def test_a_cancel_frees_the_worker(cluster: Cluster) -> None:
    """Within a step; the next video is made there."""
    cluster.worker()
    with cluster.frontend().client() as client:
        video = start_on_the_only_worker(client, num_inference_steps=100)
        client.post(f"/v1/videos/{video}/cancel").raise_for_status()
        wait_until(client, video, "failed")
        assert client.get(f"/v1/videos/{video}").json()["error"]["code"] == "cancelled"
        check_is_made_once(cluster, client, create(client, **QUICK))
    assert list((cluster.folder / "data" / "files").glob(f"videos/{video}/*")) == []


def test_a_worker_whose_device_hangs_ends_with_an_error(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whatever started it starts it again."""
    monkeypatch.setenv("KINEMA_WORKER_MAX_STEP_S", "0.01")
    worker = cluster.worker()
    frontend = cluster.frontend()
    with frontend.client() as client:
        video = start_on_the_only_worker(client, num_inference_steps=150)
        assert worker.process.wait(timeout=25) == 1
        until(lambda: frontend.said(LOST))
        assert status(client, video) in ("in_progress", "queued")
    assert "worker.max_step_s" in worker.log.read_text(encoding="utf-8")


def test_a_model_whose_workers_have_left_is_busy_not_unknown(cluster: Cluster) -> None:
    """503 and when to come again, for it may come back; a model that nobody ever served here is a 404."""
    only = cluster.worker("one")
    cluster.worker("two")
    with cluster.frontend().client() as client:
        until(lambda: models(client) == {"one", "two"})
        assert only.stop() == 0
        until(lambda: models(client) == {"two"})
        gone = client.post("/v1/videos", json={"model": "one", **QUICK})
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "no_worker")
        assert int(gone.headers["retry-after"]) > 0
        assert client.post("/v1/videos", json={"model": "three", **QUICK}).status_code == 404


def test_any_frontend_shows_a_video_while_it_is_made(cluster: Cluster) -> None:
    """All viewers get the same bytes, which are not those of the finished file: they waited for the first frame."""
    cluster.worker()
    with cluster.frontend().client() as one, cluster.frontend().client() as other:
        until(lambda: models(one) == models(other) == {"fake"})
        video_id = create(one, **SLOW, num_inference_steps=10)
        with ThreadPoolExecutor(2) as threads:
            watching = [threads.submit(watch, client, video_id) for client in (one, other)]
            answers = [answer.result(PATIENCE_S) for answer in watching]
        assert {answer.headers["content-type"] for answer in answers} == {'video/mp4; codecs="avc1.64000a"'}
        assert len({answer.content for answer in answers}) == 1
        wait_until(one, video_id, "completed")
        assert watch(other, video_id).content == one.get(f"/v1/videos/{video_id}/content").content != answers[0].content


def watch(client: httpx.Client, video_id: str) -> httpx.Response:
    return client.get(f"/v1/videos/{video_id}/content", params={"variant": "live"}).raise_for_status()
