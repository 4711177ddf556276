"""The names under which this server answers: the ``Host`` of a request has to be one of them.

A page of another site can let its own name point at this machine, and then asks as if it were our own page; the browser
still sends that name. Links in answers have the host of the request too.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.types import Scope

from kinema.server.errors import UnknownHost
from kinema.settings import ServerSettings

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(:\d{0,5})?", re.IGNORECASE | re.ASCII)
_ANY = "*"
_LOOPBACK_NAME = "localhost"


class Hosts:
    """The accepted hosts: those of the settings, the loopback names and the machine's own addresses."""

    def __init__(self, settings: ServerSettings) -> None:
        named = [name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip()]
        own = [settings.host, urlsplit(settings.public_url or "").hostname or ""]
        self._names = {_LOOPBACK_NAME, *(_bare(name) for name in (*named, *own) if name)} - {_ANY}
        self._suffixes = (f".{_LOOPBACK_NAME}", *(name[1:] for name in named if name.startswith("*.")))
        self._is_open = _ANY in named

    def check(self, scope: Scope) -> None:
        """Check the host of a request. Raises UnknownHost.

        A request without one is no browser's, and passes; its links have the address at which it arrived.
        """
        if self._is_open:
            return
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(given) > 1:
            raise UnknownHost("the request has more than one Host; send one")
        if given and not self._is_known(given[0], scope):
            raise UnknownHost(
                f"this server does not answer for the host {given[0][:100]!a}; add it to server.allowed_hosts, or set "
                "server.public_url to the address that clients use"
            )

    def _is_known(self, host: str, scope: Scope) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = _bare(match[1].lower())
        arrived_at, _ = scope.get("server") or ("", None)
        return name in self._names or name == arrived_at or name.endswith(self._suffixes) or _is_own_address(name)


def _bare(name: str) -> str:
    """Return a name without the dot of its root, or an IPv6 address without its brackets."""
    return name.strip("[]").removesuffix(".")


def _is_own_address(text: str) -> bool:
    """Whether this machine has the address: then a socket can be bound to it."""
    try:
        address = ipaddress.ip_address(text)
        if address.is_multicast:
            return False
        with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as bound:
            bound.bind((str(address), 0))
    except (OSError, ValueError):
        return False
    return True
