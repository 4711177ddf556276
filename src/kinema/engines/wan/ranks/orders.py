"""What rank 0 and each other rank tell each other: small JSON objects over a socket that only the two of them have.

Its end is the end of the other one, however that came: the system closes it for a process that was killed.
"""

from __future__ import annotations

import json
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch

from kinema.errors import EngineFailed, KinemaError, OutOfMemory

Said = dict[str, Any]


def told(error: Exception) -> Said:
    """An error as another rank can raise it: ``code`` and ``message``."""
    if isinstance(error, KinemaError):
        return {"code": error.code, "message": error.message}
    if isinstance(error, torch.OutOfMemoryError):
        return told(OutOfMemory())
    return {"code": EngineFailed.code, "message": f"{type(error).__name__}: {error}"}


class Line:
    """One end. Any thread may say something; one thread listens."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def say(self, **said: object) -> None:
        """Raises OSError when the other one has ended."""
        data = json.dumps(said).encode()
        with self._lock:
            self.connection.send_bytes(data)

    def hear(self) -> Said | None:
        """What the other one says next; None when it has ended."""
        try:
            heard = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None
        assert isinstance(heard, dict)
        return heard
