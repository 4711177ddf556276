"""Places for heavy work: who gets the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest

from kinema.service.turns import Turns


class Asking:
    """Clients of these turns, each by a name that begins with its key; ``having`` are those that have a place."""

    def __init__(self, num_places: int) -> None:
        self._turns = Turns(num_places)
        self._done: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.having: list[str] = []

    async def ask(self, *names: str) -> None:
        for name in names:
            self._done[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._hold(name))
        await settle()

    async def finish(self, name: str) -> None:
        self._done[name].set()
        await self._tasks[name]
        await settle()

    async def leave(self, *names: str) -> None:
        """Cancel them, whether they have a place or not."""
        for name in names:
            self._tasks[name].cancel()
        for name in names:
            with suppress(asyncio.CancelledError):
                await self._tasks[name]
        await settle()

    async def _hold(self, name: str) -> None:
        async with self._turns.turn(name[0]):
            self.having.append(name)
            try:
                await self._done[name].wait()
            finally:
                self.having.remove(name)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def asking(num_places: int) -> AsyncIterator[Asking]:
    it = Asking(num_places)
    async with AsyncExitStack() as stack:
        yield it
        stack.push_async_callback(it.leave, *it._tasks)


async def test_one_key_never_has_more_than_half_of_the_places() -> None:
    """However much it asks for; another key has a place at once."""
    async with asking(4) as it:
        await it.ask("a1", "a2", "a3", "a4")
        assert it.having == ["a1", "a2"]
        await it.ask("b1")
        assert it.having == ["a1", "a2", "b1"]


async def test_a_single_place_is_shared() -> None:
    """A half of it is none, and would serve nobody."""
    async with asking(1) as it:
        await it.ask("a1", "b1")
        assert it.having == ["a1"]
        await it.finish("a1")
        assert it.having == ["b1"]


async def test_keys_take_turns() -> None:
    """The order is that of the keys, not of their requests: one that asks late and once does not wait for ten."""
    async with asking(1) as it:
        await it.ask("a1", "a2", "a3", "b1", "b2", "c1")
        order = []
        while it.having:
            order += it.having
            await it.finish(it.having[0])
        assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


async def test_a_key_with_fewer_places_comes_first() -> None:
    """Even if it came later."""
    async with asking(4) as it:
        await it.ask("a1", "b1", "b2", "c1", "a2", "d1")
        assert it.having == ["a1", "b1", "b2", "c1"]
        await it.finish("b1")
        assert it.having == ["a1", "b2", "c1", "d1"]


async def test_whoever_leaves_frees_the_place() -> None:
    """While it waits, and while it has one."""
    async with asking(2) as it:
        await it.ask("a1", "a2", "a3", "b1")
        assert it.having == ["a1", "b1"]
        await it.leave("a2")
        await it.leave("a1")
        assert it.having == ["b1", "a3"]


async def test_a_place_that_is_given_to_one_who_leaves_is_not_lost() -> None:
    """Both may happen between two looks of the event loop."""
    turns = Turns(1)
    async with turns.turn("a"):
        leaving = asyncio.create_task(turns.turn("b").__aenter__())
        await settle()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    async with asyncio.timeout(1), turns.turn("c"):
        pass
