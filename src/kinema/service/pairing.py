"""A job database and a storage know each other by an id that both keep, so that no database removes another's videos.

A storage without an id gets that of the first database that starts with it, unless the files there tell that they
belong to another one, or their absence that they are elsewhere. Nothing is removed here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from kinema.errors import ConfigError
from kinema.ids import JobId
from kinema.jobs.identity import Identity
from kinema.jobs.retention import JobEnd, SqlRetention
from kinema.storage import TEMPORARY_NAME, Storage, StoredJob

_ADOPT = "`kinema storage adopt` makes this storage the database's own"


@dataclass(frozen=True, slots=True)
class Acquaintance:
    """What a database and a storage have of each other.

    ``owner`` is the id that the storage has, ``num_known`` and ``num_unknown`` count the jobs with files there, and
    ``num_expected`` the finished videos of the database.
    """

    owner: str | None
    num_known: int
    num_unknown: int
    num_expected: int


class Pairing:
    """A database and its storage. Every method may raise StoreUnavailable and StorageUnavailable."""

    def __init__(self, identity: Identity, jobs: SqlRetention, storage: Storage) -> None:
        self.store_id = identity.store_id
        self._jobs = jobs
        self._storage = storage

    async def check(self) -> None:
        """Return when the storage is this database's, and write that down where nothing was written.

        Raises ConfigError, which says what to do, for a storage of another database, and for one without an id that has
        unknown files, or none where there should be some.
        """
        owner = await asyncio.to_thread(self._storage.read_owner)
        if owner is None:
            owner = await self._claim()
        if owner != self.store_id:
            raise ConfigError(
                f"storage.url = {self._storage.name!r}: these videos belong to another job database (id {owner[:32]}) "
                f"than jobs.database_url (id {self.store_id}); give the two that belong together, or an empty place "
                f"for new videos; {_ADOPT}"
            )

    async def look(self) -> Acquaintance:
        """Compare the two."""
        owner = await asyncio.to_thread(self._storage.read_owner)
        stored = await asyncio.to_thread(self._storage.list_jobs)
        ends = await self._jobs.ends(list(stored))
        unknown = await find_unknown(self._jobs, stored, ends)
        return Acquaintance(owner, len(ends), len(unknown), await self._jobs.count_videos())

    async def adopt(self) -> None:
        """Make the storage this database's, whatever is in it."""
        await asyncio.to_thread(self._storage.write_owner, self.store_id)

    async def _claim(self) -> str:
        """Write the id into a storage without one, unless what is there speaks against it; return the id there."""
        seen = await self.look()
        mistake = None if seen.owner else self._mistake(seen)
        if mistake is None:
            return await asyncio.to_thread(self._storage.claim, self.store_id)
        # Meanwhile another server of this database may have claimed it and taken the first inputs.
        owner = await asyncio.to_thread(self._storage.read_owner)
        if owner is None:
            raise ConfigError(f"storage.url = {self._storage.name!r}: {mistake}")
        return owner

    def _mistake(self, seen: Acquaintance) -> str | None:
        if seen.num_unknown > seen.num_known:
            return (
                f"{seen.num_unknown} of the {seen.num_unknown + seen.num_known} videos there are not in "
                f"jobs.database_url; give the database that they belong to, or an empty place for new videos; {_ADOPT}"
            )
        is_empty = not (seen.num_known or seen.num_unknown)
        if is_empty and seen.num_expected and not self._storage.is_volatile:
            return (
                f"there is no video, but {seen.num_expected} of jobs.database_url should have one; is this the place "
                f"where they were stored, and is it mounted? If it is, {_ADOPT}"
            )
        return None


async def find_unknown(
    jobs: SqlRetention, stored: Mapping[JobId, StoredJob], ends: Mapping[JobId, JobEnd]
) -> dict[JobId, StoredJob]:
    """The stored jobs that the database does not know and never has, and that nobody has marked as temporary.

    ``ends`` has the jobs of the database. Raises StoreUnavailable.
    """
    absent = [job_id for job_id, files in stored.items() if job_id not in ends and TEMPORARY_NAME not in files.sizes]
    deleted = await jobs.deleted(absent)
    return {job_id: stored[job_id] for job_id in absent if job_id not in deleted}
