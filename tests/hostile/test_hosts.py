"""Requests from a page of another site whose name points at the server."""

from __future__ import annotations

import pytest

from tests.hostile.raw import ask, head
from tests.server_process import Server

pytestmark = pytest.mark.hostile

_BODY = b'{"prompt": "a rebound red circle", "num_frames": 1, "num_inference_steps": 1, "size": "64x64"}'


def _submit(server: Server, host: str, *headers: str) -> tuple[int, str]:
    told = ("content-type: application/json", f"content-length: {len(_BODY)}", "connection: close", *headers)
    answer = ask(server, head("POST", "/v1/videos", *told, host=host) + _BODY)
    assert answer is not None
    return answer.status, answer.body.decode()


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost@evil.example",
    ],
)
@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["origin: http://evil.example"],
        ["x-forwarded-host: localhost"],
        ["x-forwarded-for: 127.0.0.1", "x-forwarded-proto: https"],
        ["forwarded: for=127.0.0.1;host=localhost;proto=http"],
        ["host: localhost"],
    ],
    ids=" ".join,
)
def test_a_page_that_rebinds_its_name_submits_nothing(fake_server: Server, host: str, headers: list[str]) -> None:
    """Without a key, from the machine's own browser: the name that the page was loaded from is not ours."""
    status, body = _submit(fake_server, host.format(port=fake_server.url.rpartition(":")[2]), *headers)
    assert status == 421
    assert "server.allowed_hosts" in body or "more than one Host" in body
    with fake_server.client() as client:
        listed = client.get("/v1/videos").json()["data"]
    assert not [video for video in listed if video["prompt"] == "a rebound red circle"]


def test_links_have_no_name_of_a_stranger(fake_server: Server) -> None:
    """Forwarded names and schemes are believed from known proxies alone, and there are none."""
    forwarded = [
        "x-forwarded-host: evil.example",
        "x-forwarded-proto: https",
        "forwarded: host=evil.example;proto=https",
    ]
    body = b'{"prompt": "a", "num_frames": 1, "num_inference_steps": 1, "size": "64x64"}'
    told = ["content-type: application/json", f"content-length: {len(body)}", "connection: close"]
    port = fake_server.url.rpartition(":")[2]
    request = head("POST", "/v1/videos/generations", *told, *forwarded, host=f"localhost:{port}") + body
    answer = ask(fake_server, request)
    assert answer is not None
    assert f'"url":"http://localhost:{port}/v1/videos/' in answer.body.decode().replace(" ", "")
    assert b"evil" not in answer.body
