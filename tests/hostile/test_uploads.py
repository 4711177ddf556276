"""Request bodies that together are more than there is room for."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.hostile.raw import PATIENCE_S, Answer, ask, connected, head, read_answer, send
from tests.hostile.servers import running_server, start_server
from tests.hostile.watched import resident_mb, watched
from tests.hostile.watcher import resident_bytes
from tests.server_process import Server

pytestmark = pytest.mark.hostile

_MB = 1_000_000
_JSON = ("content-type: application/json",)
_FORM = ("content-type: multipart/form-data; boundary=b",)
_PART = b'--b\r\ncontent-disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
_STARTS = {_JSON: b'{"prompt": "a", "input_reference": "', _FORM: _PART}


@pytest.fixture(scope="module")
def narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that holds 100 MB of bodies, of which one client may have half."""
    settings = {"KINEMA_SERVER_MAX_UPLOADS_MB": "100"}
    with running_server(tmp_path_factory.mktemp("narrow"), "--engine", "fake", settings=settings) as server:
        yield server


def _upload(kind: tuple[str, ...], sent: int, told: int) -> Iterator[bytes]:
    """The beginning of a body."""
    yield head("POST", "/v1/videos", *kind, f"content-length: {told}") + _STARTS[kind]
    for _ in range(sent // 65536):
        yield b"A" * 65536


@pytest.mark.parametrize("kind", [_JSON, _FORM], ids=["json", "form"])
def test_bodies_that_do_not_end_take_little_memory(fake_server: Server, kind: tuple[str, ...]) -> None:
    """Forty bodies of which 20 MB have come are 800 MB. They lie in files, in a part of the space, and then nowhere."""
    before_mb = resident_mb(fake_server)
    refused: list[Answer] = []
    with watched(fake_server) as seen, ExitStack() as stack:
        for _ in range(40):
            connection = stack.enter_context(connected(fake_server))
            if send(connection, _upload(kind, 20 * _MB, 30 * _MB)) < 19 * _MB:
                refused += [answer] if (answer := read_answer(connection)) else []
        small = ask(fake_server, _small())
    assert {(answer.status, answer.error["code"]) for answer in refused} <= {(503, "uploads_full")}
    assert small is not None
    assert small.status == 200
    seen.check(grown_mb=130, wait_s=2)
    until = time.monotonic() + PATIENCE_S
    while resident_mb(fake_server) > before_mb + 120:  # of which decoders that start meanwhile have most
        assert time.monotonic() < until, f"{resident_mb(fake_server):.0f} MB after {before_mb:.0f} MB"
        time.sleep(0.1)


@pytest.mark.parametrize("kind", [_JSON, _FORM], ids=["json", "form"])
def test_beyond_the_space_a_body_is_refused_and_its_client_may_come_again(
    narrow_server: Server, kind: tuple[str, ...]
) -> None:
    """With 503 and when to do that; the space is free again when the clients that have it are gone."""
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(narrow_server)) for _ in range(3)]
        for connection in connections:
            send(connection, _upload(kind, 24 * _MB, 30 * _MB))
        refused, _, _ = select.select(connections, [], [], PATIENCE_S)
        answer = read_answer(refused[0])
        assert answer is not None
        assert (answer.status, answer.error["code"]) == (503, "uploads_full")
        assert int(answer.headers["retry-after"]) > 0
    until = time.monotonic() + PATIENCE_S
    while (answer := ask(narrow_server, _whole(kind))) is None or answer.status == 503:
        assert time.monotonic() < until
    assert (answer.status, answer.error["param"]) == (400, "input_reference")


def test_many_large_bodies_are_loaded_in_turns(fake_server: Server) -> None:
    """Twelve whole bodies of 24 MB, all of them at once, are read with the memory of a few, of which nothing stays."""
    before_mb = _own_mb(fake_server)
    with watched(fake_server) as seen, ExitStack() as stack:
        connections = []
        for _ in range(12):
            connections.append(stack.enter_context(connected(fake_server)))
            send(connections[-1], _whole(_JSON))
        answers = [read_answer(connection) for connection in connections]
    assert {answer and answer.status for answer in answers} == {400}
    # 160 to 250 MB in turns; 280 to 310 MB when all are loaded at once.
    seen.check(grown_mb=280, wait_s=2)
    until = time.monotonic() + PATIENCE_S
    while _own_mb(fake_server) > before_mb + 40:
        assert time.monotonic() < until, f"{_own_mb(fake_server):.0f} MB after {before_mb:.0f} MB"
        time.sleep(0.1)


def _own_mb(server: Server) -> float:
    """What the server has without the processes that decode."""
    return resident_bytes(server.process.pid) / _MB


def test_nothing_is_left_of_a_body_when_the_server_is_killed(tmp_path: Path) -> None:
    """Its file has no name, so the system removes it."""
    server = start_server(tmp_path, "--engine", "fake")
    with connected(server) as connection:
        send(connection, _upload(_FORM, 20 * _MB, 30 * _MB))
        held = _files(server)
        server.stop(signal.SIGKILL)
    assert held
    assert all("(deleted)" in path for path in held)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 5 * _MB


def _files(server: Server) -> list[str]:
    """The open files of the server that have megabytes, once there are any."""
    folder, until = Path(f"/proc/{server.process.pid}/fd"), time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if found := [
            os.readlink(file) for file in folder.iterdir() if file.is_file() and file.stat().st_size > 5 * _MB
        ]:
            return found
    return []


def _small() -> bytes:
    body = b'{"prompt": "a", "num_frames": 1, "num_inference_steps": 1, "size": "64x64"}'
    return head("POST", "/v1/videos", *_JSON, f"content-length: {len(body)}") + body


def _whole(kind: tuple[str, ...]) -> Iterator[bytes]:
    """A body that is complete, with a picture that is none."""
    end = (
        b'"}'
        if kind == _JSON
        else b"\r\n" + _PART.replace(b"input_reference", b"prompt").replace(b"; filename", b"; x") + b"a\r\n--b--"
    )
    picture = b"A" * 65536 * (24 * _MB // 65536)
    yield from _upload(kind, 0, len(_STARTS[kind]) + len(picture) + len(end))
    yield picture
    yield end
