"""Four kinds of models of the engine diffusers on one cluster, a worker each: what Wan has there, each of them has."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.processes import until
from tests.forked import ForkedProcess, run_with_log
from tests.server_process import start_process, steps_of

pytestmark = pytest.mark.faults

# Three sizes of tokens and a UNet, and one with sound. A step takes some hundredths of a second beside three others.
LONG = {
    "LTX-Video": {"size": "384x384", "num_frames": 33},
    "LTX-2": {"size": "256x256", "num_frames": 17},
    "AnimateDiff": {"size": "96x96", "num_frames": 16},
    "Wan": {"size": "128x128", "num_frames": 17},
}
PREVIEW = {"size": "64x64", "num_frames": 9, "num_inference_steps": 2, "priority": "high"}
# The first to have its preview.
KILLED = next(iter(LONG))
STEPS = 200
PATIENCE_S = 120


class Workers:
    """Processes of ``kinema worker``, each forked from one that has imported diffusers and made the models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pipe, its = Pipe()
        self._source = ForkedProcess(_fork_workers, folder, its)
        its.close()
        assert self._pipe.recv() == "made"

    def start(self, model: str) -> int:
        """The number of a process that serves this model, once it does so."""
        log = self.folder / f"{model}.log"
        begun = log.stat().st_size if log.exists() else 0
        options = ("--data-dir", str(self.folder / "data"), "--discovery", "file")
        arguments = ("worker", "--engine", "diffusers", "--model", str(self.folder / model), "--device", "cpu")
        self._pipe.send(((*arguments, *options), dict(os.environ), self.folder, log))
        pid: int = self._pipe.recv()
        until(lambda: log.exists() and b'"event": "serving"' in log.read_bytes()[begun:], f"{model} is served")
        return pid

    def end(self) -> None:
        """All of them, as an operator does."""
        self._pipe.send(None)
        self._source.wait(PATIENCE_S)


def _fork_workers(folder: Path, pipe: Connection) -> None:
    """In the new process."""
    import torch

    torch.set_num_threads(1)
    from tests.dummies.pipelines import make

    for name in LONG:
        make(name).save_pretrained(folder / name)
    pipe.send("made")
    pids = []
    while (command := pipe.recv()) is not None:
        pid = os.fork()
        if pid == 0:
            run_with_log(*command)
        pids.append(pid)
        pipe.send(pid)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    for pid in pids:
        os.waitpid(pid, 0)


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    settings = {"KINEMA_CLUSTER_HOST": "127.0.0.1", "KINEMA_WORKER_MAX_ACTIVE": "2", "KINEMA_LOG_FORMAT": "json"}
    for name, value in {**settings, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        monkeypatch.setenv(name, value)
    started = Workers(tmp_path)
    yield started
    started.end()


def create(client: httpx.Client, **body: object) -> str:
    answer = client.post("/v1/videos", json={"prompt": "a cat", "seed": 1, "guidance_scale": 1.0, **body})
    return answer.raise_for_status().json()["id"]


def video(client: httpx.Client, video_id: str) -> dict[str, Any]:
    return client.get(f"/v1/videos/{video_id}").raise_for_status().json()


def has_steps(client: httpx.Client, video_id: str) -> bool:
    """Whether its latest attempt has taken any."""
    attempts = steps_of(client, video_id)
    return bool(attempts and attempts[-1])


def test_four_families_share_a_cluster(workers: Workers) -> None:
    """Previews overtake long videos, which know their ends; a cancelled one leaves the device at once; one whose worker
    was killed begins again."""
    with ExitStack() as stack:
        options = ("--data-dir", str(workers.folder / "data"), "--discovery", "file")
        frontend, line = start_process(workers.folder / "f.log", "frontend", "--port", "0", *options, until="listening")
        stack.callback(frontend.stop)
        client = stack.enter_context(httpx.Client(base_url=line["url"], timeout=PATIENCE_S))
        pids = {model: workers.start(model) for model in LONG}
        until(lambda: len(client.get("/v1/models").json()["data"]) == len(LONG), "the frontend knows all models")

        def previews() -> None:
            """One of each model, in their order."""
            for video_id in [create(client, model=model, **PREVIEW) for model in LONG]:
                until(lambda video_id=video_id: video(client, video_id)["status"] == "completed", f"{video_id} is made")

        previews()  # how long others take is known from then on
        long = {
            model: create(client, model=model, priority="low", num_inference_steps=STEPS, **shape)
            for model, shape in LONG.items()
        }
        for video_id in long.values():
            until(lambda video_id=video_id: has_steps(client, video_id), f"{video_id} takes steps")
            assert video(client, video_id)["eta_s"] > 0
        previews()
        assert {video(client, one)["status"] for one in long.values()} == {"in_progress"}

        os.kill(pids[KILLED], signal.SIGKILL)
        cancelled = [video_id for model, video_id in long.items() if model != KILLED]
        for video_id in cancelled:
            client.post(f"/v1/videos/{video_id}/cancel").raise_for_status()
        workers.start(KILLED)
        for video_id in cancelled:
            assert video(client, video_id)["error"]["code"] == "cancelled"
            assert len(steps_of(client, video_id)[0]) < STEPS

        begins_again = long[KILLED]
        until(lambda: video(client, begins_again)["status"] == "completed", "it is made in the end")
        first, *_, last = steps_of(client, begins_again)
        assert (first[0], last[0], last[-1]) == (1, 1, STEPS)
        assert first[-1] < STEPS
        assert client.get(f"/v1/videos/{begins_again}/content").content
