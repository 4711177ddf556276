"""The pictures and films that come with requests: fitted a few at once, in turn over the keys of their clients."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from kinema.inputs import Prepared, prepare
from kinema.media.decoders import Decoders
from kinema.request.capabilities import Capabilities
from kinema.request.options import GenerationOptions, Given
from kinema.service.turns import Turns


class Intake:
    """Fits inputs, each in a process of its own. All methods belong to one event loop."""

    def __init__(self, decoders: Decoders, max_at_once: int) -> None:
        self._decoders = decoders
        self._turns = Turns(max_at_once)
        # Threads of its own: a film may keep one for a minute, and storage needs those of the event loop.
        self._threads = ThreadPoolExecutor(max_at_once, "inputs")

    async def prepare(self, given: Given, options: GenerationOptions, can: Capabilities, key: str) -> Prepared:
        """Check the options and fit the inputs. When this is cancelled, the process is killed and its place is free.

        Raises as ``inputs.prepare``, and DecoderUnavailable.
        """
        async with self._turns.turn(key):
            with self._decoders.for_picture() if given.image is not None else self._decoders.for_film() as decoder:
                working = asyncio.get_running_loop().run_in_executor(
                    self._threads, prepare, given, options, can, decoder
                )
                try:
                    return await asyncio.shield(working)
                finally:
                    decoder.kill()
                    await asyncio.gather(working, return_exceptions=True)
