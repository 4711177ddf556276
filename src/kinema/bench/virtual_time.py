"""An event loop whose clock jumps to the next event, so that an hour passes in as long as its work takes.

What runs on threads, as the transactions of a database do, is run at once and measured, one call after the other as on
one processor. Its answer comes when that time has passed on the loop's clock too. The loop's own work takes none of it.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class NothingHappens(RuntimeError):
    """All tasks wait for each other."""


class _Skipping(selectors.DefaultSelector):
    """A selector that skips the time to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout == 0:  # something is ready; to ask the system each time would take longer than that
            return []
        found = super().select(0)
        if not found:
            if timeout is None:
                raise NothingHappens
            self.now += timeout
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop. A second on a thread counts as ``thread_factor`` seconds; with 0 it takes no time."""

    def __init__(self, thread_factor: float = 1.0) -> None:
        self._clock = _Skipping()
        super().__init__(self._clock)
        self._thread_factor = thread_factor
        self._threads_busy_until = 0.0
        # What all calls on threads have taken, in seconds.
        self.threads_s = 0.0

    def time(self) -> float:
        """Seconds since the loop was made, on its own clock."""
        return self._clock.now

    def run_in_executor(self, _executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        answer: asyncio.Future[T] = self.create_future()
        began = time.perf_counter()
        try:
            tell: Callable[[], object] = _telling(answer, func(*args))
        except Exception as exc:
            tell = _failing(answer, exc)
        seconds = time.perf_counter() - began
        self.threads_s += seconds
        self._threads_busy_until = max(self.time(), self._threads_busy_until) + self._thread_factor * seconds
        self.call_at(self._threads_busy_until, tell)
        return answer


def run_in_virtual_time(main: Coroutine[Any, Any, T], thread_factor: float = 1.0) -> T:
    """Run it to its end on a loop of its own, and return its result. Raises NothingHappens when it would never end."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(thread_factor)) as runner:
        return runner.run(main)


def _telling(answer: asyncio.Future[T], result: T) -> Callable[[], object]:
    return lambda: None if answer.done() else answer.set_result(result)


def _failing(answer: asyncio.Future[T], exc: Exception) -> Callable[[], object]:
    return lambda: None if answer.done() else answer.set_exception(exc)
