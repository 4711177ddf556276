"""An object store that a test can hold: what fsspec loads for ``s3://`` in a process that has this folder on its path.

The objects are files of the folder that STANDIN_FOLDER names, there whole or not at all. While ``STANDIN_FOLDER.hold``
is there, the writing of an object whose key ends in what that file says waits, after it has said so in
``STANDIN_FOLDER.held``: a slow upload, for as long as the test wants.
"""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec.asyn import get_loop
from fsspec.spec import AbstractFileSystem

__version__ = "2024.6.0"  # fsspec asks for it


class _Body:
    """The bytes of an answer."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    async def read(self, size: int) -> bytes:
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()


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

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return get_loop()

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = self._strip_protocol(path).partition("/")
        return bucket, key, None

    def call_s3(self, method: str, **asked: Any) -> dict[str, Any]:
        """A request of a reader, or one for a list, which is one page."""
        if method == "get_object":
            first, _, last = asked.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            data = self._file(f"{asked['Bucket']}/{asked['Key']}").read_bytes()
            return {"Body": _Body(data[int(first) : int(last) + 1 if last else None])}
        assert method == "list_objects_v2", method
        bucket = self._file(asked["Bucket"])
        found = [(file, str(file.relative_to(bucket))) for file in bucket.rglob("*") if not file.name.startswith(".")]
        return {
            "Contents": [
                {
                    "Key": key,
                    "Size": file.stat().st_size,
                    "LastModified": datetime.fromtimestamp(file.stat().st_mtime, UTC),
                }
                for file, key in found
                if key.startswith(asked["Prefix"]) and file.is_file()
            ]
        }

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
