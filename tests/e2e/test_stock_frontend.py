"""A worker behind NVIDIA Dynamo's own frontend: its route, its body, its answers, and no server of ours."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest

from kinema.media.images import encode_png
from tests.dynamo_frontend import DynamoFrontend, running_dynamo_frontend
from tests.forked import ForkedProcess, forked_with_log
from tests.unit.worker.tasks import film_of, make_request

PATIENCE_S = 60
NAMESPACE = "stock-test"
# `make_request` of the same values is what it becomes.
SMALL = {
    "model": "fake",
    "prompt": "a red circle",
    "size": "64x64",
    "nvext": {"num_frames": 9, "num_inference_steps": 3, "seed": 7},
}
# Every step takes 0.2 s.
LONG = {**SMALL, "prompt": "[slow]", "nvext": {"num_inference_steps": 200}, "stream": True}
LONG_S = 40
RED = np.full((64, 64, 3), (200, 30, 30), np.uint8)


class Files(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing of it."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's own name
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL under which the folder's files open."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def running_worker(
    folder: Path, discovery: Path, *, model: str = "fake", public_url: str = ""
) -> Iterator[ForkedProcess]:
    """A worker that makes one video at a time and lets one more wait."""
    settings = {
        "KINEMA_ENGINE_NAME": "fake",
        "KINEMA_ENGINE_MODEL": model,
        "KINEMA_WORKER_MAX_ACTIVE": "1",
        "KINEMA_CLUSTER_MAX_WAITING": "1",
        "KINEMA_CLUSTER_DISCOVERY": "file",
        "KINEMA_CLUSTER_FILE_DIR": str(discovery),
        "KINEMA_CLUSTER_NAMESPACE": NAMESPACE,
        "KINEMA_CLUSTER_HOST": "127.0.0.1",
        "KINEMA_CLUSTER_DRAIN_S": "0",
        "KINEMA_STORAGE_URL": f"file://{folder}/files",
    }
    if public_url:
        settings["KINEMA_STORAGE_PUBLIC_URL"] = public_url
    arguments = ("worker", "--data-dir", str(folder))
    worker = forked_with_log(arguments, {**os.environ, **settings}, folder, folder / "worker.log")
    try:
        yield worker
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stock")


@pytest.fixture(scope="module")
def stock(folder: Path) -> Iterator[DynamoFrontend]:
    """The frontend alone, over a discovery that may be empty."""
    with running_dynamo_frontend(folder, folder / "discovery", NAMESPACE) as frontend:
        yield frontend


@pytest.fixture(scope="module")
def with_worker(stock: DynamoFrontend, folder: Path) -> Iterator[DynamoFrontend]:
    """The frontend with a worker whose files have URLs."""
    (folder / "files").mkdir()
    with served(folder / "files") as public_url, running_worker(folder, folder / "discovery", public_url=public_url):
        stock.wait_until(lambda it: "fake" in it.models(), "the model")
        yield stock
    stock.wait_until(lambda it: "fake" not in it.models(), "the model's end")


@pytest.fixture
def client(with_worker: DynamoFrontend) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=with_worker.url, timeout=PATIENCE_S) as client:
        yield client


def create(client: httpx.Client, **changes: object) -> dict[str, Any]:
    answer = client.post("/v1/videos", json=SMALL | changes)
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    assert (video["status"], video["progress"], video["model"], video["object"]) == ("completed", 100, "fake", "video")
    return video


def film(video: dict[str, Any]) -> bytes:
    (data,) = video["data"]
    return base64.b64decode(data["b64_json"], validate=True)


def items(answer: httpx.Response) -> Iterator[Any]:
    """What server-sent events carry, up to [DONE]."""
    for line in answer.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    pytest.fail("the stream broke off")


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / "files").rglob("*") if path.is_file()]


def test_a_video_as_base64(client: httpx.Client, folder: Path) -> None:
    """Of the size, length and rate that were asked for; nothing is kept."""
    before = files(folder)
    body = {"size": "96x64", "response_format": "b64_json", "nvext": {"num_frames": 17, "fps": 12}}
    video = create(client, **body)
    assert video["data"][0]["fps"] == 12
    with av.open(io.BytesIO(film(video))) as opened:
        stream = opened.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (96, 64, 12)
        assert sum(1 for _ in opened.decode(video=0)) == 17
    assert files(folder) == before


@pytest.mark.parametrize("response_format", [{"response_format": "url"}, {}])
def test_a_video_by_url(client: httpx.Client, response_format: dict[str, str]) -> None:
    """The URL opens the same bytes that anybody else gets of this request."""
    (data,) = create(client, **response_format)["data"]
    assert httpx.get(data["url"]).raise_for_status().content == film_of(make_request())


def test_fields_that_the_frontend_does_not_know_are_honoured(client: httpx.Client) -> None:
    """It passes them on, and drops those of its extension alone."""
    unknown = {"negative_prompt": "blur", "flow_shift": 5, "fps": 10}
    video = create(client, **unknown, response_format="b64_json")
    assert film(video) == film_of(make_request(**unknown))


def test_an_image_is_the_first_frame(client: httpx.Client) -> None:
    """As a data: URL."""
    image = "data:image/png;base64," + base64.b64encode(encode_png(RED)).decode()
    video = create(client, input_reference=image, response_format="b64_json")
    with av.open(io.BytesIO(film(video))) as opened:
        first = next(opened.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(first.astype(int) - RED).mean() < 4


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"size": "65x64"}, 400, "both sides must be multiples of 16; the nearest is 64x64"),
        ({"nvext": {"num_frames": 100_000}}, 400, "num_frames must be a whole number from 1 to 257"),
        ({"num_frame": 81}, 400, "unknown field 'num_frame'; did you mean num_frames?"),
        ({"input_reference": "http://127.0.0.1/a.png"}, 400, "nothing is fetched from other servers"),
        ({"output_format": "avi"}, 400, "output_format 'avi' is not made; accepted: mp4, webm, gif"),
        ({"model": "other"}, 404, "Model not found"),
        ({"prompt": "[fail]"}, 500, "Internal server error"),
    ],
)
def test_errors_have_their_status(client: httpx.Client, changes: dict[str, Any], status: int, message: str) -> None:
    """With our words where the frontend lets them through; and the worker goes on."""
    answer = client.post("/v1/videos", json=SMALL | changes)
    assert (answer.status_code, answer.json()["code"]) == (status, status)
    assert message in answer.json()["message"]
    create(client)


def test_a_stream_tells_of_progress_and_ends_with_the_video(client: httpx.Client) -> None:
    """Events of the same shape as the answer."""
    with client.stream("POST", "/v1/videos", json={**SMALL, "stream": True, "response_format": "b64_json"}) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        told = list(items(answer))
    assert [(video["status"], video["progress"]) for video in told] == [
        ("queued", 0),
        *(("in_progress", percent) for percent in (0, 18, 36, 54, 69, 84, 99)),
        ("completed", 100),
    ]
    assert film(told[-1]) == film_of(make_request())


def test_errors_of_a_stream_have_their_words(client: httpx.Client) -> None:
    """A refusal in the frontend's shape; a failed generation as a failed video."""
    with client.stream("POST", "/v1/videos", json={**SMALL, "stream": True, "size": "big"}) as answer:
        (refused,) = items(answer)
    assert refused["error"]["code"] == 400
    assert "size 'big' is not WIDTHxHEIGHT" in refused["error"]["message"]
    with client.stream("POST", "/v1/videos", json={**SMALL, "stream": True, "prompt": "[fail]"}) as answer:
        *_, failed = items(answer)
    assert failed["status"] == "failed"
    assert "the prompt asks for a failure" in failed["error"]


def test_one_waits_and_the_next_is_refused_until_somebody_leaves(client: httpx.Client) -> None:
    """With 429; a client that goes away takes its video along, so the next one is made at once."""
    with ExitStack() as stack:
        running = items(stack.enter_context(client.stream("POST", "/v1/videos", json=LONG)))
        assert next(video for video in running if video["status"] == "in_progress")
        waiting = items(stack.enter_context(client.stream("POST", "/v1/videos", json=LONG)))
        assert next(waiting)["status"] == "queued"
        refused = client.post("/v1/videos", json=SMALL)
        assert (refused.status_code, refused.json()["message"]) == (429, "Rate limit exceeded")
    deadline = time.monotonic() + LONG_S / 2
    while (answer := client.post("/v1/videos", json=SMALL)).status_code == 429:
        assert time.monotonic() < deadline, "nobody heard that the clients left"
        time.sleep(0.01)
    assert answer.status_code == 200


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_ends_is_503(stock: DynamoFrontend, tmp_path: Path, folder: Path, ending: signal.Signals) -> None:
    """Whether it gives its video back or dies with it, another may make it."""
    model = ending.name.lower()
    with running_worker(tmp_path, folder / "discovery", model=model) as worker:
        stock.wait_until(lambda it: model in it.models(), "the model")
        body = LONG | {"model": model}
        with httpx.stream("POST", f"{stock.url}/v1/videos", json=body, timeout=PATIENCE_S) as answer:
            told = items(answer)
            assert next(video for video in told if video["progress"] > 0)["status"] == "in_progress"
            worker.send_signal(ending)
            *_, last = told
        assert last["error"]["code"] == 503
        assert worker.wait(timeout=PATIENCE_S) == (0 if ending is signal.SIGTERM else -ending)
