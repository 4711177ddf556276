"""Files that appear under their names only when they are whole, and files that only their owner may read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

_PRIVATE_FOLDER, _PRIVATE_FILE = 0o700, 0o600
_OTHERS = 0o077


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, in the folder of ``path``; the file takes the place of ``path`` when the block ends.

    Until then ``path`` is not touched; on an error or Ctrl-C nothing new is left. A link stays, and the file that it
    points to is replaced. Missing folders are made. Raises OSError.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".kinema-", dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        yield unfinished
        os.replace(unfinished, target)


def keep_private() -> None:
    """Let this process and its children make files and folders that no other user can read, whoever starts it."""
    os.umask(0o077)


def make_private_folder(path: Path) -> None:
    """Make the folder and those above it that are missing, for this user alone. Raises OSError."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir(mode=_PRIVATE_FOLDER, exist_ok=True)
    path.mkdir(exist_ok=True)


def make_private_file(path: Path) -> None:
    """Make an empty file for this user alone, or take the rights of others from one that is there. Raises OSError."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE_FILE))
    except FileExistsError:  # not opened: SQLite would lose its locks on a file that is opened and closed again
        withdraw_rights(path)


def withdraw_rights(path: Path) -> None:
    """Take the rights of others from a file or folder, if there is one and this user owns it.

    A folder that everybody may write to, for instance /tmp, stays as it is.
    """
    with suppress(OSError):
        status = path.stat()
        is_shared = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_uid == os.geteuid() and not is_shared:
            path.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS)


def restart(file: BinaryIO) -> BinaryIO:
    """Empty the file and give it back: a broken download begins again."""
    file.seek(0)
    file.truncate()
    return file
