"""Pictures and films of strangers, decoded by a process for each request; ``decoder_process.py`` is the other side.

A process that takes too much, crashes or sends what it should not costs its client one sentence and nobody anything.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kinema.errors import DecoderUnavailable, InvalidRequest
from kinema.media import film, images
from kinema.media.film import FittedFilm, fit_frames, num_sound_samples, open_film
from kinema.media.images import FittedImage, fit_note, open_image
from kinema.media.messages import LIMITS, Fields, MessageRefused, receive, send
from kinema.media.sound import SOUND_RATE, Sound
from kinema.request.shapes import FilmShape, Size
from kinema.settings import InputSettings

UInt8Array = npt.NDArray[np.uint8]
ReadT = TypeVar("ReadT")

_MAIN = "import sys; sys.path[:] = {path!r}; from kinema.media.decoder_process import main; main({descriptor})"
# What the interpreter and its libraries look for. The other variables may have passwords in them.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "PYTHONHOME")
# The clock runs on while others have the processor.
_WALL_FACTOR = 3
_SLACK_S = 5.0
# A server takes an order in milliseconds, and the first one when it has imported everything.
_ORDER_S = 10.0
_END_S = 5.0
# Two channels of two bytes.
_BYTES_PER_SAMPLE = 4
# What may be said of an input, and how long a sentence is.
_MAX_NOTES, _MAX_NOTE_CHARS = 16, 300


class Picture(Protocol):
    """An image that was opened; ``images.InputImage`` says what its parts are."""

    @property
    def size(self) -> Size: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def fit(self, size: Size) -> FittedImage: ...


class Film(Protocol):
    """A film that was opened; ``film.InputFilm`` says what its parts are."""

    @property
    def shape(self) -> FilmShape: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def frames(self, size: Size, fps: int, num_frames: int | None = None) -> Iterator[UInt8Array]: ...
    def fit(self, size: Size, fps: int, num_frames: int) -> FittedFilm: ...
    def last_frame(self) -> UInt8Array: ...
    @property
    def has_sound(self) -> bool: ...
    def sound(self) -> Sound | None: ...


class Decoder(Protocol):
    """Opens what a client sent. Raises InvalidRequest."""

    def open_image(self, data: bytes, field: str = images.FIRST_FRAME) -> Picture: ...
    def open_film(self, data: bytes) -> Film: ...


class OwnProcess:
    """Decodes in this process, for a person's own files."""

    def open_image(self, data: bytes, field: str = images.FIRST_FRAME) -> Picture:
        return open_image(data, field)

    def open_film(self, data: bytes) -> Film:
        return open_film(data)


class Decoders:
    """Starts processes that decode. All methods may be called on any thread."""

    def __init__(self, settings: InputSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def start(self) -> None:
        """Start the server, so that the first input need not wait for it. It is also started when it is missing."""
        with self._lock:
            self._running()

    def stop(self) -> None:
        """End the server and every process that decodes."""
        with self._lock:
            self._end()

    def for_picture(self) -> DecoderProcess:
        """A process that has the limits of a picture. Raises DecoderUnavailable."""
        return self._process(self._settings.picture_s)

    def for_film(self) -> DecoderProcess:
        """A process that has the limits of a film. Raises DecoderUnavailable."""
        return self._process(self._settings.film_s)

    def for_stored_film(self) -> DecoderProcess:
        """A process for a film that was accepted, and whose reader may take the frames slowly.

        Each answer may take the seconds that all frames may take of the processor; the time between two does not count.
        Raises DecoderUnavailable.
        """
        return self._process(self._settings.film_s, is_read_slowly=True)

    def _process(self, limit_s: int, *, is_read_slowly: bool = False) -> DecoderProcess:
        wall_s = _WALL_FACTOR * limit_s
        order = LIMITS.pack(self._settings.memory_mb, *((0, 0) if is_read_slowly else (limit_s, wall_s)))
        within = f"{self._settings.memory_mb} MB of memory and {limit_s} s"
        too_much = f"is damaged, or cannot be decoded within {within}"
        with self._lock:
            try:
                server, channel = self._ordered(order)
            except OSError as exc:  # no file descriptor or no process is left
                raise DecoderUnavailable from exc
        channel.settimeout(limit_s if is_read_slowly else wall_s + _SLACK_S)
        return DecoderProcess(server, channel, too_much)

    def _ordered(self, order: bytes) -> tuple[_Server, socket.socket]:
        """Order a process; from another server where this one has ended. Raises OSError."""
        mine, its = socket.socketpair()
        try:
            with its:
                try:
                    server = self._running()
                    socket.send_fds(server.control, [order], [its.fileno()])
                except (BrokenPipeError, TimeoutError):
                    self._end()
                    server = self._running()
                    socket.send_fds(server.control, [order], [its.fileno()])
        except BaseException:
            mine.close()
            raise
        return server, mine

    def _running(self) -> _Server:
        """The server, started where there is none. Raises OSError."""
        if self._server is None or self._server.has_ended:
            self._end()
            self._server = _Server()
        return self._server

    def _end(self) -> None:
        if self._server is not None:
            self._server.end()
        self._server = None


def start_process(its: socket.socket) -> subprocess.Popen[bytes]:
    """Start the process that forks, at the other end of this socket. Raises OSError.

    It is started as a new program, so it gets nothing of this process but the socket and what it prints on.
    """
    known = {name: value for name in _ENVIRONMENT if (value := os.environ.get(name)) is not None}
    return subprocess.Popen(  # noqa: S603 - this interpreter, and no word of anybody else
        [sys.executable, "-c", _MAIN.format(path=sys.path, descriptor=its.fileno())],
        pass_fds=[its.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # A process that forks must have one thread.
        env=known | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        start_new_session=True,
    )


class _Server:
    """The process that forks. Raises OSError."""

    def __init__(self) -> None:
        self.control, its = socket.socketpair()
        try:
            with its:
                self.process = start_process(its)
        except BaseException:
            self.control.close()
            raise
        self.control.settimeout(_ORDER_S)

    @property
    def has_ended(self) -> bool:
        """The system closes its socket before it ends the processes that were forked."""
        if self.control.fileno() == -1:
            return True
        poll = select.poll()
        poll.register(self.control, 0)
        return bool(poll.poll(0))

    def end(self) -> None:
        """End it, and every process that it forked."""
        self.control.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class DecoderProcess:
    """One process, for the pictures of a request or a film, one after the other; a ``Decoder``.

    Its methods block, and raise InvalidRequest. ``too_much`` is the problem of an input that goes beyond its limits.
    ``kill`` may be called on any thread. A call that waits for the process then ends with InvalidRequest.
    """

    def __init__(self, server: _Server, channel: socket.socket, too_much: str) -> None:
        self._server = server
        self._channel = channel
        self._problem = too_much
        self._too_much = film.refused(too_much)  # of the input that was opened last

    def __enter__(self) -> DecoderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._channel.close()

    def kill(self) -> None:
        """Kill the process if it still runs."""
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def open_image(self, data: bytes, field: str = images.FIRST_FRAME) -> Picture:
        self._too_much = images.refused(self._problem, field)
        self.tell(data, do="open_image", field=field)
        read = self._hear(lambda answer: (_read_size(answer, images.MAX_PIXELS), _read_notes(answer)))
        return _Picture(self, field, *read)

    def open_film(self, data: bytes) -> Film:
        self._too_much = film.refused(self._problem)
        self.tell(data, do="open_film")
        return _Film(
            self,
            *self._hear(lambda answer: (_read_shape(answer), _read_notes(answer), bool(answer["has_sound"]))),
        )

    def tell(self, content: bytes = b"", **fields: object) -> None:
        """Send an order."""
        with suppress(OSError):  # it has ended; whatever it said before that comes first
            send(self._channel, fields, content)

    def hear(self, num_bytes: int) -> tuple[Fields, bytearray]:
        """The next answer, with that number of bytes."""
        try:
            answer, content = receive(self._channel, num_bytes)
        except (EOFError, OSError, MessageRefused) as exc:
            raise self._why_it_ended() from exc
        if "refused" in answer:
            raise InvalidRequest(str(answer["refused"]), param=self._too_much.param)
        if len(content) != num_bytes:
            raise self._too_much
        return answer, content

    def hear_pixels(self, size: Size) -> UInt8Array:
        """The next answer, which is a picture (h, w, 3) uint8 of that size."""
        _, content = self.hear(3 * size.pixels)
        return np.frombuffer(content, np.uint8).reshape(size.height, size.width, 3)

    def _hear(self, read: Callable[[Fields], ReadT]) -> ReadT:
        answer, _ = self.hear(0)
        try:
            return read(answer)
        except (KeyError, TypeError, ValueError, ArithmeticError) as exc:
            raise self._too_much from exc

    def _why_it_ended(self) -> InvalidRequest | DecoderUnavailable:
        """The client's input is at fault, unless the server ended."""
        return DecoderUnavailable() if self._server.has_ended else self._too_much


@dataclass(frozen=True, slots=True)
class _Picture:
    process: DecoderProcess
    field: str
    size: Size
    notes: tuple[str, ...]

    def fit(self, size: Size) -> FittedImage:
        self.process.tell(do="fit", width=size.width, height=size.height)
        return FittedImage(self.process.hear_pixels(size), fit_note(self.field, self.size, size))


@dataclass(frozen=True, slots=True)
class _Film:
    process: DecoderProcess
    shape: FilmShape
    notes: tuple[str, ...]
    has_sound: bool

    def frames(self, size: Size, fps: int, num_frames: int | None = None) -> Iterator[UInt8Array]:
        count = self.shape.num_frames_at(fps) if num_frames is None else num_frames
        self.process.tell(do="frames", width=size.width, height=size.height, fps=fps, num_frames=count)
        for _ in range(count):
            yield self.process.hear_pixels(size)

    def fit(self, size: Size, fps: int, num_frames: int) -> FittedFilm:
        return fit_frames(self, size, fps, num_frames)

    def last_frame(self) -> UInt8Array:
        self.process.tell(do="last_frame")
        return self.process.hear_pixels(self.shape.size)

    def sound(self) -> Sound | None:
        if not self.has_sound:
            return None
        self.process.tell(do="sound")
        _, content = self.process.hear(_BYTES_PER_SAMPLE * num_sound_samples(self.shape))
        return Sound(np.frombuffer(content, np.int16).reshape(-1, 2), SOUND_RATE)


def _read_size(answer: Fields, max_pixels: int) -> Size:
    size = Size(width=answer["width"], height=answer["height"])
    if size.pixels > max_pixels:
        raise ValueError(f"{size} is more than {max_pixels} pixels")
    return size


def _read_shape(answer: Fields) -> FilmShape:
    fps, seconds = Fraction(*answer["fps"]), Fraction(*answer["seconds"])
    shape = FilmShape(_read_size(answer, film.MAX_PIXELS), int(answer["num_frames"]), fps, seconds)
    if not (0 < shape.num_frames <= film.MAX_FRAMES and fps > 0 and 0 < shape.seconds <= film.MAX_SECONDS):
        raise ValueError(f"{shape} is too long")
    return shape


def _read_notes(answer: Fields) -> tuple[str, ...]:
    return tuple(str(note)[:_MAX_NOTE_CHARS] for note in answer["notes"][:_MAX_NOTES])
