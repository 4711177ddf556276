"""The pictures and films that come with requests, or that they name: read and fitted a few at once, in turn over the
keys of their clients.

Pictures take milliseconds and films up to a minute, so they do not wait for each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, final

from kinema.inputs import Prepared, prepare
from kinema.media.decoders import Decoders
from kinema.request.capabilities import Capabilities
from kinema.request.options import GenerationOptions, Given
from kinema.service.turns import Turns

T = TypeVar("T")

# Inputs of one client that wait for their turn; each that was sent keeps its bytes in memory.
_MAX_WAITING = 32


@final
@dataclass(frozen=True, slots=True)
class StoredInput:
    """The pictures or the film of a job in storage. ``read`` blocks, and raises FileGone and StorageUnavailable."""

    read: Callable[[], Given]
    is_picture: bool = False


class Intake:
    """Fits inputs, those of each request in a process of their own: the pictures of up to ``max_at_once`` requests, and
    half as many films.

    All methods belong to one event loop.
    """

    def __init__(self, decoders: Decoders, max_at_once: int) -> None:
        self._decoders = decoders
        max_films = max(max_at_once // 2, 1)
        self._pictures, self._films = Turns(max_at_once, _MAX_WAITING), Turns(max_films, _MAX_WAITING)
        # Threads of its own: a film may keep one for a minute, and storage needs those of the event loop.
        self._threads = ThreadPoolExecutor(max_at_once + max_films, "inputs")

    async def prepare(
        self, given: Given | StoredInput, options: GenerationOptions, can: Capabilities, key: str
    ) -> Prepared:
        """Check the options and fit the inputs. When this is cancelled, the process is killed and its place is free.

        A stored input is read when it has its turn, so it takes no memory while it waits.
        Raises as ``inputs.prepare`` and ``StoredInput.read``, DecoderUnavailable, and Overloaded when too many inputs
        of this key wait.
        """
        is_picture = given.is_picture
        async with (self._pictures if is_picture else self._films).turn(key):
            if isinstance(given, StoredInput):
                given = await self._in_thread(given.read)
            with self._decoders.for_picture() if is_picture else self._decoders.for_film() as decoder:
                return await self._in_thread(partial(prepare, given, options, can, decoder), decoder.kill)

    async def _in_thread(self, work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
        """Do the work in a thread. It has the thread until it ends, also when this is cancelled; ``stop`` ends it."""
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(working)
        finally:
            stop()
            await asyncio.gather(working, return_exceptions=True)
