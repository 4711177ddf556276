"""Accepts connections when there is a place for them, a few in each turn of the event loop.

An event loop's own server accepts all that wait in one turn, before one of them is counted: hundreds of file
descriptors at once. Here they wait in the system, where they cost none.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from functools import partial

from kinema.server.connections import Connections, Place
from kinema.server.limits import LimitedProtocol

_AT_ONCE = 4
# The system may allow fewer.
_BACKLOG = 2048
# Until the next look for a place, or for a descriptor when the system has none.
_PAUSE_S = 0.02


class Acceptor:
    """Gives the connections of listening sockets, which it owns, to protocols.

    ``make_protocol`` makes one, with ``is_welcome=False`` for a connection that has no place and has to be refused.
    """

    def __init__(
        self, sockets: Sequence[socket.socket], connections: Connections, make_protocol: Callable[..., LimitedProtocol]
    ) -> None:
        self._sockets = sockets
        self._connections = connections
        self._make_protocol = make_protocol
        self._opening: set[asyncio.Task[object]] = set()
        self._is_closed = False

    def start(self) -> None:
        """Listen. Raises OSError when a socket cannot."""
        for listening in self._sockets:
            listening.setblocking(False)
            listening.listen(_BACKLOG)
        for listening in self._sockets:
            self._watch(listening)

    def close(self) -> None:
        """Accept no more."""
        self._is_closed = True
        for listening in self._sockets:
            asyncio.get_running_loop().remove_reader(listening)
            listening.close()

    def _watch(self, listening: socket.socket) -> None:
        if not self._is_closed:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        """Accept what waits. Whatever a client does to its connection meanwhile is its own loss."""
        for _ in range(_AT_ONCE):
            try:
                accepted, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor, or no memory
                self._pause(listening, self._watch, listening)
                return
            if not self._admit(listening, accepted, address[0]):
                return

    def _admit(self, listening: socket.socket, accepted: socket.socket, address: str) -> bool:
        """Open the connection when it is known whether there is a place. False: nobody else is accepted until then."""
        place = self._connections.make_place(address)
        if place is Place.SOON:
            self._pause(listening, self._admit_late, listening, accepted, address)
            return False
        make = partial(self._make_protocol, is_welcome=place is Place.FREE)
        task = asyncio.get_running_loop().create_task(self._open(accepted, make))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return True

    def _admit_late(self, listening: socket.socket, accepted: socket.socket, address: str) -> None:
        if self._is_closed:
            accepted.close()
        elif self._admit(listening, accepted, address):
            self._watch(listening)

    def _pause(self, listening: socket.socket, then: Callable[..., object], *given: object) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)
        loop.call_later(_PAUSE_S, then, *given)

    async def _open(self, accepted: socket.socket, make: Callable[[], asyncio.BaseProtocol]) -> None:
        try:
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(make, accepted)
        except OSError:
            accepted.close()
