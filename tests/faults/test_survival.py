"""The service in one process: an accepted video is made, though the process is killed or told to end while it works."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server_process import KINEMA, Server, start_server, steps_of

pytestmark = pytest.mark.faults

# The tiny model, for some seconds.
LONG = {"prompt": "a red circle moving right", "size": "64x64", "num_frames": 17, "num_inference_steps": 40, "seed": 3}
QUICK = {"prompt": "waves", "size": "64x64", "num_frames": 5, "num_inference_steps": 2}
# The fake engine's word for 0.2 s a step: five seconds, long enough for 20 more to be accepted meanwhile.
SLOW = {**QUICK, "prompt": "waves [slow]", "num_inference_steps": 25}
NUM_QUEUED = 20
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def _one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that all others wait while one runs."""
    monkeypatch.setenv("KINEMA_WORKER_MAX_ACTIVE", "1")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Stops every server at the end, also after a failure."""
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, folder: Path, *arguments: str, engine: str = "fake") -> Server:
    """The first start is that of a program, as an operator's is; the next one is forked, which saves the imports."""
    program = None if (folder / "serve.log").exists() else KINEMA
    server = start_server(folder, "--engine", engine, *arguments, program=program)
    stack.callback(server.stop, signal.SIGKILL)
    return server


def create(server: Server, *bodies: dict[str, Any]) -> list[str]:
    """The ids of new videos."""
    with server.client() as client, ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda body: client.post("/v1/videos", json=body), bodies))
    return [answer.raise_for_status().json()["id"] for answer in answers]


def wait_until(server: Server, wanted: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """All videos of the server by their ids, once these have that status."""
    deadline = time.monotonic() + PATIENCE_S
    with server.client() as client:
        while True:
            found = videos(client)
            if all(found[one]["status"] == wanted for one in ids):
                return found
            if time.monotonic() > deadline:
                pytest.fail(f"not all are {wanted}: { ({one: found[one]['status'] for one in ids}) }")
            time.sleep(0.05)


def videos(client: httpx.Client) -> dict[str, dict[str, Any]]:
    data = client.get("/v1/videos", params={"limit": 100}).raise_for_status().json()["data"]
    return {video["id"]: video for video in data}


def wait_for_step(server: Server, video_id: str, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    with server.client() as client:
        while not any(step in steps for steps in steps_of(client, video_id)):
            assert time.monotonic() < deadline, f"it did not come to step {step}"
            time.sleep(0.05)


def check_all_are_made_once(server: Server, ids: Sequence[str], files: Path) -> None:
    """Each is completed under its own id, has one file, and that is what its content is; nothing else is there."""
    assert wait_until(server, "completed", ids).keys() == set(ids)
    stored = {path.parent.name: path for path in files.glob("videos/*/*.mp4")}
    assert sorted(path.parent.name for path in files.glob("videos/*/*.mp4")) == sorted(ids)
    with server.client() as client:
        for video_id in ids:
            content = client.get(f"/v1/videos/{video_id}/content").raise_for_status().content
            assert content == stored[video_id].read_bytes()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_killed_server_has_lost_nothing_after_its_restart(
    kind: str, tmp_path: Path, stack: ExitStack, request: pytest.FixtureRequest
) -> None:
    """kill -9 with one video running and 20 queued: the next start makes all 21, under the ids they were given."""
    database = () if kind == "sqlite" else ("--database", request.getfixturevalue("postgres_url"))
    first = start(stack, tmp_path, *database)
    running = create(first, SLOW)
    wait_until(first, "in_progress", running)
    queued = create(first, *[QUICK] * NUM_QUEUED)
    found = wait_until(first, "queued", queued)
    assert found[running[0]]["status"] == "in_progress"
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL

    second = start(stack, tmp_path, *database)
    check_all_are_made_once(second, [*running, *queued], tmp_path / "data" / "files")
    assert second.stop() == 0


def test_the_other_server_finishes_what_a_killed_one_had(tmp_path: Path, stack: ExitStack, postgres_url: str) -> None:
    """Two share a database and a storage; one is killed while both work. Clients find every video at the other."""
    shared = ("--database", postgres_url, "--storage", f"file://{tmp_path / 'files'}")
    doomed, heir = (start(stack, tmp_path / name, *shared) for name in ("doomed", "heir"))
    running = create(doomed, SLOW, SLOW)
    wait_until(heir, "in_progress", running)
    queued = create(heir, *[QUICK] * NUM_QUEUED)
    found = wait_until(heir, "queued", queued)
    assert [found[one]["status"] for one in running] == ["in_progress"] * 2
    assert doomed.stop(signal.SIGKILL) == -signal.SIGKILL

    check_all_are_made_once(heir, [*running, *queued], tmp_path / "files")
    assert heir.stop() == 0


def test_a_killed_server_goes_on_where_it_was(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the middle of a real denoising: the next start takes the steps after the checkpoint, and the film has
    the bytes of one that nothing happened to. Of the checkpoint nothing is left."""
    monkeypatch.setenv("KINEMA_WORKER_CHECKPOINT_S", "0.1")
    files = tmp_path / "data" / "files"
    first = start(stack, tmp_path, engine="wan")
    (lost,) = create(first, LONG)
    wait_for_step(first, lost, 12)
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    assert list(files.glob("videos/*/checkpoint"))

    second = start(stack, tmp_path, engine="wan")
    (undisturbed,) = create(second, LONG)
    check_all_are_made_once(second, [lost, undisturbed], files)
    films = [path.read_bytes() for path in files.glob("videos/*/*.mp4")]
    assert films[0] == films[1]
    with second.client() as client:
        before, after = steps_of(client, lost)
        assert steps_of(client, undisturbed) == [list(range(1, 41))]
    assert after == list(range(after[0], 41))
    assert before[0] == 1
    assert after[0] > 4
    assert second.stop() == 0
    assert not list(files.glob("videos/*/checkpoint"))


def test_a_server_that_is_told_to_end_has_no_step_taken_twice(tmp_path: Path, stack: ExitStack) -> None:
    """The next start goes on behind the last one."""
    first = start(stack, tmp_path)
    (video_id,) = create(first, SLOW)
    wait_for_step(first, video_id, 3)
    assert first.stop() == 0

    second = start(stack, tmp_path)
    check_all_are_made_once(second, [video_id], tmp_path / "data" / "files")
    with second.client() as client:
        before, after = steps_of(client, video_id)
    # The last step before may have ended too late for its event.
    assert after[0] - before[-1] in (1, 2)
    assert after == list(range(after[0], 26))
    assert second.stop() == 0
