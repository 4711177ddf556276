"""What is said over the pipes between the server and the process that runs the library.

A message is one line of JSON, and then as many bytes as its ``size_bytes`` says, if it says so. It knows neither side.

To the library: ``load`` with ``arguments``; ``generate`` with ``job``, a number, and ``parameters``. From it: ``ready``
with what computes, or ``failed`` with a ``reason``; of a job ``step`` (``index``, counted from 1), ``frames``
(``num_frames`` of them, the shape of the whole ``video``, and the bytes), ``done`` or ``error`` with a ``reason``; and
``lost`` when a worker is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# As the wan engine's decoder gives them: the first alone, then four at a time.
FRAMES_PER_CHUNK = 4


@dataclass(frozen=True, slots=True)
class Message:
    """``said`` is plain data with at least ``kind``."""

    said: Mapping[str, Any]
    content: bytes = b""

    @property
    def kind(self) -> str:
        return str(self.said["kind"])


def encode(kind: str, content: bytes, said: Mapping[str, object]) -> bytes:
    """A message as it goes into a pipe."""
    header: dict[str, object] = {"kind": kind, **said}
    if content:
        header["size_bytes"] = len(content)
    return json.dumps(header).encode() + b"\n" + content


def num_chunks(num_frames: int) -> int:
    """Of a video with so many frames."""
    return 1 + math.ceil((num_frames - 1) / FRAMES_PER_CHUNK)


class Inbox:
    """Puts messages together from the bytes of a pipe, however these are cut."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._header: dict[str, Any] | None = None

    def add(self, data: bytes) -> None:
        self._received += data

    def take(self) -> Message | None:
        """The next message, once all of it is there. Raises ValueError for what is none."""
        if self._header is None:
            end = self._received.find(b"\n")
            if end < 0:
                return None
            self._header = json.loads(self._cut(end + 1))
        size_bytes = int(self._header.get("size_bytes", 0))
        if len(self._received) < size_bytes:
            return None
        header, self._header = self._header, None
        return Message(header, self._cut(size_bytes))

    def _cut(self, size_bytes: int) -> bytes:
        taken = bytes(self._received[:size_bytes])
        del self._received[:size_bytes]
        return taken
