"""Tells other processes on a PostgreSQL database at once of what this one has written, which they find late else.

A signal may get lost, and SQLite has none: whoever waits for one also looks from time to time. Signals are gathered for
some milliseconds and sent behind the transactions that they are about, since PostgreSQL ends transactions that send
something one after the other.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection

import structlog

from kinema.errors import StoreUnavailable
from kinema.jobs.database import Database

log = structlog.get_logger(__name__)

# The longest that a signal waits for others.
_GATHER_S = 0.02
# Words of a message, which are ids at most: PostgreSQL takes 8,000 bytes.
_WORDS = 150
# Until this process listens again after its connection broke off.
_RETRY_S = 2.0


class Signals:
    """The signals of one process from ``start`` to ``stop``. A signal is one word. ``hear`` gets those of others."""

    def __init__(self, database: Database, hear: Callable[[Collection[str]], None]) -> None:
        self._database = database
        self._hear = hear
        self._name = secrets.token_hex(8)
        self._words: dict[str, None] = {}
        self._sending: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        # Whether signals of others come in.
        self.is_listening = asyncio.Event()

    def start(self) -> None:
        if self._database.has_messages:
            self._listening = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        tasks = [task for task in (self._listening, self._sending) if task is not None]
        self._listening = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def tell(self, word: str) -> None:
        """Signal this to the other processes, soon."""
        if self._listening is None:
            return
        self._words[word] = None
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        while self._words:
            await asyncio.sleep(_GATHER_S)
            words = list(self._words)[:_WORDS]
            for word in words:
                del self._words[word]
            try:
                await self._database.send(" ".join((self._name, *words)))
            except StoreUnavailable:
                return  # others look by themselves

    async def _listen(self) -> None:
        while True:
            try:
                listener = await self._database.listen(self._receive)
            except StoreUnavailable as exc:
                log.debug("no signals of other servers come in", reason=exc.message)
            else:
                try:
                    self.is_listening.set()
                    await listener.is_lost.wait()
                finally:
                    self.is_listening.clear()
                    listener.close()
            await asyncio.sleep(_RETRY_S)

    def _receive(self, message: str) -> None:
        sender, *words = message.split()
        if sender != self._name:
            self._hear(words)
