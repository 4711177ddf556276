"""An object store that a test can hold: what fsspec loads for ``s3://`` in a process that has this folder on its path.

The objects are files of the folder that STANDIN_FOLDER names, there whole or not at all. While ``STANDIN_FOLDER.hold``
is there, the writing of an object whose key ends in what that file says waits, after it has said so in
``STANDIN_FOLDER.held``: a slow upload, for as long as the test wants.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractFileSystem

__version__ = "2024.6.0"  # fsspec asks for it


class S3FileSystem(AbstractFileSystem):
    """As much of one as ``kinema.storage`` uses."""

    protocol = ("s3",)
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._folder = Path(os.environ["STANDIN_FOLDER"])

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_options: Any) -> None:
        self._wait_while_held(path)
        part = self._part(path)
        part.write_bytes(value)
        os.replace(part, self._file(path))

    def put_file(self, lpath: str, rpath: str, callback: Any = None, mode: str = "overwrite", **_options: Any) -> None:
        self._wait_while_held(rpath)
        part = self._part(rpath)
        shutil.copyfile(lpath, part)
        os.replace(part, self._file(rpath))

    def rm_file(self, path: str) -> None:
        self._file(path).unlink()

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        return self._describe(self._file(path))

    def ls(self, path: str, detail: bool = True, **_options: Any) -> list[Any]:
        found = [self._describe(one) for one in self._file(path).iterdir() if not one.name.startswith(".")]
        return found if detail else [one["name"] for one in found]

    def _open(self, path: str, mode: str = "rb", **_options: Any) -> Any:
        return self._file(path).open(mode)

    def _file(self, path: str) -> Path:
        return self._folder / self._strip_protocol(path)

    def _part(self, path: str) -> Path:
        """Nobody sees it: what a killed upload leaves in an object store is no object."""
        file = self._file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.with_name(f".{file.name}.{os.getpid()}")

    def _describe(self, file: Path) -> dict[str, Any]:
        status = file.stat()
        kind = "directory" if file.is_dir() else "file"
        name = str(file.relative_to(self._folder))
        return {"name": name, "size": status.st_size, "type": kind, "mtime": status.st_mtime}

    def _wait_while_held(self, path: str) -> None:
        hold, held = self._folder.with_suffix(".hold"), self._folder.with_suffix(".held")
        while hold.exists() and path.endswith(hold.read_text(encoding="utf-8")):
            held.write_text(path, encoding="utf-8")
            time.sleep(0.01)
