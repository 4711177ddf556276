"""Small requests that would fill the disk: one input again and again, and more than a key or the disk has room for."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.hostile.servers import running_server
from tests.hostile.watched import watched

pytestmark = pytest.mark.hostile

_FILM = {"prompt": "a", "size": "256x256", "num_frames": 33, "num_inference_steps": 1}


def _stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _made(client: httpx.Client, **fields: object) -> str:
    answer = client.post("/v1/videos/generations", json=fields).raise_for_status()
    video_id: str = answer.json()["id"]
    return video_id


def test_forty_small_requests_write_their_film_once(tmp_path: Path) -> None:
    """Each is an edit of the same video, in a few bytes, and is cancelled at once. What they wrote goes with them."""
    inputs = tmp_path / "data" / "files" / "inputs"
    settings = {"KINEMA_WORKER_MAX_ACTIVE": "1"}
    with running_server(tmp_path, "--engine", "fake", settings=settings) as server, server.client() as client:
        source = _made(client, **_FILM)
        film_bytes = len(client.get(f"/v1/videos/{source}/content").content)
        # It keeps the worker busy, so that nothing ends before it is cancelled.
        slow = _FILM | {"prompt": "[slow]", "num_inference_steps": 200}
        busy = client.post("/v1/videos", json=slow).raise_for_status().json()["id"]
        with watched(server) as seen:
            ids = []
            for _ in range(40):
                answer = client.post("/v1/videos/edits", json={"prompt": "b", "video": {"id": source}})
                ids.append(answer.raise_for_status().json()["id"])
                assert _stored_bytes(inputs) == film_bytes
            for video_id in [*ids, busy]:
                client.post(f"/v1/videos/{video_id}/cancel").raise_for_status()
            assert _stored_bytes(inputs) == 0
    seen.check(grown_mb=600, wait_s=3)


def test_a_key_that_has_stored_its_share_is_refused(tmp_path: Path) -> None:
    """With a 429 that says what to do, and only that key."""
    settings = {"KINEMA_STORAGE_MAX_GB_PER_KEY": "1e-5", "KINEMA_SERVER_API_KEYS": "one,two"}
    with running_server(tmp_path, "--engine", "fake", settings=settings) as server:
        with server.client(headers={"authorization": "Bearer one"}) as client:
            first = _made(client, prompt="a")
            refused = client.post("/v1/videos", json={"prompt": "b"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
            assert "delete videos" in refused.json()["error"]["message"]
        with server.client(headers={"authorization": "Bearer two"}) as client:
            _made(client, prompt="a")
        with server.client(headers={"authorization": "Bearer one"}) as client:
            client.delete(f"/v1/videos/{first}").raise_for_status()
            _made(client, prompt="b")


def test_a_disk_with_too_little_room_takes_no_new_work(tmp_path: Path) -> None:
    """A 507 at once, while everything else is answered."""
    with (
        running_server(tmp_path, "--engine", "fake", settings={"KINEMA_STORAGE_MIN_FREE_GB": "1e9"}) as server,
        server.client() as client,
    ):
        with watched(server) as seen:
            for path in ("/v1/videos", "/v1/videos/generations"):
                refused = client.post(path, json={"prompt": "a"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        assert client.get("/v1/videos").json()["data"] == []
        assert client.post("/v1/videos/estimate", json={"prompt": "a"}).status_code == 200
    seen.check(grown_mb=50, wait_s=1)
