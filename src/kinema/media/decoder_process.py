"""The processes that decode: a server that has imported everything, and a process for each input, forked from it.

Pictures and films come from strangers, and their decoders are large programs in C. So each input is decoded by a
process of its own, which has no more than limited memory, time and files, no other process' sockets, and no more than
its input to lose. It answers in plain data and ends with its input. The server keeps one process ready for the next
input, and forks another in milliseconds, where a new interpreter would import for half a second. It has one thread and
never looks at an input, so nothing can hold it up.
``decoders.py`` is the other side.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from kinema.errors import InvalidRequest
from kinema.media import film, heic, images  # noqa: F401 - each decoder has heic's library at once
from kinema.media.film import InputFilm, open_film
from kinema.media.images import InputImage, encode_png, open_image
from kinema.media.messages import LIMITS, Fields, receive, send
from kinema.request.shapes import Size

# The channel's own, and what the decoders' libraries may open of the system's.
_MAX_FILES = 16
_SMALL_PNG = encode_png(np.zeros((24, 24, 3), np.uint8))
# A film may take a minute: it leaves the processor to whoever needs it for less.
_FILM_NICENESS = 10
_MAX_INPUT_BYTES = max(images.MAX_BYTES, film.MAX_BYTES) + 1
_PR_SET_PDEATHSIG = 1


def main(control_fd: int) -> None:
    """Serve until the other end of the control socket is closed."""
    control = socket.socket(fileno=control_fd)
    warnings.simplefilter("ignore")  # what is odd about a client's picture is no line of the service's log
    _warm_up()
    gc.collect()
    gc.freeze()  # or the collector would copy the pages that all forked processes share
    _Server(control).run()


@dataclass(frozen=True, slots=True)
class _Spare:
    """A process that waits for its order, which comes through this socket."""

    pid: int
    orders: socket.socket


@dataclass(frozen=True, slots=True)
class _Running:
    """A process that decodes. Its channel shows here that the other side has closed it."""

    pid: int
    channel: socket.socket


class _Server:
    """Gives each order to a process that was forked before, kills those whose clients have gone, and takes note of
    those that ended."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._spare: _Spare | None = None
        self._running: dict[int, _Running] = {}
        self._woken, self._wakes = socket.socketpair()
        self._woken.setblocking(False)
        self._wakes.setblocking(False)
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._poll.register(self._woken, select.POLLIN)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(self) -> None:
        goes_on = True
        while goes_on:
            self._spare = self._spare or _fork()
            ready = {fd for fd, _ in self._poll.poll()}
            for fd in ready & self._running.keys():
                os.kill(self._running[fd].pid, signal.SIGKILL)
                self._poll.unregister(fd)
            # After the kills: a new process may get the descriptor of one that has ended.
            if self._woken.fileno() in ready:
                self._reap()
            if self._control.fileno() in ready:
                goes_on = self._take_order()
        signal.set_wakeup_fd(-1)  # the spare process ends after this, when nothing is there to be woken

    def _take_order(self) -> bool:
        """Give the order that has come to a process; False when no more will come."""
        try:
            order, fds, _, _ = socket.recv_fds(self._control, LIMITS.size, 1)
        except OSError:
            return False
        if len(order) < LIMITS.size or not fds:
            return False
        channel = socket.socket(fileno=fds[0])
        self._running[channel.fileno()] = _Running(self._hand_over(order, channel), channel)
        self._poll.register(channel, 0)  # a hang-up is told without being asked for
        return True

    def _hand_over(self, order: bytes, channel: socket.socket) -> int:
        """Give the order to the spare process, and return its id."""
        spare, self._spare = self._spare or _fork(), None
        with spare.orders:
            try:
                socket.send_fds(spare.orders, [order], [channel.fileno()])
            except OSError:  # something has ended it
                os.waitpid(spare.pid, 0)
                return self._hand_over(order, channel)
        return spare.pid

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)
        if self._spare is not None and _has_ended(self._spare.pid):
            self._spare.orders.close()
            self._spare = None
        for fd in [fd for fd, running in self._running.items() if _has_ended(running.pid)]:
            with suppress(KeyError):
                self._poll.unregister(fd)
            self._running.pop(fd).channel.close()


def _has_ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] != 0


def _fork() -> _Spare:
    """A new process that waits for its order."""
    mine, its = socket.socketpair()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        _decode_and_end(its, parent)
    its.close()
    return _Spare(pid, mine)


def _decode_and_end(orders: socket.socket, parent: int) -> NoReturn:
    """Be the process of one input. It ends here, whatever happens."""
    try:
        os.dup2(orders.fileno(), 3)
        os.closerange(4, 65536)
        _separate(parent)
        _warm_up()
        with suppress(EOFError, OSError, MemoryError):  # the client has gone, or hears of its limits
            _Decoder(_take_channel(socket.socket(fileno=3))).run()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)


def _separate(parent: int) -> None:
    """Give up what the server has, and end with it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with suppress(OSError):  # when memory is short, this process goes first
            _write("/proc/self/oom_score_adj", "1000")
    if os.getppid() != parent:
        os._exit(0)
    _set(resource.RLIMIT_NOFILE, _MAX_FILES)
    _set(resource.RLIMIT_CORE, 0)
    _set(resource.RLIMIT_FSIZE, 0)


def _take_channel(orders: socket.socket) -> socket.socket:
    """Wait for the order, take on its limits, and return the channel to the client. Raises EOFError."""
    with orders:
        order, fds, _, _ = socket.recv_fds(orders, LIMITS.size, 1)
    if len(order) < LIMITS.size or not fds:
        raise EOFError
    memory_mb, cpu_s, wall_s = LIMITS.unpack(order)
    # The memory that is written, which RLIMIT_AS would count with a library's code and the unused rest of stacks.
    _set(resource.RLIMIT_DATA, memory_mb * 2**20)
    if cpu_s:
        _set(resource.RLIMIT_CPU, cpu_s)
    if wall_s:
        signal.setitimer(signal.ITIMER_REAL, wall_s)  # nobody handles its signal, which ends the process
    return socket.socket(fileno=fds[0])


def _warm_up() -> None:
    """Decode a small picture: what that needs is in memory before the first byte of an input comes."""
    open_image(_SMALL_PNG).fit(Size(width=16, height=16))


def _set(which: int, limit: int) -> None:
    _, hard = resource.getrlimit(which)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(which, (limit, limit))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


class _Decoder:
    """Opens pictures or a film, one after the other, and answers what is asked of the one that is open."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._opened: Any = None
        self._answers: dict[str, Callable[..., Iterator[tuple[Fields, Any]]]] = {
            "open_image": self._open_image,
            "open_film": self._open_film,
            "fit": self._fit,
            "last_frame": self._last_frame,
            "frames": self._frames,
            "sound": self._sound,
        }

    def run(self) -> None:
        """Answer until the other side closes the channel, or something cannot be decoded."""
        while True:
            fields, content = receive(self._channel, _MAX_INPUT_BYTES)
            name = fields.pop("do")
            if content:
                os.nice(_FILM_NICENESS if name == "open_film" else 0)
                fields["data"] = bytes(content)
            del content
            try:
                for answer, pixels in self._answers[name](**fields):
                    send(self._channel, answer, memoryview(pixels))
            except InvalidRequest as exc:
                send(self._channel, {"refused": exc.message, "param": exc.param})
                return

    def _open_image(self, field: str, data: bytes = b"") -> Iterator[tuple[Fields, Any]]:
        self._opened = None  # the memory of another picture goes before this one's comes
        self._opened = open_image(data, field)
        yield _size(self._opened.size) | {"notes": self._opened.notes}, b""

    def _open_film(self, data: bytes = b"") -> Iterator[tuple[Fields, Any]]:
        self._opened = open_film(data)
        shape = self._opened.shape
        numbers = {"fps": shape.fps.as_integer_ratio(), "seconds": shape.seconds.as_integer_ratio()}
        yield (
            _size(shape.size)
            | numbers
            | {"num_frames": shape.num_frames}
            | {
                "notes": self._opened.notes,
                "has_sound": self._opened.has_sound,
            },
            b"",
        )

    def _fit(self, width: int, height: int) -> Iterator[tuple[Fields, Any]]:
        assert isinstance(self._opened, InputImage)
        fitted = self._opened.fit(Size(width=width, height=height))
        yield {"note": fitted.note}, fitted.pixels

    def _last_frame(self) -> Iterator[tuple[Fields, Any]]:
        assert isinstance(self._opened, InputFilm)
        yield {}, self._opened.last_frame()

    def _frames(self, width: int, height: int, fps: int, num_frames: int) -> Iterator[tuple[Fields, Any]]:
        assert isinstance(self._opened, InputFilm)
        for pixels in self._opened.frames(Size(width=width, height=height), fps, num_frames):
            yield {}, pixels

    def _sound(self) -> Iterator[tuple[Fields, Any]]:
        assert isinstance(self._opened, InputFilm)
        sound = self._opened.sound()
        yield {}, b"" if sound is None else sound.samples


def _size(size: Size) -> Fields:
    return {"width": size.width, "height": size.height}


_LIBC = ctypes.CDLL(None, use_errno=True)
