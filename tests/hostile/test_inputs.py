"""Pictures and films that ask for far more than they hold, and clients that send many of them."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.hostile import films, watcher
from tests.hostile.raw import connected, head, send
from tests.hostile.servers import running_server
from tests.hostile.watched import watched
from tests.server_process import Server

pytestmark = pytest.mark.hostile

PATIENCE_S = 30.0
BOMBS: dict[str, Callable[[], bytes]] = {
    "stsz": films.stsz_bomb,
    "trun": films.trun_bomb,
    "cmov": films.cmov_bomb,
    "cmov with tables": films.cmov_with_tables,
    "webm": films.webm_bomb,
}
PICTURES: dict[str, Callable[[], bytes]] = {
    "scans": films.scans_jpeg,
    "size": films.huge_png,
}
TEXTS = {b"iCCP": ["input_reference has chunks that are damaged, which were left out: iCCP"], b"zTXt": [], b"iTXt": []}
SMALL = {"prompt": "a red circle", "size": "64x64", "num_frames": "5", "num_inference_steps": "2"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With two keys."""
    settings = {"KINEMA_SERVER_API_KEYS": "alice,bob"}
    with running_server(tmp_path_factory.mktemp("keys"), "--engine", "fake", settings=settings) as started:
        yield started


def headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def send_film(server: Server, data: bytes, key: str = "alice", path: str = "/v1/videos/edits") -> httpx.Response:
    with server.client(headers=headers(key)) as client:
        return client.post(path, data={"prompt": "a blue square"}, files={"video": ("in.mp4", data)})


def send_picture(server: Server, data: bytes, key: str = "alice") -> httpx.Response:
    with server.client(headers=headers(key)) as client:
        return client.post("/v1/videos", data=SMALL, files={"input_reference": ("in.png", data)})


def children(pid: int) -> list[int]:
    """The processes that it has started itself and that have not ended."""
    found = list(watcher.tree(pid))
    grand = {other for child in found[1:] for other in list(watcher.tree(child))[1:]}
    return [child for child in found[1:] if child not in grand and watcher.resident_bytes(child)]


def has_limited_memory(pid: int) -> bool:
    try:
        limits = Path(f"/proc/{pid}/limits").read_text()
    except OSError:
        return False
    return re.search(r"^Max data size +\d", limits, re.MULTILINE) is not None


def decoders(server: Server) -> list[int]:
    """The processes that decode at this moment; another one is kept ready."""
    (forking,) = children(server.process.pid)
    return [pid for pid in children(forking) if has_limited_memory(pid)]


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


@contextmanager
def sent(server: Server, path: str, files: dict[str, tuple[str, bytes]]) -> Iterator[None]:
    """A request of alice's that nobody reads the answer of; its connection ends with the block."""
    form = httpx.Request("POST", server.url, data=SMALL, files=files)
    body = form.read()
    lines = [f"{name}: {form.headers[name]}" for name in ("content-type", "content-length")]
    with connected(server) as connection:
        send(connection, head("POST", path, *lines, "authorization: Bearer alice") + body)
        yield


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_film_that_asks_for_gigabytes_is_refused_at_once(server: Server, bomb: str) -> None:
    """In a sentence, with little memory, and whichever of its tables asks."""
    data = BOMBS[bomb]()
    with watched(server, headers=headers("bob")) as seen:
        answer = send_film(server, data)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "video"
    assert answer.json()["error"]["message"].endswith("or Motion JPEG")
    seen.check(grown_mb=200, wait_s=2)
    assert seen.took_s < 10


@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture_that_asks_for_gigabytes_or_minutes_is_refused_at_once(server: Server, picture: str) -> None:
    """In a sentence, with little memory."""
    data = PICTURES[picture]()
    with watched(server, headers=headers("bob")) as seen:
        answer = send_picture(server, data)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input_reference"
    seen.check(grown_mb=200, wait_s=2)
    assert seen.took_s < 10


@pytest.mark.parametrize("chunk", TEXTS)
def test_a_profile_or_a_text_of_a_gigabyte_is_left_out(server: Server, chunk: bytes) -> None:
    """The picture is read, with little memory."""
    data = films.text_png(chunk)
    with watched(server, headers=headers("bob")) as seen:
        answer = send_picture(server, data)
    assert answer.status_code == 200, answer.text
    assert answer.json()["warnings"] == TEXTS[chunk]
    seen.check(grown_mb=200, wait_s=2)
    assert seen.took_s < 10


def test_a_picture_that_takes_long_is_refused_when_its_time_is_over(server: Server) -> None:
    """A picture of a million empty chunks would take half a minute."""
    data = films.chunks_png()
    with watched(server, headers=headers("bob")) as seen:
        answer = send_picture(server, data)
    assert answer.status_code == 400
    assert "cannot be decoded within 1024 MB of memory and 5 s" in answer.json()["error"]["message"]
    seen.check(grown_mb=700, wait_s=2)
    assert seen.took_s < 20


def test_of_an_animation_one_frame_is_decoded(server: Server) -> None:
    """However many it has."""
    data = films.frames_webp()
    with watched(server, headers=headers("bob")) as seen:
        answer = send_picture(server, data)
    assert answer.status_code == 200
    seen.check(grown_mb=400, wait_s=2)


def test_slow_films_and_pictures_of_one_key_hold_up_no_other_key(server: Server) -> None:
    """Eight of each wait for each other, and one film and two pictures are decoded; another key's picture takes what it
    takes alone. When their clients hang up, the work for them ends."""
    slow = {"video": ("in.mp4", films.slow_film())}
    heavy = {"input_reference": ("in.png", films.chunks_png())}
    took_s = []
    with watched(server, headers=headers("bob")) as seen, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(sent(server, "/v1/videos/extensions", slow))
        wait_for(lambda: len(decoders(server)) == 1)
        for _ in range(8):
            stack.enter_context(sent(server, "/v1/videos", heavy))
        for _ in range(5):
            began = time.monotonic()
            assert send_picture(server, films.plain_png(), "bob").status_code == 200
            took_s.append(time.monotonic() - began)
        wait_for(lambda: len(decoders(server)) == 3)
    wait_for(lambda: not decoders(server))
    assert max(took_s) < 3
    seen.check(grown_mb=1500, wait_s=3)
    assert send_picture(server, films.plain_png(), "alice").status_code == 200


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
def test_a_decoder_that_crashes_costs_its_client_a_sentence(server: Server, how: signal.Signals) -> None:
    """And nobody else anything."""
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(send_film(server, films.slow_film(), path="/v1/videos/extensions"))
    )
    wait_for(lambda: not decoders(server))  # those of the test before have ended
    asking.start()
    wait_for(lambda: decoders(server))
    os.kill(decoders(server)[0], how)
    asking.join(PATIENCE_S)
    assert answers[0].status_code == 400
    assert "video is damaged, or cannot be decoded within" in answers[0].json()["error"]["message"]
    assert send_picture(server, films.plain_png(), "bob").status_code == 200


def test_a_server_that_is_killed_leaves_no_decoder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither the process that forks nor one that decodes."""
    with ExitStack() as stack:
        server = stack.enter_context(running_server(tmp_path_factory.mktemp("killed"), "--engine", "fake"))
        stack.enter_context(sent(server, "/v1/videos/extensions", {"video": ("in.mp4", films.slow_film())}))
        wait_for(lambda: decoders(server))
        left = list(watcher.tree(server.process.pid))
        server.stop(signal.SIGKILL)
    wait_for(lambda: not any(watcher.resident_bytes(pid) for pid in left))
