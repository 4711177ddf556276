"""A file that appears under its name only when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO


@contextmanager
def saving(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it takes the place of ``path`` when the block ends without an error. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".kinema-", dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        with unfinished.open("wb") as file:
            yield file
        os.replace(unfinished, path)


def restart(file: BinaryIO) -> BinaryIO:
    """The same file, empty: a broken download begins anew."""
    file.seek(0)
    file.truncate()
    return file
