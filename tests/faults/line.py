"""A line to a server that can be cut, as a network is split: nothing passes then, and neither end is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_CHUNK_BYTES = 64 * 2**10


class Line:
    """Passes on what comes to ``port`` of this machine to another of its ports, and what is answered."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._passes = threading.Event()
        self._passes.set()
        # Both ends of each connection.
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, name="line", daemon=True).start()

    def cut(self) -> None:
        """From now on nothing passes. A connection that is made now hears nothing, like those that are there."""
        self._passes.clear()

    def mend(self) -> None:
        """What was sent meanwhile arrives, as TCP has it, and connections go on."""
        self._passes.set()

    def close(self) -> None:
        """Close all connections."""
        for one in [self._listener, *self._sockets]:
            with suppress(OSError):  # it may be closed already
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._passes.set()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=[near], name="line", daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self._sockets.append(near)
        self._passes.wait()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as far:
            self._sockets.append(far)
            back = threading.Thread(target=self._pass_on, args=[far, near], name="line", daemon=True)
            back.start()
            self._pass_on(near, far)
            back.join()
        near.close()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # one end has gone
            while chunk := source.recv(_CHUNK_BYTES):
                self._passes.wait()
                sink.sendall(chunk)
        self._passes.wait()
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextmanager
def line_to(target: int) -> Iterator[Line]:
    """A line to this port of this machine."""
    line = Line(target)
    try:
        yield line
    finally:
        line.close()
