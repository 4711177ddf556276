"""What measures attacks sees what it should: memory of children, a server that stands still, clients shut out."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.hostile.raw import ask, closed_after_s, connected, half_sent, head, read_answer, send
from tests.hostile.watched import resident_mb, watched
from tests.server_process import Server

pytestmark = pytest.mark.hostile

# Takes 200 MB for a moment, each time that it is told to.
_CHILD = """
import sys
for line in sys.stdin:
    taken = bytearray(200_000_000)
    del taken
    print("taken", flush=True)
"""
_PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_CHILD!r}])"


def _take(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("take\n")
    process.stdin.flush()
    assert process.stdout.readline() == "taken\n"


def test_memory_that_a_child_has_for_a_moment_is_seen(fake_server: Server) -> None:
    """The peak counts what a child took during the attack and gave back; what it took before does not count."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _PARENT], text=True, **pipes) as parent:
        with_child = replace(fake_server, process=parent)
        _take(parent)
        with watched(with_child, is_whole=False) as quiet:
            pass
        with watched(with_child, is_whole=False) as seen:
            _take(parent)
        assert resident_mb(with_child) < 100
        assert parent.stdin is not None
        parent.stdin.close()
    assert quiet.peak_mb < 100
    assert seen.grown_mb > 190
    with pytest.raises(AssertionError, match="at most 150 MB are allowed"):
        seen.check(grown_mb=150, wait_s=60)


def test_a_server_that_stands_still_is_seen_by_the_other_client(fake_server: Server) -> None:
    """A wait counts from the ask to the answer, also when it began before the server stood still."""
    with watched(fake_server) as seen:
        fake_server.process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # for this long nobody is answered: it is the attack, not a wait for something
        fake_server.process.send_signal(signal.SIGCONT)
    assert 0.4 < seen.worst_wait_s < 5
    assert seen.shut_out == []
    with pytest.raises(AssertionError, match=r"at most 0\.3 s are allowed"):
        seen.check(grown_mb=1000, wait_s=0.3)


def test_a_client_that_is_refused_counts_as_shut_out(fake_server: Server) -> None:
    """An answer other than 200 is no answer for the other client."""
    with watched(fake_server, asks=["/live", "/v1/videos/video_0"]) as seen:
        pass
    assert {(wait.path, wait.status) for wait in seen.shut_out} == {("/v1/videos/video_0", 404)}
    with pytest.raises(AssertionError, match="not answered"):
        seen.check(grown_mb=1000, wait_s=60)


def test_open_connections_are_counted(fake_server: Server) -> None:
    """``half_sent`` holds its connections open, and the server's files show them."""
    with half_sent(fake_server, 40, b"GET /live HTTP/1.1\r\n") as connections, watched(fake_server) as seen:
        assert ask(fake_server, head("GET", "/live")) is not None
    assert len(connections) == 40
    assert seen.peak_files > 40


def test_answers_and_closed_connections_are_read(fake_server: Server) -> None:
    """A raw request gets its answer, in whatever pieces it was sent; a connection that the server closes is known."""
    with connected(fake_server) as connection:
        request = head("GET", "/v1/videos/video_0", "connection: close")
        assert send(connection, (request[i : i + 7] for i in range(0, len(request), 7))) == len(request)
        answer = read_answer(connection)
        assert answer is not None
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert closed_after_s(connection) < 5
    with connected(fake_server) as connection, pytest.raises(TimeoutError):
        closed_after_s(connection, 0.05)
