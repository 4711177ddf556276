"""A client that asks for more videos than can be made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.hostile.servers import running_server
from tests.hostile.watched import watched
from tests.server_process import Server

pytestmark = pytest.mark.hostile

_GREEDY, _MODEST = ({"authorization": f"Bearer {key}"} for key in ("greedy", "modest"))
_MAX_QUEUED = 20
_PLACES = 2
_PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two keys, a short queue and two places."""
    settings = {
        "KINEMA_SERVER_API_KEYS": "greedy,modest",
        "KINEMA_JOBS_MAX_QUEUED": str(_MAX_QUEUED),
        "KINEMA_WORKER_MAX_ACTIVE": str(_PLACES),
    }
    with running_server(tmp_path_factory.mktemp("shared"), "--engine", "fake", settings=settings) as server:
        yield server


def _body(steps: int) -> dict[str, Any]:
    """The fake engine takes 0.2 s for each step."""
    return {"prompt": "[slow] waves", "size": "64x64", "num_frames": 5, "num_inference_steps": steps}


def test_one_key_that_fills_the_queue_shuts_out_no_other(shared_server: Server) -> None:
    """It is refused beyond its share. Another key's video is accepted then, is next, and is made before the rest."""
    with watched(shared_server, headers=_MODEST) as seen, shared_server.client() as client:
        answers = [client.post("/v1/videos", json=_body(15), headers=_GREEDY) for _ in range(2 * _MAX_QUEUED)]
        accepted = [answer.json() for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(accepted) <= _MAX_QUEUED // 2 + _PLACES
        assert {answer.status_code for answer in refused} == {429}
        assert "of this key wait already" in refused[-1].json()["error"]["message"]
        assert "retry-after" in refused[-1].headers
        made = [_made(client), _made(client)]
        statuses = [client.get(f"/v1/videos/{video['id']}", headers=_GREEDY).json()["status"] for video in accepted]
        assert made == [1, 1]
        assert statuses.count("queued") >= _MAX_QUEUED // 4
        for video in accepted:
            client.delete(f"/v1/videos/{video['id']}", headers=_GREEDY)
    seen.check(grown_mb=50, wait_s=2)


def _made(client: httpx.Client) -> int:
    """Have a short video of the other key made; the first place in the queue that it was told."""
    answer = client.post("/v1/videos", json=_body(2), headers=_MODEST)
    assert answer.status_code == 200, answer.text
    video, deadline = answer.json(), time.monotonic() + _PATIENCE_S
    position = int(video["queue_position"])
    while video["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, video
        video = client.get(f"/v1/videos/{video['id']}", headers=_MODEST).json()
    assert video["status"] == "completed", video
    return position
