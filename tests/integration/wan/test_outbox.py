"""Frames on their way to the encoder: counted while somebody holds them, never waited for without an end."""

from __future__ import annotations

import threading
import time

import torch

from kinema.engines.wan.outbox import Outbox

PLANES = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
TOTAL = torch.tensor(1.0)


def test_a_parcel_is_held_by_whoever_holds_a_part_of_it() -> None:
    """And counts until the last lets go."""
    outbox = Outbox()
    frames = outbox.send(PLANES, TOTAL).wait()
    assert frames.tolist() == PLANES.tolist()
    part = frames[1:]
    del frames
    assert outbox.held_bytes == 24
    del part
    assert outbox.held_bytes == 0


def test_room_is_waited_for() -> None:
    """Until somebody lets go."""
    outbox = Outbox(room_bytes=30, patience_s=20)
    held = [outbox.send(PLANES, TOTAL).wait()]
    threading.Timer(0.05, held.clear).start()
    outbox.send(PLANES, TOTAL)
    assert not held


def test_nobody_waits_for_ever() -> None:
    """For a consumer that keeps everything, each parcel comes a moment late."""
    outbox = Outbox(room_bytes=30, patience_s=0.01)
    began = time.monotonic()
    held = [outbox.send(PLANES, TOTAL).wait() for _ in range(4)]
    assert time.monotonic() - began >= 0.03
    assert outbox.held_bytes == 96
    assert len(held) == 4
