"""Calls that are answered together: those that come while a group is answered share the next one.

A transaction costs much more than what it does for one caller. So the busier a server is, the fewer transactions it
needs for each call; a call that comes alone waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Call = TypeVar("Call")
Answer = TypeVar("Answer")


class Gathering(Generic[Call, Answer]):
    """One line of calls. Belongs to one event loop.

    ``answer_all`` gets up to ``most`` calls, after they were made, and returns an answer for each, or the exception
    that its caller gets; what it raises, all of them get.
    """

    def __init__(
        self, answer_all: Callable[[Sequence[Call]], Awaitable[Sequence[Answer | Exception]]], most: int
    ) -> None:
        self._answer_all = answer_all
        self._most = most
        self._waiting: deque[tuple[Call, asyncio.Future[Answer]]] = deque()
        self._answering: asyncio.Task[None] | None = None

    async def ask(self, call: Call) -> Answer:
        """The answer to this call. It is also found when the caller is cancelled, so that none is left in between."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, answer))
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer())
        return await answer

    async def _answer(self) -> None:
        while self._waiting:
            together = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            try:
                answers = await self._answer_all([call for call, _ in together])
                assert len(answers) == len(together)
            except Exception as exc:  # after any error, no caller may wait for ever
                answers = [exc] * len(together)
            for (_, future), answer in zip(together, answers, strict=True):
                if future.done():  # its caller was cancelled
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
