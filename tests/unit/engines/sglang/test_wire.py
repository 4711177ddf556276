"""Messages in a pipe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.engines.sglang.wire import Inbox, Message, encode, num_chunks

SENT = [("step", b"", {"index": 1}), ("frames", b"\n{" * 5, {"num_frames": 4}), ("done", b"", {"number": 7})]


@given(st.integers(1, 200))
def test_messages_come_out_whole_however_they_are_cut(size: int) -> None:
    """Content may look like a message and is none."""
    data = b"".join(encode(kind, content, said) for kind, content, said in SENT)
    inbox, received = Inbox(), []
    for start in range(0, len(data), size):
        inbox.add(data[start : start + size])
        while (message := inbox.pop()) is not None:
            received.append((message.kind, message.content))
    assert received == [(kind, content) for kind, content, _ in SENT]


def test_what_is_no_message_is_refused() -> None:
    """Somebody else wrote into the pipe."""
    inbox = Inbox()
    inbox.add(b"hello\n")
    with pytest.raises(ValueError, match="Expecting value"):
        inbox.pop()


@pytest.mark.parametrize(("num_frames", "chunks"), [(1, 1), (2, 2), (5, 2), (6, 3), (81, 21)])
def test_a_video_comes_in_chunks_of_one_and_then_four(num_frames: int, chunks: int) -> None:
    """As those of the wan engine do."""
    assert num_chunks(num_frames) == chunks


def test_a_message_says_its_kind() -> None:
    """Whatever else it says."""
    assert Message({"kind": "ready"}).kind == "ready"
