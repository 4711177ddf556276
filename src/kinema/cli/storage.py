"""``kinema storage``: the files of a service. Arguments in, one call out; a running service goes on meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kinema.cli import options as flag
from kinema.shell import ConfigOption, err, run, settings_from

if TYPE_CHECKING:
    from kinema.settings import Settings

app = typer.Typer(help="Look after the stored files of a service, on its machine.", no_args_is_help=True)

YesOption = Annotated[bool, typer.Option("--yes", help="Do it; without this flag the command only tells.")]


@app.command()
def sweep(
    is_confirmed: YesOption = False,
    data_dir: flag.DataDirOption = None,
    storage: flag.StorageOption = None,
    database: flag.DatabaseOption = None,
    config: ConfigOption = None,
) -> None:
    """List or remove the files that belong to no video.

    Without --yes the command only lists them. A line has the folder or the file, the number of files, their bytes, and
    one word, separated by tabs: `deleted` for a video of the database that was deleted, `unknown` for a video or an
    input that it does not know, `failed` for a whole video of a job that has failed. Files of the last 15 minutes are
    left out.
    """
    settings = _settings(data_dir, storage, database, config)
    from kinema.cli.jobs_view import print_plain  # noqa: PLC0415 - imported when it runs, as all below
    from kinema.hosting import upkeep  # noqa: PLC0415

    def call() -> None:
        found = asyncio.run(upkeep.sweep(settings, removes=is_confirmed))
        for kind, stored in (("deleted", found.deleted), ("unknown", found.unknown), ("failed", found.failed)):
            for job_id, files in sorted(stored.items()):
                print_plain(f"videos/{job_id}\t{len(files.sizes)}\t{files.size_bytes}\t{kind}")
        for name, file in sorted(found.inputs.items()):
            print_plain(f"inputs/{name}\t1\t{file.size_bytes}\tunknown")
        if found.is_empty:
            err.print("every file that is older than 15 minutes belongs to a video of the database")
        else:
            done = "removed" if is_confirmed else "nothing was removed; --yes removes them"
            err.print(f"{found.num_files} files that belong to no video of the database: {done}")

    run(call)


@app.command()
def adopt(
    is_confirmed: YesOption = False,
    data_dir: flag.DataDirOption = None,
    storage: flag.StorageOption = None,
    database: flag.DatabaseOption = None,
    config: ConfigOption = None,
) -> None:
    """Compare a storage with the database, or give it to it.

    With --yes the storage becomes the database's own. No file is removed. A service with another database is then
    refused this storage.
    """
    settings = _settings(data_dir, storage, database, config)
    from kinema.cli.jobs_view import print_plain  # noqa: PLC0415
    from kinema.hosting import upkeep  # noqa: PLC0415

    def call() -> None:
        seen = asyncio.run(upkeep.adopt(settings, writes=is_confirmed))
        print_plain(f"known videos in the storage\t{seen.num_known}")
        print_plain(f"unknown videos in the storage\t{seen.num_unknown}")
        print_plain(f"finished videos in the database\t{seen.num_expected}")
        print_plain(f"id of the database that has the storage\t{seen.owner or 'none'}")
        done = "belongs to this database" if is_confirmed else "stays as it is; --yes makes it this database's own"
        err.print(f"the storage {done}")

    run(call)


def _settings(data_dir: Path | None, storage: str | None, database: str | None, config: Path | None) -> Settings:
    settings = settings_from(
        {"data_dir": data_dir, "storage.url": storage, "jobs.database_url": database}, config
    ).settings
    from kinema.hosting.logs import configure_logs  # noqa: PLC0415

    configure_logs(is_json=settings.log_format == "json")
    return settings
