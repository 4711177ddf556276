"""The tables of a database, from the first step to the newest, on both kinds of database."""

from __future__ import annotations

import asyncio
from multiprocessing import connection
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from kinema.errors import ConfigError
from kinema.events import Artifact, Cancelled
from kinema.jobs.database import Database, open_engine
from kinema.jobs.migrations import FOLDER, migrate
from kinema.jobs.schema import metadata
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from tests.forked import ForkedProcess
from tests.serving import make_job
from tests.unit.jobs.test_sql import COMPLETED


@pytest.fixture
def url(new_url: str) -> str:
    """These tests make tables themselves."""
    return new_url


def _open_and_add(url: str, test: connection.Connection) -> None:
    """What another process does."""

    async def add() -> None:
        store = await SqlJobStore.open(url)
        await store.create(make_job(), limits=QueueLimits())
        await store.close()

    test.send("ready")
    test.recv()
    asyncio.run(add())


@pytest.mark.parametrize("is_new", [True, False])
async def test_the_steps_lead_to_the_tables_of_the_schema(url: str, is_new: bool) -> None:
    """Alembic finds nothing to do, neither in the tables and columns nor in the indexes and constraints.

    Neither in a new database nor in one that took every step.
    """
    if not is_new:
        take_the_first_step(url)
    database = await Database.open(url)
    differences = await database.read(lambda connection: compare_metadata(_context(connection), metadata))
    await database.close()
    assert differences == []


def take_the_first_step(url: str) -> None:
    """Make the database that the first version made."""
    engine = open_engine(url)
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(FOLDER))
        command.upgrade(config, "0001")
    engine.dispose()


def _context(connection: object) -> MigrationContext:
    options = {"compare_type": True, "compare_server_default": True}
    return MigrationContext.configure(connection, opts=options)  # type: ignore[arg-type]


async def test_processes_that_open_a_new_database_at_once_all_can_use_it(url: str) -> None:
    """One of them makes the tables and the others wait for it."""
    pipes = [connection.Pipe() for _ in range(2)]
    processes = [ForkedProcess(_open_and_add, url, its) for _, its in pipes]
    for _, its in pipes:
        its.close()
    assert [mine.recv() for mine, _ in pipes] == ["ready"] * 2
    for mine, _ in pipes:
        mine.send("go")
    assert [process.wait() for process in processes] == [0] * 2
    store = await SqlJobStore.open(url)
    assert await store.count_waiting() == 2
    await store.close()


async def test_stores_that_open_a_new_database_at_once_all_can_use_it(url: str, tmp_path: Path) -> None:
    """In one process too, where Alembic has but one state; also beside a store that opens another database."""
    other = f"sqlite:///{tmp_path / 'other.db'}"
    stores = await asyncio.gather(*(SqlJobStore.open(one) for one in [url, other] * 5))
    for store in stores:
        await store.create(make_job(), limits=QueueLimits())
    assert await stores[0].count_waiting() == await stores[1].count_waiting() == 5
    await asyncio.gather(*(store.close() for store in stores))


async def test_opening_again_changes_nothing(url: str) -> None:
    """The jobs are there."""
    first = await SqlJobStore.open(url)
    job = await first.create(make_job(), limits=QueueLimits())
    await first.close()
    second = await SqlJobStore.open(url)
    assert await second.get(job.id) == job
    await second.close()


async def test_a_database_of_a_newer_version_is_refused(url: str) -> None:
    """An older program must not write into tables that it does not know; the sentence says what to do."""
    database = await Database.open(url)
    await database.write(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    await database.close()
    with pytest.raises(ConfigError, match=r"jobs\.database_url: .*'9999', made by a newer version"):
        await Database.open(url)


async def test_tables_of_somebody_else_are_refused(url: str) -> None:
    """A table named jobs that is not ours stays as it is."""
    database = await Database.open(url)
    await database.write(lambda connection: connection.execute(text("DROP TABLE alembic_version")))
    await database.close()
    with pytest.raises(ConfigError, match=r"jobs\.database_url: .*give another database"):
        await Database.open(url)


async def test_a_step_that_fails_leaves_the_database_as_it_was(url: str) -> None:
    """All steps are one transaction, so the next start begins where this one did."""
    database = await Database.open(url)

    def migrate_and_fail(connection: object) -> None:
        for table in reversed([*metadata.sorted_tables]):
            table.drop(connection)  # type: ignore[arg-type]
        connection.execute(text("DELETE FROM alembic_version"))  # type: ignore[attr-defined]
        migrate(connection)  # type: ignore[arg-type]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await database.write(migrate_and_fail)
    await database.close()
    store = await SqlJobStore.open(url)
    await store.create(make_job(), limits=QueueLimits())
    await store.close()


def test_the_file_names_are_the_order_of_the_steps() -> None:
    """The newest step is known without Alembic, by the files' names; Alembic finds the same line of steps."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    steps = [step.revision for step in ScriptDirectory.from_config(config).walk_revisions()]
    files = sorted((path.name for path in (FOLDER / "versions").glob("*.py")), reverse=True)
    assert [name.partition("_")[0] for name in files] == steps


async def test_the_videos_of_older_jobs_count_for_their_keys(url: str) -> None:
    """Each with its manifest, thumbnail and sheet of frames, when the step is taken that begins to count."""
    manifest = Artifact(key="m", media_type="application/json", size_bytes=100, etag="h")
    completed = COMPLETED.model_copy(update={"artifact": COMPLETED.artifact.model_copy(update={"manifest": manifest})})
    store = await SqlJobStore.open(url)
    for key_id, last in (("a", completed), ("a", completed), ("b", Cancelled()), ("c", COMPLETED)):
        job = await store.create(make_job(key_id=key_id), limits=QueueLimits())
        await store.claim(["fake"], "d", 60)
        await store.record(job.id, last, attempt=1)
    before = ScriptDirectory(str(FOLDER)).get_revision("0006").down_revision

    def go_back(connection: Connection) -> None:
        for name in ("input_uses", "inputs", "stored_bytes", "arrivals"):
            connection.execute(text(f"DROP TABLE {name}"))
        connection.execute(text("DROP INDEX jobs_with_loras"))  # of later steps
        connection.execute(text("ALTER TABLE jobs DROP COLUMN loras"))
        connection.execute(text("UPDATE alembic_version SET version_num = :before"), {"before": before})

    await store.database.write(go_back)
    await store.close()
    store = await SqlJobStore.open(url)
    assert [await store.inputs.stored_bytes(key_id) for key_id in "abc"] == [212, 0, 6]
    await store.close()
