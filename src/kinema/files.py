"""Files that appear under their names only when they are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO


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


def restart(file: BinaryIO) -> BinaryIO:
    """Empty the file and give it back: a broken download begins again."""
    file.seek(0)
    file.truncate()
    return file
