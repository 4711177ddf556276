"""Requests whose heads, or whatever frames their bodies, have no end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.hostile.raw import ask, connected, head, send, unfinished_head
from tests.hostile.watched import watched
from tests.server_process import Server

pytestmark = pytest.mark.hostile

_BLOCK = b"a" * 65536
_CHUNKED = ("content-type: application/json", "transfer-encoding: chunked")


def _one_header(num_blocks: int) -> Iterator[bytes]:
    yield unfinished_head("GET", "/live") + b"x: "
    for _ in range(num_blocks):
        yield _BLOCK


def _many_headers(num_blocks: int) -> Iterator[bytes]:
    yield unfinished_head("GET", "/live")
    for number in range(num_blocks):
        yield b"".join(b"x-%d-%d: %s\r\n" % (number, line, b"a" * 48) for line in range(1000))


def _url(num_blocks: int) -> Iterator[bytes]:
    yield b"GET /"
    for _ in range(num_blocks):
        yield _BLOCK


def _blank_lines(num_blocks: int) -> Iterator[bytes]:
    for _ in range(num_blocks):
        yield b"\r\n" * 32768


def _extension(num_blocks: int) -> Iterator[bytes]:
    yield head("POST", "/v1/videos", *_CHUNKED) + b"2;a="
    for _ in range(num_blocks):
        yield _BLOCK


def _trailer(num_blocks: int) -> Iterator[bytes]:
    yield head("POST", "/v1/videos", *_CHUNKED) + b"2\r\n{}\r\n0\r\nx: "
    for _ in range(num_blocks):
        yield _BLOCK


def _tiny_chunks(num_blocks: int) -> Iterator[bytes]:
    yield head("POST", "/v1/videos", *_CHUNKED)
    for _ in range(num_blocks):
        yield b"1\r\n \r\n" * 11_000


@pytest.mark.parametrize(
    ("attack", "status"),
    [
        (_one_header, 431),
        (_many_headers, 431),
        (_url, 414),
        (_blank_lines, 431),
        (_extension, 400),
        (_trailer, 400),
        (_tiny_chunks, 400),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_has_no_end_is_refused_at_its_beginning(fake_server: Server, attack, status: int) -> None:
    """Four times 60 MB are hardly read, the answer has the usual shape, and the connection closes."""
    with watched(fake_server) as seen:
        for _ in range(4):
            answer = ask(fake_server, attack(960))
            assert answer is not None
            assert (answer.status, answer.headers["connection"]) == (status, "close")
            assert answer.error["message"]
    seen.check(grown_mb=15, wait_s=1)


@pytest.mark.parametrize("in_pieces_of", [1, 1000, 10**6])
@pytest.mark.parametrize(("extra", "status"), [(0, 200), (1, 431)])
def test_a_head_may_have_64_kib(fake_server: Server, in_pieces_of: int, extra: int, status: int) -> None:
    """To the byte, and in whatever pieces it comes."""
    start = unfinished_head("GET", "/live", "connection: close") + b"x: "
    data = start + b"a" * (65536 - len(start) - len(b"\r\n\r\n") + extra) + b"\r\n\r\n"
    pieces = (data[at : at + in_pieces_of] for at in range(0, len(data), in_pieces_of))
    answer = ask(fake_server, pieces)
    assert answer is not None
    assert answer.status == status


@pytest.mark.parametrize(("count", "status"), [(98, 200), (99, 431)])
def test_a_head_may_have_100_headers(fake_server: Server, count: int, status: int) -> None:
    """Two more are in every one of these."""
    answer = ask(fake_server, head("GET", "/live", "connection: close", *(f"x-{number}: a" for number in range(count))))
    assert answer is not None
    assert answer.status == status


@pytest.mark.parametrize(("length", "status"), [(8192, 404), (8193, 414)])
def test_a_url_may_have_8_kib(fake_server: Server, length: int, status: int) -> None:
    answer = ask(fake_server, head("GET", "/" + "a" * (length - 1), "connection: close"))
    assert answer is not None
    assert answer.status == status


def test_requests_that_are_sent_ahead_are_bounded(fake_server: Server) -> None:
    """Some are answered in order. Then comes one refusal, and the connection closes: the others may be sent again."""
    with watched(fake_server) as seen, connected(fake_server) as connection:
        send(connection, (head("GET", "/live") * 1000 for _ in range(100)))
        received = b""
        with suppress(ConnectionError):
            while data := connection.recv(65536):
                received += data
    statuses = [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", received)]
    assert statuses == [200] * (len(statuses) - 1) + [503]
    assert 2 <= len(statuses) <= 100
    seen.check(grown_mb=15, wait_s=1)


def test_trailers_do_not_become_headers(fake_server: Server) -> None:
    """A header after the body would pass by the checks that looked at the headers before it."""
    data = head("POST", "/v1/videos", *_CHUNKED, "connection: close") + b"2\r\n{}\r\n0\r\nx-request-id: late\r\n\r\n"
    answer = ask(fake_server, data)
    assert answer is not None
    assert answer.status == 400
    assert answer.headers["x-request-id"] != "late"


def test_what_is_no_http_is_told_so_in_the_usual_shape(fake_server: Server) -> None:
    answer = ask(fake_server, b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
    assert answer is not None
    assert (answer.status, answer.error["code"]) == (400, "bad_request")
