"""The names under which the server answers."""

from __future__ import annotations

import socket

import httpx
import pytest

from kinema.server.errors import UnknownHost
from kinema.server.hosts import Hosts
from kinema.settings import ServerSettings
from tests.serving import SMALL, serving
from tests.unit.server.test_bad_input import error_of


def is_known(name: str | None, *, arrived_at: str = "192.0.2.7", **settings: str) -> bool:
    headers = [] if name is None else [(b"host", name.encode("latin-1"))]
    try:
        Hosts(ServerSettings(**settings)).check({"headers": headers, "server": (arrived_at, 8000)})
    except UnknownHost:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    [None, "localhost", "LocalHost:8000", "localhost.:80", "a.localhost", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000"],
)
def test_loopback_names_are_ours(host: str | None) -> None:
    """And a request without a host, which no browser sends."""
    assert is_known(host)


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost", "", "a b", "h\xe4"),
        *("localhost:80:80", "localhost@evil.example", "localhost/evil.example", "[::1", "::1", "198.51.100.9", "*"),
        "x" * 300,
    ],
)
def test_other_names_are_not(host: str) -> None:
    assert not is_known(host)


def test_addresses_of_this_machine_are_ours() -> None:
    """The one at which the request arrived, which a container's host may have translated, and all others."""
    assert is_known("192.0.2.7:8000", arrived_at="192.0.2.7")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("0.0.0.0", 0))
        assert is_known(f"0.0.0.0:{own.getsockname()[1]}")


def test_names_of_the_settings_are_ours() -> None:
    assert is_known("videos.example:443", public_url="https://Videos.example/kinema/")
    assert is_known("box", host="box")
    assert is_known("a.lan:8000", allowed_hosts="b.lan, A.lan")
    assert is_known("deep.name.lan", allowed_hosts="*.lan")
    assert not is_known("lan", allowed_hosts="*.lan")
    assert not is_known("evil-lan", allowed_hosts="*.lan")
    assert is_known("anything", allowed_hosts="*")
    assert ServerSettings(allowed_hosts=["a", "b"]).allowed_hosts == "a,b"  # type: ignore[arg-type]


async def test_a_request_for_another_host_reaches_nothing() -> None:
    """The sentence names the setting, and the answer is of the usual shape."""
    async with serving() as it:
        for path in ("/v1/videos", "/v1/videos/generations"):
            answer = await it.client.post(path, json=SMALL, headers={"host": "evil.example"})
            error = error_of(answer, 421)
            assert error["code"] == "unknown_host"
            assert "add it to server.allowed_hosts" in error["message"]
        twice = await it.client.get("/v1/videos", headers=[("host", "test"), ("host", "evil.example")])
        assert error_of(twice, 421)["code"] == "unknown_host"
        assert (await it.client.get("/v1/videos")).json()["data"] == []


async def test_a_link_has_the_host_that_was_called() -> None:
    async with serving(server=ServerSettings(allowed_hosts="videos.lan")) as it:
        for host in ("videos.lan:81", "localhost"):
            answer = await it.client.post("/v1/videos/generations", json=SMALL, headers={"host": host})
            assert httpx.URL(answer.json()["data"][0]["url"]).netloc.decode() == host
