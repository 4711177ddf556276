"""Messages between a process and one that decodes for it: a few fields as JSON, and bytes, through a socket.

A receiver says how many bytes it takes, so neither side can fill the other's memory. Nothing is unpickled.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

# What comes with the channel of a new process: the MB of memory, and the seconds of processor time and of the clock,
# that it may take. Zero seconds are no limit.
LIMITS = struct.Struct(">III")
_HEAD = struct.Struct(">IQ")
# Sizes, rates and one sentence.
_MAX_FIELDS_BYTES = 64 * 1024

Fields = dict[str, Any]


class MessageRefused(ValueError):
    """The message is larger than its receiver takes, or is none."""


def send(channel: socket.socket, fields: Fields, content: bytes | memoryview = b"") -> None:
    """Send a message. Raises OSError when nobody receives it."""
    text, data = json.dumps(fields).encode(), memoryview(content).cast("B")
    channel.sendall(_HEAD.pack(len(text), data.nbytes) + text)
    channel.sendall(data)


def receive(channel: socket.socket, max_bytes: int) -> tuple[Fields, bytearray]:
    """Receive a message with content of at most that size.

    Raises EOFError when the other side has gone, OSError, and MessageRefused.
    """
    num_fields_bytes, num_bytes = _HEAD.unpack(_exactly(channel, _HEAD.size))
    if num_fields_bytes > _MAX_FIELDS_BYTES or num_bytes > max_bytes:
        raise MessageRefused(f"a message of {num_fields_bytes} and {num_bytes} bytes; {max_bytes} are taken")
    try:
        fields = json.loads(_exactly(channel, num_fields_bytes))
    except ValueError as exc:
        raise MessageRefused("a message without fields") from exc
    if not isinstance(fields, dict):
        raise MessageRefused("a message without fields")
    return fields, _exactly(channel, num_bytes)


def _exactly(channel: socket.socket, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    left = memoryview(data)
    while left:
        got = channel.recv_into(left)
        if not got:
            raise EOFError
        left = left[got:]
    return data
