"""The open connections of this process: how many there may be, and which of them gives way to a new one.

A connection is idle while the server waits for its client: for a request, for more of one, or for it to read an answer.
At a limit the connection that has been idle longest is closed for the new one, so that clients who send nothing lock
nobody out. Where none is idle, the new one is refused. Each second every connection is looked at, so no request pays
for a timer. How a connection speaks is not known here.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from kinema.settings import ServerSettings

_LOOK_S = 1.0
# A new connection does not give way before its first bytes have had time to come.
_HEARD_WITHIN_S = 0.05
# Whoever has one address of this network has all of them.
_IPV6_PREFIX = 64


class Connection(Protocol):
    """One of the connections. ``address`` is the client's IP address, None on a socket that has none."""

    address: str | None

    def give_way(self) -> None:
        """Close at once: somebody else needs the place."""

    def look(self, now: float) -> None:
        """Close when a time limit has passed; ``now`` is the event loop's time in seconds."""


@dataclass(slots=True)
class _Group:
    """Connections that share a limit; of each idle one, the longest idle first, until when it does not give way."""

    num_open: int = 0
    idle: OrderedDict[Connection, float] = field(default_factory=OrderedDict)


class Place(Enum):
    """Whether there is a place for a new connection."""

    FREE = auto()
    SOON = auto()
    NONE = auto()


class Connections:
    """All connections of one event loop. ``room`` tells how many there may be, whenever a connection comes."""

    def __init__(self, settings: ServerSettings, room: Callable[[], int]) -> None:
        self.head_s = settings.head_s
        self.stall_s = settings.stall_s
        self._room = room
        self._max = settings.max_connections
        self._max_per_address = settings.max_connections_per_address
        self._proxies = Networks(settings.proxies)
        self._all = _Group()
        self._by_network: dict[str, _Group] = {}
        self._open: dict[Connection, tuple[_Group, ...]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def make_place(self, address: str | None) -> Place:
        """Make place for a new connection from this address. SOON: somebody gives way in a moment, so ask again."""
        max_open = self._room() if self._max is None else min(self._max, self._room())
        if (network := self._network_of(address)) in self._by_network:
            place = self._make_place(self._by_network[network], self._max_per_address or max(max_open // 2, 1))
            if place is not Place.FREE:
                return place
        return self._make_place(self._all, max_open)

    def add(self, connection: Connection, *, is_welcome: bool) -> None:
        """Count a new connection, which is idle. One that is not welcome is the first to give way."""
        network = self._network_of(connection.address)
        own = () if network is None else (self._by_network.setdefault(network, _Group()),)
        self._open[connection] = (*own, self._all)
        now = asyncio.get_running_loop().time()
        for group in self._open[connection]:
            group.num_open += 1
            group.idle[connection] = now + _HEARD_WITHIN_S if is_welcome else now
            group.idle.move_to_end(connection, last=is_welcome)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended, or is ending. It may be unknown."""
        for group in self._open.pop(connection, ()):
            group.num_open -= 1
            group.idle.pop(connection, None)

    def set_idle(self, connection: Connection) -> None:
        """The server waits for this client, from now on."""
        for group in self._open.get(connection, ()):
            group.idle[connection] = 0.0
            group.idle.move_to_end(connection)

    def set_busy(self, connection: Connection) -> None:
        """The client waits for the server."""
        for group in self._open.get(connection, ()):
            group.idle.pop(connection, None)

    def _make_place(self, group: _Group, limit: int) -> Place:
        """Close idle connections until the group is below its limit."""
        now = asyncio.get_running_loop().time()
        while group.num_open >= limit and group.idle:
            oldest, until = next(iter(group.idle.items()))
            if now < until:
                return Place.SOON
            self.remove(oldest)
            oldest.give_way()
        return Place.FREE if group.num_open < limit else Place.NONE

    def _network_of(self, address: str | None) -> str | None:
        """Return by what a client is counted; None for a known proxy, behind which are many."""
        if address is None or address in self._proxies:
            return None
        if ":" not in address:
            return address
        return str(ipaddress.ip_network((address.partition("%")[0], _IPV6_PREFIX), strict=False))

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in list(self._open):
            connection.look(loop.time())
        self._by_network = {network: group for network, group in self._by_network.items() if group.num_open}
        self._timer = loop.call_later(_LOOK_S, self._look) if self._open else None


class Networks:
    """IP addresses and networks, from a text that has them separated by commas. ``address in networks`` asks."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for what is neither an address nor a network."""
        self._networks = [ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip()]

    def __contains__(self, address: str) -> bool:
        if not self._networks:
            return False
        ip = ipaddress.ip_address(address.partition("%")[0])
        return any(ip in network for network in self._networks)
