"""The messages in the pipes between the server and the process that runs the library.

A message is one line of JSON, followed by as many bytes as its field ``size_bytes`` says, if it has one.

To the library: ``load`` with ``arguments``; ``generate`` with the ``number`` of a video and ``parameters``. From it:
``ready`` with its device, types and versions, or ``failed`` with a ``reason``; with the ``number`` of a video ``step``
(``index``, counted from 1), ``frames`` (``num_frames`` of them, the whole video's ``shape``, and the bytes), ``done``,
or ``error`` with a ``reason``; and ``lost`` with a ``reason`` when a worker has ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The wan engine's decoder yields frames like that: the first alone, then four at a time.
FRAMES_PER_CHUNK = 4


@dataclass(frozen=True, slots=True)
class Message:
    """``fields`` is plain data with at least ``kind``; ``content`` are the bytes behind it."""

    fields: Mapping[str, Any]
    content: bytes = b""

    @property
    def kind(self) -> str:
        return str(self.fields["kind"])


def encode(kind: str, content: bytes, fields: Mapping[str, object]) -> bytes:
    """The bytes of a message."""
    header: dict[str, object] = {"kind": kind, **fields}
    if content:
        header["size_bytes"] = len(content)
    return json.dumps(header).encode() + b"\n" + content


def num_chunks(num_frames: int) -> int:
    """The number of chunks of a video."""
    return 1 + math.ceil((num_frames - 1) / FRAMES_PER_CHUNK)


class Inbox:
    """Joins the bytes that come from a pipe to messages, wherever they were cut."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._header: dict[str, Any] | None = None

    def add(self, data: bytes) -> None:
        self._received += data

    def pop(self) -> Message | None:
        """The next message; None while a part of it is missing. Raises ValueError for bytes that are no message."""
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
