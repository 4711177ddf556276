"""The processes that decode the films of one generation, and end with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from kinema.media.decoders import Decoder, DecoderProcess, Decoders, OwnProcess


class FilmDecoders:
    """Starts the decoders of one generation. All methods may be called on any thread.

    Without ``decoders`` films are decoded in this process, which ``end`` does not stop.
    """

    def __init__(self, decoders: Decoders | None = None) -> None:
        self._decoders = decoders
        self._lock = threading.Lock()
        self._running: set[DecoderProcess] = set()
        self._has_ended = False

    def end(self) -> None:
        """Kill every decoder, also those to come, because nobody wants the video any more.

        Whoever waits for one gets InvalidRequest.
        """
        with self._lock:
            self._has_ended = True
            for decoder in self._running:
                decoder.kill()

    def for_film(self) -> AbstractContextManager[Decoder]:
        """As ``Decoders.for_film``."""
        return nullcontext(OwnProcess()) if self._decoders is None else self._until_end(self._decoders.for_film)

    def for_stored_film(self) -> AbstractContextManager[Decoder]:
        """As ``Decoders.for_stored_film``."""
        return nullcontext(OwnProcess()) if self._decoders is None else self._until_end(self._decoders.for_stored_film)

    @contextmanager
    def _until_end(self, start: Callable[[], DecoderProcess]) -> Iterator[Decoder]:
        with start() as decoder:
            with self._lock:
                self._running.add(decoder)
                if self._has_ended:
                    decoder.kill()
            try:
                yield decoder
            finally:
                with self._lock:  # before its descriptor is closed, which may then be another file's
                    self._running.remove(decoder)
