"""An event loop whose clock jumps to the next event, so that an hour passes in as long as its work takes.

What runs on threads, as the transactions of a database do, is run at once and measured. Its answer comes when that time
has passed on the loop's clock too, behind what the same threads do already. The loop's own work takes none of it.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from heapq import heapreplace
from typing import Any, TypeVar, TypeVarTuple
from weakref import WeakKeyDictionary

# Longer than any transaction: what a call takes more is a pause of a machine that has other work.
_LONGEST_S = 1.0

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
    """The loop. A second on a thread counts as ``thread_factor`` seconds; with 0 it takes no time.

    A pool of threads does as many calls at a time as it has threads, and no pool waits for another one.
    """

    def __init__(self, thread_factor: float = 1.0) -> None:
        self._clock = _Skipping()
        super().__init__(self._clock)
        self._thread_factor = thread_factor
        # When each thread of a pool is free again, the first of them first.
        self._free_at: WeakKeyDictionary[Executor, list[float]] = WeakKeyDictionary()
        # What all calls on threads have taken, in seconds.
        self.threads_s = 0.0

    def time(self) -> float:
        """Seconds since the loop was made, on its own clock."""
        return self._clock.now

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        answer: asyncio.Future[T] = self.create_future()
        began = time.perf_counter()
        try:
            tell: Callable[[], object] = _telling(answer, func(*args))
        except Exception as exc:
            tell = _failing(answer, exc)
        seconds = min(time.perf_counter() - began, _LONGEST_S)
        self.threads_s += seconds
        self.call_at(self._end(executor, self._thread_factor * seconds), tell)
        return answer

    def _end(self, executor: Executor | None, seconds: float) -> float:
        """When a call that takes so long is over. The default pool has a thread for each."""
        if executor is None:
            return self.time() + seconds
        num_threads: int = getattr(executor, "_max_workers", 1)
        free_at = self._free_at.setdefault(executor, [0.0] * num_threads)
        end = max(self.time(), free_at[0]) + seconds
        heapreplace(free_at, end)
        return end


def run_in_virtual_time(main: Coroutine[Any, Any, T], thread_factor: float = 1.0) -> T:
    """Run it to its end on a loop of its own, and return its result. Raises NothingHappens when it would never end."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(thread_factor)) as runner:
        return runner.run(main)


def _telling(answer: asyncio.Future[T], result: T) -> Callable[[], object]:
    return lambda: None if answer.done() else answer.set_result(result)


def _failing(answer: asyncio.Future[T], exc: Exception) -> Callable[[], object]:
    return lambda: None if answer.done() else answer.set_exception(exc)
