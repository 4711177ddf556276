"""Bodies of requests that are larger than the server takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.raw import ask, head
from tests.hostile.watched import watched
from tests.server_process import Server

pytestmark = pytest.mark.hostile

_BLOCK = b" " * 65536


def _endless(count: int) -> Iterator[bytes]:
    """As many blocks, as chunks of a body that tells no length."""
    yield head("POST", "/v1/videos", "content-type: application/json", "transfer-encoding: chunked")
    for _ in range(count):
        yield b"%x\r\n%s\r\n" % (len(_BLOCK), _BLOCK)


def test_a_body_that_is_larger_than_it_may_be_is_refused_while_it_comes(fake_server: Server) -> None:
    """Four bodies of 256 MiB, whose lengths nobody told, are refused with little more than what is accepted of one."""
    with watched(fake_server) as seen:
        for _ in range(4):
            answer = ask(fake_server, _endless(4096))
            assert answer is None or answer.status == 413
    seen.check(grown_mb=150, wait_s=2)


def test_a_length_that_is_told_is_refused_before_the_body_comes(fake_server: Server) -> None:
    """A client that says what it wants to send hears at once that it is too much."""
    with watched(fake_server) as seen:
        answer = ask(
            fake_server, head("POST", "/v1/videos", "content-type: application/json", f"content-length: {2**40}")
        )
    assert answer is not None
    assert (answer.status, answer.error["code"]) == (413, "payload_too_large")
    seen.check(grown_mb=20, wait_s=1)
