"""What rank 0 and each other rank send each other: small JSON objects over a socket that only the two of them have.

The system closes the socket of a process that ends, also of one that is killed, so its end is noticed at once.
"""

from __future__ import annotations

import json
import threading
from multiprocessing.connection import Connection
from typing import Any

from kinema.engines.failures import meaning_of
from kinema.errors import EngineFailed, KinemaError

RankMessage = dict[str, Any]


def error_fields(error: Exception) -> RankMessage:
    """The fields ``code`` and ``message``, from which another rank can raise the error."""
    meaning = meaning_of(error)
    if isinstance(meaning, KinemaError):
        return {"code": meaning.code, "message": meaning.message}
    return {"code": EngineFailed.code, "message": f"{type(error).__name__}: {error}"}


class Channel:
    """One end of the socket. Any thread may send; one thread receives."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def send(self, **fields: object) -> None:
        """Send a message. Raises OSError when the other process has ended."""
        data = json.dumps(fields).encode()
        with self._lock:
            self.connection.send_bytes(data)

    def receive(self) -> RankMessage | None:
        """The next message; None when the other process has ended."""
        try:
            message = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None
        assert isinstance(message, dict)
        return message
