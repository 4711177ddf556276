"""The processes of the other ranks, as rank 0 holds them: started, watched, and ended with it.

A rank that ends, or sends no heartbeat for a while, makes all of them lost: its part of a step is gone, and whatever
waits for it would wait for ever. The process of rank 0 then has to end, and another one begins anew.
"""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

import structlog

from kinema.engines.wan.ranks.channel import Channel, RankMessage
from kinema.errors import EngineFailed, KinemaError, WorkerLost, by_code

log = structlog.get_logger(__name__)

# A rank sends a heartbeat every second; a process that is stopped, or on a machine that swaps, sends none.
HEARTBEAT_S = 1.0
SILENCE_S = 30.0
# A rank ends at once when it is asked to; one that does not is killed.
_CLOSE_S = 5.0
# The end of a process is noticed at once by its channel; gloo's error may come a moment before.
_NOTICE_S = 2.0

_MAIN = "import sys; sys.path[:] = {path!r}; from kinema.engines.wan.ranks.follower import main; main({descriptor})"


def start_process(its: socket.socket) -> subprocess.Popen[bytes]:
    """Start a process that follows the one at the other end of this socket."""
    # It imports the same modules as this process, wherever they are. Its output must not get into this process' own,
    # which may be the path of a video.
    return subprocess.Popen(  # noqa: S603 - this interpreter, and no word of anybody else
        [sys.executable, "-c", _MAIN.format(path=sys.path, descriptor=its.fileno())],
        pass_fds=[its.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


class RankProcess:
    """One process. ``answers`` has its messages but for heartbeats, and a None when no more will come."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.answers: queue.SimpleQueue[RankMessage | None] = queue.SimpleQueue()
        # When its last heartbeat came. None while it reads its weights, when only the end of the process is noticed.
        self.heard_at: float | None = None
        mine, its = socket.socketpair()
        self.channel = Channel(Connection(mine.detach()))
        with its:
            self.process = start_process(its)

    @property
    def is_silent(self) -> bool:
        return self.heard_at is not None and time.monotonic() - self.heard_at > SILENCE_S


class RankProcesses:
    """The ranks 1 to n-1. ``on_lost`` is called once, on a thread of this object, when one of them is lost."""

    def __init__(self, num_ranks: int, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._is_closing = False
        self._lost = threading.Event()
        self._error: KinemaError = WorkerLost()
        # The answers to what is asked beside the other orders, by the key of the question.
        self._asked: dict[int, queue.SimpleQueue[RankMessage | None]] = {}
        self.ranks: Sequence[RankProcess] = [RankProcess(number) for number in range(1, num_ranks)]
        self._watch = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._watch.start()

    @property
    def is_lost(self) -> bool:
        """May be asked on any thread."""
        return self._lost.is_set()

    def send(self, **order: object) -> None:
        """Send an order to all ranks. Raises WorkerLost."""
        for rank in self.ranks:
            self.send_to(rank, **order)

    def send_to(self, rank: RankProcess, **order: object) -> None:
        """Send an order to one rank. Raises WorkerLost."""
        if self.is_lost:
            raise self._error_once()
        with suppress(OSError):  # the watching thread notices its end in a moment
            rank.channel.send(**order)

    def collect(self) -> None:
        """Wait for an answer of each rank. Raises the error that a rank answers, or WorkerLost."""
        self._check([rank.answers.get() for rank in self.ranks])

    @contextmanager
    def asked(self, key: int, **order: object) -> Iterator[None]:
        """Send an order that ranks follow beside the others, run the block meanwhile, and wait for an answer of each
        with this new key. May be called on any thread. Raises as ``collect`` does."""
        answers: queue.SimpleQueue[RankMessage | None] = queue.SimpleQueue()
        self._asked[key] = answers
        try:
            if self._is_closing:
                raise self._error_once()
            self.send(key=key, **order)
            try:
                yield
            finally:
                found = [answers.get() for _ in self.ranks]
            self._check(found)
        finally:
            del self._asked[key]

    def _check(self, answers: Sequence[RankMessage | None]) -> None:
        """Raises the error that one of the answers tells, or WorkerLost."""
        if None in answers:
            raise self._error_once()
        for answer in answers:
            if answer is not None and "code" in answer:
                log.error("a rank failed", reason=answer["message"])
                raise _error_of(answer)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Run what all ranks do together. When it fails here, nobody knows how far the others are, so they are lost.

        Raises the error; WorkerLost from then on.
        """
        try:
            yield
        except WorkerLost as exc:
            if not self._lost.wait(_NOTICE_S):
                self.lose("rank 0 could not reach the others")
            raise self._error_once() from exc
        except Exception as exc:
            self.lose(f"rank 0 failed in the middle of an exchange ({exc})")
            raise

    def lose(self, reason: str, error: KinemaError | None = None) -> None:
        """Kill all ranks, since none can go on. ``error`` is the cause, if it is known."""
        if self._is_closing or self._lost.is_set():
            return
        log.critical("a rank is lost", reason=reason)
        self._error = error or WorkerLost(f"The worker lost one of its GPUs: {reason}.")
        self._lost.set()
        for rank in self.ranks:
            rank.process.kill()  # gloo notices nothing but the end of a process
            rank.answers.put(None)
        self._end_questions()
        self._on_lost()

    def _end_questions(self) -> None:
        """No answer will come any more."""
        for answers in list(self._asked.values()):
            for _ in self.ranks:
                answers.put(None)

    def close(self) -> None:
        """End all ranks, and wait until they have ended."""
        self._is_closing = True
        self._end_questions()
        for rank in self.ranks:
            with suppress(OSError):
                rank.channel.send(do="end")
        deadline = time.monotonic() + _CLOSE_S
        for rank in self.ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(deadline - time.monotonic(), 0))
            rank.process.kill()
            rank.process.wait()
        self._watch.join(_CLOSE_S)
        for rank in self.ranks:
            rank.channel.connection.close()

    def _error_once(self) -> KinemaError:
        """The cause, for the generation that met it; WorkerLost for every later one."""
        error = self._error
        if not isinstance(error, WorkerLost):
            self._error = WorkerLost()
        return error

    def _run(self) -> None:
        left = {rank.channel.connection: rank for rank in self.ranks}
        while left:
            ready = wait(list(left), timeout=HEARTBEAT_S)
            for rank in [rank for connection, rank in left.items() if connection in ready]:
                message = rank.channel.receive()
                if message is None:
                    del left[rank.channel.connection]
                    self.lose(f"the process of rank {rank.number} ended")
                else:
                    self._note(rank, message)
            for rank in left.values():
                if rank.is_silent:
                    self.lose(f"rank {rank.number} said nothing for {SILENCE_S:g} s")

    def _note(self, rank: RankProcess, message: RankMessage) -> None:
        match message["what"]:
            case "alive":
                rank.heard_at = time.monotonic()
            case "failed":
                self.lose(f"rank {rank.number} failed: {message['message']}", _error_of(message))
            case "read":
                if (answers := self._asked.get(message["key"])) is not None:
                    answers.put(message)
            case _:
                rank.answers.put(message)


def _error_of(message: RankMessage) -> KinemaError:
    """The error of another rank. The text of an unexpected one is for the log alone."""
    kind = by_code(message["code"])
    return kind() if kind is EngineFailed else kind(message["message"])
