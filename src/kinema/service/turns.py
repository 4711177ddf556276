"""Places for heavy work, given in turn to those who ask: whoever asks for much holds up nobody but themselves."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from kinema.errors import Overloaded


class Turns:
    """A number of places. One key has at most half of them, so that another key need not wait for it.

    Of one key, ``max_waiting`` wait; None: any number. All methods belong to one event loop.
    """

    def __init__(self, num_places: int, max_waiting: int | None = None) -> None:
        self._num_free = num_places
        self._max_waiting = max_waiting
        self._most = max(num_places // 2, 1)
        self._active: Counter[str] = Counter()
        # The keys that wait, from the one whose last turn is longest ago.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncGenerator[None, None]:
        """Wait for a place, and hold it during the block. Raises Overloaded when too many of this key wait."""
        await self._take(key)
        try:
            yield
        finally:
            self._leave(key)

    async def _take(self, key: str) -> None:
        if self._max_waiting is not None and len(self._waiting.get(key, ())) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} of your pictures or films wait to be read; try again later")
        place = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(place)
        self._give()
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._forget(key, place)
            else:  # the place was given in the same moment
                self._leave(key)
            raise

    def _leave(self, key: str) -> None:
        self._num_free += 1
        self._active[key] -= 1
        if not self._active[key]:
            del self._active[key]
        if key in self._waiting:
            self._waiting[key] = self._waiting.pop(key)  # behind the other keys
        self._give()

    def _give(self) -> None:
        """Give free places: first to the keys that have the fewest, and of these to the one that waited longest."""
        while self._num_free and (keys := [key for key in self._waiting if self._active[key] < self._most]):
            key = min(keys, key=self._active.__getitem__)
            places = self._waiting.pop(key)
            place = places.popleft()
            if places:
                self._waiting[key] = places
            if not place.cancelled():
                self._num_free -= 1
                self._active[key] += 1
                place.set_result(None)

    def _forget(self, key: str, place: asyncio.Future[None]) -> None:
        places = self._waiting.get(key)
        if places is not None and place in places:
            places.remove(place)
            if not places:
                del self._waiting[key]
