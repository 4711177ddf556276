"""Requests go to the address that was checked, and only to a public one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx
import pytest

from kinema.errors import InvalidRequest
from kinema.service.outbound import PublicTransport, is_public, parse_url, resolve
from tests.receiver import receiving, status

PUBLIC = "93.184.215.14"


class Names:
    """A name service: for each question the next answer, the last one for all that follow."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.31.196.1",
        "192.52.193.1",
        "192.88.99.1",
        "192.175.48.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a00:1",
        "100::1",
        "2001::1",
        "2001:0:7f00:1::1",
        "2001:1::1",
        "2001:2::1",
        "2001:3::1",
        "2001:4:112::1",
        "2001:10::1",
        "2001:20::1",
        "2001:30::1",
        "2001:db8::1",
        "2620:4f:8000::1",
        "::ffff:192.88.99.1",
        "64:ff9b::c058:6301",
        "2002:c058:6301::1",
        "2002:7f00:1::1",
        "2002:a00:1::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "3fff::1",
        "5f00::1",
        "ff02::1",
        "nonsense",
        "",
    ],
)
async def test_special_addresses_are_not_sent_to(address: str) -> None:
    """Whatever the name was, and whatever other addresses it has."""
    assert not is_public(address)
    for found in ([address], [PUBLIC, address], [address, PUBLIC]):
        transport = PublicTransport(resolve=Names(found))
        async with httpx.AsyncClient(transport=transport) as client:
            with pytest.raises(InvalidRequest, match="public address"):
                await client.post("http://example.com/", content=b"x")


@pytest.mark.parametrize(
    "address", [PUBLIC, "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::1"]
)
def test_addresses_of_the_internet_are_sent_to(address: str) -> None:
    """Also those that lead to a public IPv4 address."""
    assert is_public(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0"]
)
async def test_this_machine_has_many_spellings(host: str) -> None:
    """The system's own resolver reads them all as loopback, and so none passes."""
    with pytest.raises(InvalidRequest, match="public address"):
        await PublicTransport().addresses(parse_url(f"http://{host}/"))


async def test_the_address_that_was_checked_is_the_one_connected_to() -> None:
    """A name that is public at registration and loopback at delivery is refused; it is asked for once a request."""
    names = Names([PUBLIC], ["127.0.0.1"])
    transport = PublicTransport(resolve=names)
    async with receiving() as receiver, httpx.AsyncClient(transport=transport) as client:
        url = f"http://example.com:{receiver.port}/"
        assert await transport.addresses(parse_url(url)) == [PUBLIC]
        with pytest.raises(InvalidRequest):
            await client.post(url, content=b"x")
        assert names.asked == [("example.com", receiver.port)] * 2
        assert receiver.received == []


async def test_a_redirect_is_checked_like_any_request() -> None:
    """Even a client that follows one does not get to a private address by it."""

    class OnlyFirst(PublicTransport):
        def may_send_to(self, addresses: Sequence[str]) -> bool:
            return addresses == ["127.0.0.1"] and not receiver.received

    names = Names(["127.0.0.1"])
    async with receiving() as receiver:
        receiver.answer = status(307, f"location: http://127.0.0.1:{receiver.port}/inner")
        async with httpx.AsyncClient(transport=OnlyFirst(resolve=names), follow_redirects=True) as client:
            with pytest.raises(InvalidRequest):
                await client.post(f"http://example.com:{receiver.port}/", content=b"x")
        assert [received.target for received in receiver.received] == ["/"]


async def test_the_host_stays_the_name() -> None:
    """The Host header and the path are the client's, though the connection goes to an address."""
    transport = PublicTransport(allow_private=True, resolve=Names(["127.0.0.1"]))
    async with receiving() as receiver, httpx.AsyncClient(transport=transport) as client:
        answer = await client.post(f"http://bücher.example:{receiver.port}/a?b=1", content=b"x")
        assert answer.status_code == 200
        (received,) = receiver.received
        assert received.headers["host"] == f"xn--bcher-kva.example:{receiver.port}"
        assert received.target == "/a?b=1"


async def test_tls_asks_for_the_name() -> None:
    """Server name indication, and so the certificate, are for the name and not for the address."""
    hello = asyncio.get_running_loop().create_future()

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello.set_result(await reader.read(4096))
        writer.close()

    server = await asyncio.start_server(read, "127.0.0.1", 0)
    transport = PublicTransport(allow_private=True, resolve=Names(["127.0.0.1"]))
    async with server, httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(httpx.HTTPError):
            await client.post(f"https://hooks.example:{server.sockets[0].getsockname()[1]}/", content=b"x")
        assert b"hooks.example" in await hello


async def test_a_second_address_has_its_turn() -> None:
    """When nobody listens at the first."""
    transport = PublicTransport(allow_private=True, resolve=Names(["127.0.0.2", "127.0.0.1"]))
    async with receiving() as receiver, httpx.AsyncClient(transport=transport) as client:
        answer = await client.post(f"http://example.com:{receiver.port}/", content=b"x")
        assert answer.status_code == 200


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 70 + ".com", "a..b"])
async def test_an_unknown_host_has_no_addresses(host: str) -> None:
    """Neither do names that cannot be."""
    assert await resolve(host, 80) == ()
    with pytest.raises(InvalidRequest, match="lead to an address"):
        await PublicTransport(allow_private=True).addresses(parse_url(f"http://{host}/"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "http:// or https://"),
        ("example.com/hook", "http:// or https://"),
        ("//example.com/hook", "http:// or https://"),
        ("ftp://example.com/", "http:// or https://"),
        ("file:///etc/passwd", "http:// or https://"),
        ("unix:///run/x.sock", "http:// or https://"),
        ("http:///hook", "http:// or https://"),
        ("http://example.com:0/", "http:// or https://"),
        ("http://example.com:99999/", "http:// or https://"),
        ("http://example.com:x/", "not a URL"),
        ("http://example.com:\u0663/", "a port from 1 to 65535"),
        ("http://example.com:\u00b2/", "not a URL"),
        ("http://example.com:+80/", "a port from 1 to 65535"),
        ("http://example.com: 80/", "a port from 1 to 65535"),
        ("http://example.com:8_0/", "a port from 1 to 65535"),
        ("http://[::1]:\u0663/", "a port from 1 to 65535"),
        ("http://xn--/", "not a URL"),
        ("http://xn--a/", "not a URL"),
        ("http://xn--999999999/", "not a URL"),
        ("http://" + "xn--a." * 200 + "/", "not a URL"),
        ("http://" + "a" * 300 + "/", "with a host"),
        ("http://exam%70le.com/", "with a host"),
        ("http://a%00b/", "with a host"),
        ("http://[fe80::1%25eth0]/", "with a host"),
        ("http://\u3002/", "not a URL"),
        ("https://:@example.com/", "user name"),
        ("http://exa\nmple.com/", "not a URL"),
        ("http://[::1/", "not a URL"),
        ("http://\ud800.example/", "not a URL"),
        ("https://user:password@example.com/", "user name"),
        ("https://user@example.com/", "user name"),
        ("https://example.com\\@127.0.0.1/", "user name"),
        ("https://example.com/" + "a" * 2048, "at most 2048"),
    ],
)
def test_what_is_no_url_is_refused(text: str, says: str) -> None:
    """In a sentence that shows one."""
    with pytest.raises(InvalidRequest, match=says) as caught:
        parse_url(text)
    assert caught.value.param == "url"
