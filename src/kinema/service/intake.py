"""The pictures and films that come with requests: fitted a few at once, in turn over the keys of their clients.

Pictures take milliseconds and films up to a minute, so they do not wait for each other.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from kinema.inputs import Prepared, prepare
from kinema.media.decoders import Decoders
from kinema.request.capabilities import Capabilities
from kinema.request.options import GenerationOptions, Given
from kinema.service.turns import Turns

# Inputs of one client that wait for their turn; each keeps its bytes in memory.
_MAX_WAITING = 32


class Intake:
    """Fits inputs, each in a process of its own: up to ``max_at_once`` pictures, and half as many films.

    All methods belong to one event loop.
    """

    def __init__(self, decoders: Decoders, max_at_once: int) -> None:
        self._decoders = decoders
        max_films = max(max_at_once // 2, 1)
        self._pictures, self._films = Turns(max_at_once, _MAX_WAITING), Turns(max_films, _MAX_WAITING)
        # Threads of its own: a film may keep one for a minute, and storage needs those of the event loop.
        self._threads = ThreadPoolExecutor(max_at_once + max_films, "inputs")

    async def prepare(self, given: Given, options: GenerationOptions, can: Capabilities, key: str) -> Prepared:
        """Check the options and fit the inputs. When this is cancelled, the process is killed and its place is free.

        Raises as ``inputs.prepare``, DecoderUnavailable, and Overloaded when too many inputs of this key wait.
        """
        is_picture = given.image is not None
        async with (self._pictures if is_picture else self._films).turn(key):
            with self._decoders.for_picture() if is_picture else self._decoders.for_film() as decoder:
                working = asyncio.get_running_loop().run_in_executor(
                    self._threads, prepare, given, options, can, decoder
                )
                try:
                    return await asyncio.shield(working)
                finally:
                    decoder.kill()
                    await asyncio.gather(working, return_exceptions=True)
