"""A call that blocks, as a generator of its turns.

The call runs on a thread of its own and hands each turn to ``pause``, where it waits until whoever drives it wants the
next one. One of the two threads runs at a time, and what is set for a thread alone (torch's grad mode, autocast, the
current device) stays with the call. This file knows neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

Turn = TypeVar("Turn")
Result = TypeVar("Result")


class Closed(BaseException):
    """Raised within a call that nobody waits for any more. No ``except Exception`` of a library stops it."""


@dataclass(frozen=True)
class _End(Generic[Result]):
    result: Result | None = None
    error: BaseException | None = None


def in_turns(
    call: Callable[[Callable[[Turn], None]], Result], name: str = "a call in turns"
) -> Generator[Turn, None, Result]:
    """Run ``call(pause)``; yield each value that it gives to ``pause``, and return its result.

    Nothing runs before the first ``next``. Closing the generator raises Closed where the call waits, and returns when
    its thread has ended, so all that it held is free. An error of the call is raised by ``next``.
    """
    go_on: SimpleQueue[bool] = SimpleQueue()
    said: SimpleQueue[Turn | _End[Result]] = SimpleQueue()

    def pause(turn: Turn) -> None:
        said.put(turn)
        if not go_on.get():
            raise Closed

    def run() -> None:
        said.put(_ended(call, pause))

    thread = Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        while not isinstance(turn := said.get(), _End):
            yield turn
            go_on.put(True)
    finally:
        go_on.put(False)
        thread.join()
    if turn.error is not None:
        raise turn.error
    return turn.result  # type: ignore[return-value]  # it is there when there is no error


def _ended(call: Callable[[Callable[[Turn], None]], Result], pause: Callable[[Turn], None]) -> _End[Result]:
    try:
        return _End(call(pause))
    except BaseException as exc:
        return _End(error=None if isinstance(exc, Closed) else exc)
