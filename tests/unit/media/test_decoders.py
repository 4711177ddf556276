"""Processes that decode what strangers sent: what they may take, and how they end."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinema.errors import DecoderUnavailable, InvalidRequest
from kinema.media.decoders import Decoders
from kinema.media.film import open_film
from kinema.media.images import open_image
from kinema.media.messages import MessageRefused, receive, send
from kinema.request.shapes import Size
from kinema.settings import InputSettings
from tests.serving import decoders as shared_decoders
from tests.unit.media.test_boxes import film

SIZE = Size(width=64, height=48)
PATIENCE_S = 20
REFUSED = r"^input_reference is damaged, or cannot be decoded within 1024 MB of memory and \d s; a PNG, .* is accepted$"


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def large_webp() -> bytes:
    """25 million pixels in 100 kB."""
    buffer = io.BytesIO()
    Image.new("RGB", (5000, 5000), "red").save(buffer, "WEBP", method=0)
    return buffer.getvalue()


def slow_png() -> bytes:
    """Two million chunks without content, which take seconds."""
    chunk = bytes(4) + b"puNK" + zlib.crc32(b"puNK").to_bytes(4, "big")
    whole = png(8, 8)
    return whole[:33] + chunk * (19 * 2**20 // len(chunk)) + whole[33:]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def limits_of(pid: int) -> dict[str, str]:
    """By the words of the kernel. A process that has ended has none."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {line[:26].strip(): line[26:47].strip() for line in lines}


def decoding(decoders: Decoders) -> list[int]:
    """The processes that have an input; the server keeps another one ready, which has no limit of memory yet."""
    return [
        pid for pid in children(server_of(decoders)) if limits_of(pid).get("Max data size", "unlimited") != "unlimited"
    ]


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def decoders() -> Decoders:
    return shared_decoders()


@pytest.fixture
def own() -> Iterator[Decoders]:
    """With little time, and a server that a test may end."""
    started = Decoders(InputSettings(picture_s=1, film_s=1))
    started.start()
    yield started
    started.stop()


def server_of(decoders: Decoders) -> int:
    assert decoders._server is not None
    return decoders._server.process.pid


def only_child(decoders: Decoders) -> int:
    """The process that decodes, when those of other tests have ended."""
    wait_for(lambda: len(decoding(decoders)) == 1)
    return decoding(decoders)[0]


def test_a_picture_is_that_of_this_process(decoders: Decoders) -> None:
    """Its pixels and its note."""
    data = png(100, 100)
    with decoders.for_picture() as decoder:
        opened, here = decoder.open_image(data), open_image(data)
        assert opened.size == here.size
        fitted, expected = opened.fit(SIZE), here.fit(SIZE)
    assert np.array_equal(fitted.pixels, expected.pixels)
    assert fitted.note == expected.note


def test_a_second_picture_follows_the_first_in_the_same_process(decoders: Decoders) -> None:
    """Each by the name of its field, in notes and in errors."""
    with decoders.for_picture() as decoder:
        first = decoder.open_image(png(100, 100)).fit(SIZE)
        last = decoder.open_image(png(120, 90), "last_frame").fit(SIZE)
        assert np.array_equal(last.pixels, open_image(png(120, 90)).fit(SIZE).pixels)
        assert [str(one.note).split()[:2] for one in (first, last)] == [
            ["input_reference", "100x100"],
            ["last_frame", "120x90"],
        ]
        with pytest.raises(InvalidRequest, match=r"^last_frame is not an image of a known kind") as refused:
            decoder.open_image(b"<svg/>", "last_frame")
    assert refused.value.param == "last_frame"


def test_a_film_is_that_of_this_process(decoders: Decoders) -> None:
    """Its shape, its frames at any rate, and its last frame."""
    data = film(17)
    with decoders.for_film() as decoder:
        opened, here = decoder.open_film(data), open_film(data)
        assert opened.shape == here.shape
        assert np.array_equal(opened.last_frame(), here.last_frame())
        fitted, expected = (one.fit(Size(width=32, height=32), 8, 9) for one in (opened, here))
        assert np.array_equal(fitted.frames, expected.frames)
        assert fitted.note == expected.note
        assert len(list(opened.frames(SIZE, 8))) == len(list(here.frames(SIZE, 8)))


def test_what_cannot_be_read_is_refused_in_the_same_words(decoders: Decoders) -> None:
    """As this process would do it."""
    with pytest.raises(InvalidRequest) as here:
        open_image(b"<svg/>")
    with decoders.for_picture() as decoder, pytest.raises(InvalidRequest) as there:
        decoder.open_image(b"<svg/>")
    assert (there.value.message, there.value.param) == (here.value.message, here.value.param)


def test_what_is_odd_about_a_picture_is_not_logged(own: Decoders) -> None:
    """Pillow warns of an EXIF that ends too early; the picture is whole."""
    odd = io.BytesIO()
    begun = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x02\x00\x12\x01"
    Image.new("RGB", (64, 64)).save(odd, "JPEG", exif=begun)
    own.stop()
    reading, writing = os.pipe()  # the processes may not write to a file
    stderr = os.dup(2)
    os.dup2(writing, 2)
    try:
        own.start()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writing)
    with own.for_picture() as decoder:
        assert decoder.open_image(odd.getvalue()).size == Size(width=64, height=64)
    own.stop()
    with os.fdopen(reading, "rb") as told:
        assert told.read() == b""


def test_too_much_time_is_refused(own: Decoders) -> None:
    """The system ends the process, and the client hears what it may take."""
    began = time.monotonic()
    with own.for_picture() as decoder, pytest.raises(InvalidRequest, match=REFUSED):
        decoder.open_image(slow_png())
    assert time.monotonic() - began < PATIENCE_S


def test_a_stored_film_has_its_time_for_each_answer(own: Decoders) -> None:
    """And none in all, since its frames may be taken slowly."""
    with own.for_picture() as decoder:
        decoder.open_image(png(64, 48))  # the server has started
    with own.for_stored_film() as decoder:
        opened, pid = decoder.open_film(film()), only_child(own)
        assert limits_of(pid)["Max cpu time"] == "unlimited"
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(InvalidRequest, match="within 1024 MB of memory and 1 s"):
            next(opened.frames(SIZE, 8))


def test_too_much_memory_is_refused() -> None:
    """One picture of 25 million pixels and no place for it."""
    small = Decoders(InputSettings(memory_mb=256))
    try:
        with small.for_picture() as decoder, pytest.raises(InvalidRequest, match="is accepted"):
            decoder.open_image(large_webp()).fit(SIZE)
        with small.for_picture() as decoder:
            assert decoder.open_image(png(64, 48)).fit(SIZE).note is None
    finally:
        small.stop()


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_is_refused_and_harms_nobody(decoders: Decoders, how: signal.Signals) -> None:
    """Neither the other processes nor the next one."""
    with decoders.for_picture() as decoder:
        opened, pid = decoder.open_image(png(64, 48)), only_child(decoders)
        with decoders.for_picture() as other:
            spared = other.open_image(png(64, 48))
            os.kill(pid, how)
            with pytest.raises(InvalidRequest, match=REFUSED):
                opened.fit(SIZE)
            assert spared.fit(SIZE).note is None


def test_nothing_is_left(decoders: Decoders) -> None:
    """No process, no zombie, and no descriptor on either side."""

    def use() -> None:
        with decoders.for_picture() as decoder:
            decoder.open_image(png(64, 48)).fit(SIZE)
        wait_for(lambda: not decoding(decoders) and len(children(server_of(decoders))) == 1)

    use()
    folders = [Path(f"/proc/{pid}/fd") for pid in (os.getpid(), server_of(decoders))]
    before = [len(list(folder.iterdir())) for folder in folders]
    for _ in range(10):
        use()
    # Not equal: the server may still have been closing one when they were counted. What each use leaves is ten by now.
    wait_for(lambda: all(len(list(folder.iterdir())) <= count for folder, count in zip(folders, before, strict=True)))


def test_a_process_that_is_killed_ends_at_once(decoders: Decoders) -> None:
    """In the middle of its work; whoever waits for it hears of it."""
    with decoders.for_picture() as decoder:
        pid = only_child(decoders)
        killing = threading.Timer(0.2, decoder.kill)
        killing.start()
        with pytest.raises(InvalidRequest):
            decoder.open_image(slow_png())
        wait_for(lambda: not is_alive(pid))
        killing.join()


def test_it_has_limits_and_nothing_of_the_service(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sockets or files of this process, no variables with secrets, one thread, and bounds that the system keeps."""
    monkeypatch.setenv("KINEMA_SERVER_API_KEYS", "secret")
    with socket.create_server(("127.0.0.1", 0)) as listening, decoders.for_film() as decoder:
        listening.set_inheritable(True)
        opened = decoder.open_film(film())
        proc = Path(f"/proc/{only_child(decoders)}")
        assert len(list((proc / "fd").iterdir())) == 4
        assert os.readlink(f"/proc/self/fd/{listening.fileno()}") not in map(os.readlink, (proc / "fd").iterdir())
        limits = limits_of(int(proc.name))
        assert limits["Max data size"] == str(1024 * 2**20)
        assert limits["Max cpu time"] == "60"
        assert limits["Max open files"] == "16"
        assert limits["Max core file size"] == limits["Max file size"] == "0"
        assert b"secret" not in (proc / "environ").read_bytes()
        assert len(list(Path(f"/proc/{server_of(decoders)}/task").iterdir())) == 1
        assert opened.last_frame().shape == (48, 64, 3)


def test_a_server_that_ended_is_started_again(own: Decoders) -> None:
    """Whoever it decoded for may try again; it was not the fault of the picture."""
    with own.for_picture() as decoder:
        opened = decoder.open_image(png(64, 48))
        pid = only_child(own)
        os.kill(server_of(own), signal.SIGKILL)
        wait_for(lambda: not is_alive(pid))
        with pytest.raises(DecoderUnavailable):
            opened.fit(SIZE)
    with own.for_picture() as decoder:
        assert decoder.open_image(png(64, 48)).fit(SIZE).note is None


def test_a_process_that_ended_before_its_input_came_is_replaced(own: Decoders) -> None:
    """Whoever killed it."""
    wait_for(lambda: children(server_of(own)))
    (killed,) = children(server_of(own))
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: children(server_of(own)) not in ([], [killed]))
    with own.for_picture() as decoder:
        assert decoder.open_image(png(64, 48)).fit(SIZE).note is None


CHILD = """
import os, sys, time
from kinema.media.decoders import Decoders
from kinema.settings import InputSettings
decoders = Decoders(InputSettings())
slow = open(sys.argv[1], "rb").read()
while True:  # on a machine that stood still, one was ended before it was seen
    decoder = decoders.for_picture()
    decoder.tell(slow, do="open_image")
    server, until = decoders._server.process.pid, time.monotonic() + 2
    while time.monotonic() < until:
        if len(found := open(f"/proc/{server}/task/{server}/children").read().split()) == 2:
            print(server, *found, flush=True)
            time.sleep(60)
        time.sleep(0.01)
"""


def test_all_processes_end_with_their_parent(tmp_path: Path) -> None:
    """Whatever ended it: nobody is left to tell them."""
    (tmp_path / "slow.png").write_bytes(slow_png())
    command = [sys.executable, "-c", CHILD, str(tmp_path / "slow.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        parent.kill()
    for pid in pids:
        wait_for(lambda pid=pid: not is_alive(pid))


def test_messages_are_bounded() -> None:
    """A process that was taken over cannot fill the memory of the one that reads."""
    mine, its = socket.socketpair()
    with mine, its:
        send(its, {"width": 3}, memoryview(np.zeros((2, 2), np.uint8)))
        assert receive(mine, 4) == ({"width": 3}, bytearray(4))
        for head in ((8, 5), (2**20, 0), (8, 2**60)):
            its.sendall(head[0].to_bytes(4, "big") + head[1].to_bytes(8, "big"))
            with pytest.raises(MessageRefused):
                receive(mine, 4)
        for text in (b"[]", b"{", b"\xff", json.dumps("a").encode()):
            its.sendall(len(text).to_bytes(4, "big") + bytes(8) + text)
            with pytest.raises(MessageRefused):
                receive(mine, 4)
        its.close()
        with pytest.raises(EOFError):
            receive(mine, 4)
