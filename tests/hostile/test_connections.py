"""Connections that are held open, and never get any further."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator

import pytest

from tests.hostile.raw import (
    PATIENCE_S,
    ask,
    closed_after_s,
    connected,
    half_sent,
    head,
    limit_files,
    read_answer,
    send,
)
from tests.hostile.servers import running_server, start_server
from tests.hostile.watched import watched
from tests.hostile.watcher import num_files
from tests.server_process import Server

pytestmark = pytest.mark.hostile

_HALF_HEAD = b"GET /live HTTP/1.1\r\nhost: localhost\r\n"
_HALF_BODY = head("POST", "/v1/videos", "content-type: application/json", "content-length: 1000") + b'{"prompt": "a'
_IDLE = head("GET", "/live")
_UNREAD_BODY = head("GET", "/live", "content-length: 1000")
# 1.6 MB, more than the system keeps for a connection when it is sent several times.
_LARGE_FILE = "/docs/5.35.0/swagger-ui-bundle.js"


@pytest.fixture(scope="module", params=["at its start", "while it runs"])
def limited_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that may open no more than 256 files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_early = request.param == "at its start"
    resource.setrlimit(resource.RLIMIT_NOFILE, (256 if is_early else before[0], before[1]))
    try:
        server = start_server(tmp_path_factory.mktemp("limited"), "--engine", "fake")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    limit_files(server, 256)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def impatient_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits two seconds for whatever its clients have to do."""
    settings = {"KINEMA_SERVER_HEAD_S": "2", "KINEMA_SERVER_STALL_S": "2"}
    with running_server(tmp_path_factory.mktemp("impatient"), "--engine", "fake", settings=settings) as server:
        yield server


@pytest.mark.parametrize("data", [b"", b"G", _HALF_HEAD, _HALF_BODY, _IDLE, _UNREAD_BODY])
def test_half_sent_requests_lock_nobody_out(limited_server: Server, data: bytes) -> None:
    """More of them than the process may open files, all from the address of the client that is to be served."""
    with watched(limited_server) as seen, half_sent(limited_server, 400, data):
        time.sleep(1)  # the time of the attack, in which the other client asks again and again
    seen.check(grown_mb=40, wait_s=2)
    assert seen.peak_files < 230


@pytest.mark.parametrize("num_files", [256, 128])
def test_a_job_of_another_client_is_made_meanwhile(limited_server: Server, num_files: int) -> None:
    """Files for the work of the service are kept back from connections."""
    limit_files(limited_server, num_files)
    body = {"prompt": "a red circle moves right", "size": "256x256", "num_frames": 33, "num_inference_steps": 8}
    with watched(limited_server) as seen, half_sent(limited_server, 300, _HALF_HEAD), limited_server.client() as client:
        videos = [client.post("/v1/videos", json=body).raise_for_status().json()["id"] for _ in range(4)]
        until = time.monotonic() + PATIENCE_S
        for video in videos:
            while (found := client.get(f"/v1/videos/{video}").json())["status"] in ("queued", "in_progress"):
                assert time.monotonic() < until
                time.sleep(0.05)
            assert found["status"] == "completed", found["error"]
            assert client.get(f"/v1/videos/{video}/content").status_code == 200
    seen.check(grown_mb=400, wait_s=2)


@pytest.mark.parametrize(("data", "status"), [(b"", None), (_HALF_HEAD, 408), (b"\r\n", 408), (_HALF_BODY, 408)])
def test_a_request_that_does_not_come_is_not_waited_for(
    impatient_server: Server, data: bytes, status: int | None
) -> None:
    """It is told so, if there is anything of it, and the connection closes."""
    with connected(impatient_server) as connection:
        began = time.monotonic()
        send(connection, data)
        answer = read_answer(connection)
        assert (answer and answer.status) == status
        assert answer is None or answer.error["code"] == "request_timeout"
        closed_after_s(connection, 5)
        assert 1.5 < time.monotonic() - began < 8


@pytest.mark.parametrize("start", [_HALF_HEAD + b"x: ", _HALF_BODY[:-20]])
def test_a_byte_now_and_then_does_not_hold_a_connection(impatient_server: Server, start: bytes) -> None:
    """It is slower than anybody's network."""
    with connected(impatient_server) as connection:
        send(connection, start)
        connection.settimeout(0.2)
        began, answer = time.monotonic(), None
        while answer is None and time.monotonic() - began < 15:
            send(connection, b" ")
            try:
                answer = read_answer(connection)
            except TimeoutError:
                continue
    assert answer is not None
    assert answer.status == 408
    assert time.monotonic() - began < 8


def test_the_rest_of_a_body_that_was_answered_is_not_read_for_ever(impatient_server: Server) -> None:
    """A client that goes on sending a body that was refused is cut off."""
    with connected(impatient_server) as connection:
        send(connection, head("POST", "/v1/videos", "content-type: text/plain", "content-length: 100000000"))
        answer = read_answer(connection)
        assert answer is not None
        assert answer.status == 415
        began = time.monotonic()
        while time.monotonic() - began < 15 and send(connection, b" "):
            time.sleep(0.1)  # the pace of the attack
        assert time.monotonic() - began < 10


def test_answers_that_nobody_reads_are_not_kept(impatient_server: Server) -> None:
    """A client asks for megabytes and reads none of them."""
    before = num_files(impatient_server.process.pid)
    with watched(impatient_server) as seen, half_sent(impatient_server, 20, head("GET", _LARGE_FILE) * 16):
        until = time.monotonic() + 20
        for is_held in (True, False):
            while (num_files(impatient_server.process.pid) > before + 10) != is_held:
                assert time.monotonic() < until
                time.sleep(0.05)
    seen.check(grown_mb=150, wait_s=2)


def test_a_slow_reader_gets_everything(impatient_server: Server) -> None:
    """As long as it reads faster than the slowest that is allowed, also for several times what the server waits."""
    with connected(impatient_server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        send(connection, head("GET", _LARGE_FILE, "connection: close"))
        received, began = 0, time.monotonic()
        while time.monotonic() - began < 8:
            data = connection.recv(4096)
            received += len(data)
            assert data
            time.sleep(0.02)  # the pace of this client
        assert received < 1_500_000  # most is still to come, and was waited for
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 2**20)
        while data := connection.recv(65536):
            received += len(data)
    assert received > 1_500_000


def test_too_many_connections_at_work_are_refused_in_the_usual_shape(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where nobody can give way, because the server itself works for all of them."""
    settings = {"KINEMA_SERVER_MAX_CONNECTIONS": "6", "KINEMA_SERVER_MAX_CONNECTIONS_PER_ADDRESS": "4"}
    slow = b'{"prompt": "a [slow]", "num_inference_steps": 50}'
    call = (
        head("POST", "/v1/videos/generations", "content-type: application/json", f"content-length: {len(slow)}") + slow
    )
    with running_server(tmp_path_factory.mktemp("full"), "--engine", "fake", settings=settings) as server:
        with half_sent(server, 4, call):
            until = time.monotonic() + PATIENCE_S
            while (answer := ask(server, head("GET", "/live", "connection: close"))) is None or answer.status == 200:
                assert time.monotonic() < until
        assert answer is not None
        assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
        assert int(answer.headers["retry-after"]) > 0
        while (answer := ask(server, head("GET", "/live", "connection: close"))) is None or answer.status != 200:
            assert time.monotonic() < until
