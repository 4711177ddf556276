"""What a person does with the files of a service: look at those without a job and remove them, or give a storage to a
database. It needs neither a worker nor HTTP, and a running service goes on meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager

from kinema.errors import ConfigError
from kinema.files import keep_private
from kinema.job import JobStatus
from kinema.jobs.database import Database, is_absent
from kinema.jobs.identity import read_identity
from kinema.jobs.input_store import SqlInputStore
from kinema.jobs.retention import SqlRetention
from kinema.masking import masked
from kinema.service.leftovers import Leftovers
from kinema.service.pairing import Acquaintance, Pairing
from kinema.service.sweeper import Sweeper
from kinema.settings import Settings
from kinema.storage import Storage


async def sweep(settings: Settings, *, removes: bool) -> Leftovers:
    """Find the stored files without a job, and with ``removes`` remove them.

    Raises ConfigError when there is no such database or the storage is not its own, StoreUnavailable, and
    StorageUnavailable, also at the end if some files could not be removed.
    """
    async with _opened(settings) as (database, storage, pairing):
        sweeper = Sweeper(SqlRetention(database), SqlInputStore(database), storage, pairing, settings.retention)
        leftovers = await sweeper.find_leftovers()
        if removes:
            await sweeper.remove(leftovers)
        return leftovers


async def prune(
    settings: Settings, ended_before: float, statuses: Collection[JobStatus], *, removes: bool
) -> Mapping[JobStatus, int]:
    """Count the jobs of these statuses that ended before that time (seconds since the epoch), and with ``removes``
    remove them with their files. Raises as ``sweep``."""
    async with _opened(settings) as (database, storage, pairing):
        sweeper = Sweeper(SqlRetention(database), SqlInputStore(database), storage, pairing, settings.retention)
        return await sweeper.prune(ended_before, statuses, removes=removes)


async def adopt(settings: Settings, *, writes: bool) -> Acquaintance:
    """Compare the storage with the database, and with ``writes`` make it the database's own. Raises as ``sweep``."""
    async with _opened(settings) as (_database, _storage, pairing):
        seen = await pairing.look()
        if writes:
            await pairing.adopt()
        return seen


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[tuple[Database, Storage, Pairing]]:
    keep_private()
    storage = Storage(settings.storage_url)
    if is_absent(settings.database_url):  # a new one would know no file
        raise ConfigError(
            f"jobs.database_url = {masked(settings.database_url)!r}: there is no database; give the --data-dir or the "
            "--database of the service"
        )
    database = await Database.open(settings.database_url)
    try:
        yield database, storage, Pairing(await read_identity(database), SqlRetention(database), storage)
    finally:
        await database.close()
