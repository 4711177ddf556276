"""The processes of the other ranks, as rank 0 has them: started, watched, and ended with it.

A rank that ends, or says nothing for a while, loses the whole crew: what it held of a step is gone, and whoever waits
for it would wait for ever. There is no way back but to begin anew, with the process that rank 0 is part of.
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

from kinema.engines.wan.ranks.orders import Line, Said
from kinema.errors import EngineFailed, KinemaError, WorkerLost, by_code

log = structlog.get_logger(__name__)

# A rank gives a sign of life every second; a process that is stopped, or on a machine that swaps, gives none.
BEAT_S = 1.0
SILENCE_S = 30.0
# It ends at once when it is told to; what does not is ended.
_CLOSE_S = 5.0
# The end of a process is seen at once on its line; what gloo says of it may come a moment before.
_NOTICE_S = 2.0

_MAIN = "import sys; sys.path[:] = {path!r}; from kinema.engines.wan.ranks.follower import main; main({descriptor})"


class Rank:
    """One process; ``answers`` are what it said besides its signs of life, None when there will be no more."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.answers: queue.SimpleQueue[Said | None] = queue.SimpleQueue()
        # Of its last sign of life, once it has come up; until then it reads weights, and only its end is looked for.
        self.heard_at: float | None = None
        mine, its = socket.socketpair()
        self.line = Line(Connection(mine.detach()))
        with its:
            # With the modules that this process has, wherever they come from. Nothing of it may get into what this
            # process prints, which may be the path of a video.
            self.process = subprocess.Popen(  # noqa: S603 - this interpreter, and no word of anybody else
                [sys.executable, "-c", _MAIN.format(path=sys.path, descriptor=its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    @property
    def is_silent(self) -> bool:
        return self.heard_at is not None and time.monotonic() - self.heard_at > SILENCE_S


class Crew:
    """Ranks 1 to n-1. ``on_lost`` is called once, on a thread of the crew's, when one of them was lost."""

    def __init__(self, num_ranks: int, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._is_closing = False
        self._lost = threading.Event()
        self._error: KinemaError = WorkerLost()
        self.ranks: Sequence[Rank] = [Rank(number) for number in range(1, num_ranks)]
        self._watch = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._watch.start()

    @property
    def is_lost(self) -> bool:
        """May be asked on any thread."""
        return self._lost.is_set()

    def tell(self, **order: object) -> None:
        """All of them. Raises WorkerLost."""
        for rank in self.ranks:
            self.tell_one(rank, **order)

    def tell_one(self, rank: Rank, **order: object) -> None:
        """Raises WorkerLost."""
        if self.is_lost:
            raise self._take_error()
        with suppress(OSError):  # its end is noticed in a moment
            rank.line.say(**order)

    def collect(self) -> None:
        """Wait for an answer of each of them. Raises what one of them says went wrong, or WorkerLost."""
        answers = [rank.answers.get() for rank in self.ranks]
        if None in answers:
            raise self._take_error()
        for answer in answers:
            if answer is not None and "code" in answer:
                log.error("a rank failed in a step", reason=answer["message"])
                raise _error_of(answer)

    @contextmanager
    def depending(self) -> Iterator[None]:
        """Of what all ranks do together: when it fails here, it cannot be told how far the others are.

        Raises what went wrong; WorkerLost from then on.
        """
        try:
            yield
        except WorkerLost as exc:
            if not self._lost.wait(_NOTICE_S):
                self.lose("rank 0 could not reach the others")
            raise self._take_error() from exc
        except Exception as exc:
            self.lose(f"rank 0 failed in the middle of an exchange ({exc})")
            raise

    def lose(self, reason: str, error: KinemaError | None = None) -> None:
        """None of them is of use any more; those that are left end. ``error`` is what went wrong, if that is known."""
        if self._is_closing or self._lost.is_set():
            return
        log.critical("a rank is lost", reason=reason)
        self._error = error or WorkerLost(f"The worker lost one of its GPUs: {reason}.")
        self._lost.set()
        for rank in self.ranks:
            rank.process.kill()  # gloo notices the end of a process, and nothing less
            rank.answers.put(None)
        self._on_lost()

    def close(self) -> None:
        """End them, and wait until they have ended."""
        self._is_closing = True
        for rank in self.ranks:
            with suppress(OSError):
                rank.line.say(do="end")
        deadline = time.monotonic() + _CLOSE_S
        for rank in self.ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(deadline - time.monotonic(), 0))
            rank.process.kill()
            rank.process.wait()
        self._watch.join(_CLOSE_S)
        for rank in self.ranks:
            rank.line.connection.close()

    def _take_error(self) -> KinemaError:
        """What went wrong is told once, to the generation that met it; to the others this worker is lost."""
        error = self._error
        if not isinstance(error, WorkerLost):
            self._error = WorkerLost()
        return error

    def _run(self) -> None:
        left = {rank.line.connection: rank for rank in self.ranks}
        while left:
            ready = wait(list(left), timeout=BEAT_S)
            for rank in [rank for connection, rank in left.items() if connection in ready]:
                said = rank.line.hear()
                if said is None:
                    del left[rank.line.connection]
                    self.lose(f"the process of rank {rank.number} ended")
                else:
                    self._note(rank, said)
            for rank in left.values():
                if rank.is_silent:
                    self.lose(f"rank {rank.number} said nothing for {SILENCE_S:g} s")

    def _note(self, rank: Rank, said: Said) -> None:
        match said["what"]:
            case "alive":
                rank.heard_at = time.monotonic()
            case "failed":
                self.lose(f"rank {rank.number} failed: {said['message']}", _error_of(said))
            case _:
                rank.answers.put(said)


def _error_of(said: Said) -> KinemaError:
    """As if it had come up here. What nobody expected is for the log alone."""
    kind = by_code(said["code"])
    return kind() if kind is EngineFailed else kind(said["message"])
