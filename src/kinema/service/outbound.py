"""Requests to servers that clients name: to public addresses only, and to the very addresses that were checked.

A name is resolved once for each request, every address it has is checked, and the connection goes to one of those; a
name service that answers differently the second time is not asked a second time. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import cache

import httpx

from kinema.errors import InvalidRequest

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_PORTS = {"http": 80, "https": 443}
_MAX_URL_LENGTH = 2048
# The entries of IANA's special-purpose registries that lead nowhere or into somebody's own network, and multicast.
# Python's own tables let some of them pass, and each version other ones: relays of 6to4 and AMT, AS112, and protocol
# assignments, where some clouds have their metadata services. The last one is Azure's metadata service.
_SPECIAL = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "2001::/23",
        "2001:db8::/32",
        "2620:4f:8000::/48",
        "3fff::/20",
        "168.63.129.16/32",
    )
)
# All of IPv6 that is given out to networks; its special parts are above.
_UNICAST = ipaddress.ip_network("2000::/3")
# Behind NAT64 (RFC 6052) the last four bytes are an IPv4 address.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# The host of a URL, as it is asked for: a name after IDNA, or an address. An underscore is common in inner networks.
_NAME = re.compile(r"[a-z0-9_.-]{1,253}")
_PORT = re.compile(r"[0-9]{0,5}")
_RESOLVE_TIMEOUT_S = 5.0


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses that the system knows for the host; none when it knows no such host, or not in time."""
    try:
        async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # TimeoutError is an OSError
        return ()
    return tuple(dict.fromkeys(str(info[4][0]) for info in found))


def is_public(text: str) -> bool:
    """Whether the address is one of the internet's, and not of this machine or its network."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    inner = _embedded(address)
    if inner is not None:
        return is_public(str(inner))
    if address.version == 6 and address not in _UNICAST:
        return False
    return address.is_global and not any(address in network for network in _SPECIAL)


def _embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address to which an IPv6 one leads in the end: mapped, 6to4 or NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def parse_url(text: str) -> httpx.URL:
    """Raises InvalidRequest, in a sentence about ``url``, for what is no plain http or https URL."""
    form = "send one like https://example.com/hook"
    if len(text) > _MAX_URL_LENGTH:
        raise InvalidRequest(f"url is too long; at most {_MAX_URL_LENGTH} characters", param="url")
    try:
        url = httpx.URL(text)
        text.encode()
        has_host = bool(url.host) and _is_host(url.raw_host.decode("ascii"))
    except (
        httpx.InvalidURL,
        ValueError,
    ) as exc:  # IDNA's own errors, among them those of a decoded host, are ValueErrors
        raise InvalidRequest(f"url is not a URL; {form}", param="url") from exc
    if url.userinfo:
        raise InvalidRequest("url must not have a user name or password; a signature says who sends", param="url")
    is_port = _PORT.fullmatch(_port_of(text)) is not None and 0 < (1 if url.port is None else url.port) < 65536
    if url.scheme not in _PORTS or not has_host or not is_port:
        raise InvalidRequest(
            f"url must be http:// or https:// with a host, and a port from 1 to 65535 if any; {form}", param="url"
        )
    return url


def _is_host(raw: str) -> bool:
    if _NAME.fullmatch(raw):
        return True
    try:
        ipaddress.ip_address(raw)
    except ValueError:
        return False
    return "%" not in raw  # the zone of an address has a meaning on one machine alone


def _port_of(text: str) -> str:
    """The port as it is written: httpx reads it with ``int``, which takes signs, spaces and digits of any script."""
    authority = re.split(r"[/?#\\]", text.partition("://")[2], maxsplit=1)[0]
    return authority.rpartition("]")[2].partition(":")[2]


@cache
def _trusted_certificates() -> ssl.SSLContext:
    """httpx's own choice. Reading the certificates takes 30 ms, so all transports of a process share them."""
    return httpx.create_ssl_context()


class PublicTransport(httpx.AsyncBaseTransport):
    """Sends a request to a public address of its host, or to any address where private ones are allowed.

    Host header, TLS server name and certificate check stay those of the name. Raises InvalidRequest for a host that
    has no address to which may be sent, apart from what httpx raises.
    """

    def __init__(self, *, allow_private: bool = False, resolve: Resolve = resolve) -> None:
        self._allow_private = allow_private
        self._resolve = resolve
        # Nothing is kept open: two names on one address would share a connection, and the certificate of one of them.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._inner = httpx.AsyncHTTPTransport(verify=_trusted_certificates(), limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        *others, last = await self.addresses(request.url)
        for address in others:
            try:
                return await self._send(request, address)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._send(request, last)

    async def addresses(self, url: httpx.URL) -> Sequence[str]:
        """At least one. Raises InvalidRequest when there is none, or one of them may not be sent to."""
        found = await self.known_addresses(url)
        if not found or not self.may_send_to(found):
            # One sentence for both: which names the inner network knows is nobody's business.
            wanted = "an address" if self._allow_private else "a public address"
            raise InvalidRequest(
                f"url must lead to {wanted} that the name service knows; its host does not", param="url"
            )
        return found

    async def known_addresses(self, url: httpx.URL) -> Sequence[str]:
        return await self._resolve(url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme])

    def may_send_to(self, addresses: Sequence[str]) -> bool:
        return self._allow_private or all(map(is_public, addresses))

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _send(self, request: httpx.Request, address: str) -> httpx.Response:
        pinned = httpx.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": request.url.raw_host.decode("ascii")},
        )
        return await self._inner.handle_async_request(pinned)
