"""The files of inputs: stored once, however many jobs of a key use them, and deleted when none does.

``jobs/input_store.py`` says which files are used. A file is written before its job is created and deleted after its
last use has ended, by any server.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import structlog

from kinema.errors import KinemaError, StorageUnavailable, StoreUnavailable
from kinema.ids import JobId
from kinema.inputs import InputData, Prepared
from kinema.jobs.input_store import HeldInput, SqlInputStore
from kinema.request.request import GenerationRequest
from kinema.storage import Storage, input_key

log = structlog.get_logger(__name__)

# A submission that has held its inputs for so long is not there any more.
HELD_S = 15 * 60.0
# Seconds between two searches for files that another server has left.
_EVERY_S = 60.0
# Files that are deleted before their rows are.
_BATCH = 100


class StoredInputs:
    """Keeps the inputs of jobs in storage. From ``start`` to ``stop`` it deletes those that no job uses."""

    def __init__(self, store: SqlInputStore, storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._storage = storage
        self._clock = clock
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._clean_loop(), name="inputs")

    async def stop(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    async def hold(
        self, job_id: JobId, key_id: str, prepared: Prepared, max_bytes: int | None = None
    ) -> GenerationRequest:
        """Store the inputs for a job that is to be created, and return its request with their keys.

        Raises QuotaExceeded when the key would have more than ``max_bytes``, and StorageUnavailable.
        """
        made = await asyncio.to_thread(lambda: [(_digest(file), file) for file in prepared.files()])
        files = dict(made)  # the same picture as first and last frame is one file
        sizes = {digest: len(file.data) for digest, file in files.items()}
        try:
            held = await self._store.hold(job_id, key_id, sizes, max_bytes)
            await asyncio.to_thread(self._put, files, held)
        except BaseException:  # also when the submission is cut short
            await self.let_go(job_id, key_id)
            raise
        return prepared.request.with_keys((file.field, input_key(held[digest].name)) for digest, file in made)

    async def let_go(self, job_id: JobId, key_id: str) -> None:
        """Give up what was held for a job that was not created. What cannot be given up now is found later."""
        with suppress(StoreUnavailable):
            await self._store.let_go(job_id, key_id)
        await self.clean()

    async def clean(self) -> None:
        """Delete the files that no job uses; what cannot be deleted now is tried again."""
        last = ""
        try:
            while names := await self._store.dropped(_BATCH, after=last):
                await self._store.forget(await asyncio.to_thread(self._delete, names))
                last = names[-1]
        except StoreUnavailable as exc:
            log.warning("inputs that no job uses could not be deleted; it is tried again", reason=exc.message)

    async def _clean_loop(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_EVERY_S):
                    await self._store.has_dropped.wait()
            self._store.has_dropped.clear()
            try:
                if count := await self._store.let_go_held_before(self._clock() - HELD_S):
                    log.info("inputs of submissions that were cut short were given up", submissions=count)
                await self.clean()
            except KinemaError as exc:
                log.warning("inputs could not be looked through; it is tried again", reason=exc.message)
            except Exception:
                log.exception("cleaning inputs failed")

    def _put(self, files: Mapping[str, InputData], held: Mapping[str, HeldInput]) -> None:
        for digest, file in files.items():
            key = input_key(held[digest].name)
            # A file that is known and gone: the storage was restored, or somebody has tidied it.
            if not (held[digest].is_stored and self._storage.has(key, len(file.data))):
                self._storage.put_bytes(key, file.data, file.media_type)

    def _delete(self, names: Sequence[str]) -> list[str]:
        """Delete the files, and return the names of those that are gone: one that stays keeps no other."""
        gone = []
        for name in names:
            try:
                self._storage.delete(input_key(name))
                gone.append(name)
            except StorageUnavailable as exc:
                log.warning("an input that no job uses could not be deleted; it is tried again", reason=exc.message)
        return gone


def _digest(file: InputData) -> str:
    return hashlib.sha256(file.data).hexdigest()
