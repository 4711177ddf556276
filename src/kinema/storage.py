"""Where files live: artifacts under keys that are made only of the job id and the attempt, inputs under names that the
job database gives.

Beside them lies one file with the id of the job database that they belong to. One class over fsspec, so that a folder,
memory and an object store are used alike. All calls block; callers on an event loop run them in a thread. This file
knows only the ids of jobs, and nothing of HTTP.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from kinema.errors import ConfigError, FileGone, StorageFull, StorageUnavailable
from kinema.events import Artifact
from kinema.files import make_private_folder
from kinema.ids import JobId, is_job_id
from kinema.masking import masked, without_secrets
from kinema.request.formats import OutputFormat

CHECKPOINT_NAME = "checkpoint"
TEMPORARY_NAME = "temporary"
# The id of the job database whose jobs these are. It is beside the folder of the jobs.
OWNER_KEY = "kinema-store-id"
# Written over again and again, to find out whether files can be written.
_CHECK_KEY = "kinema-write-check"
# Large enough for few calls to the store, small enough that a slow client holds little memory.
CHUNK_BYTES = 256 * 1024

# A file that is sent to S3 goes in parts, of which so many are in memory at a time.
_PART_BYTES = 8 * 1024 * 1024
_PARTS_AT_ONCE = 2

# The extra that installs each protocol; None: fsspec has it itself.
_EXTRAS: dict[str, str | None] = {
    "file": None,
    "memory": None,
    "s3": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
}
# Protocols that sign links to their files, with the ``sign`` of their filesystem.
_SIGNING = frozenset({"s3", "gs", "gcs", "az", "abfs"})
_ACCEPTED = "file:///folder, memory://, s3://bucket/folder, gs://bucket/folder or az://container/folder"
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
# fsspec reads it as the end of one place and the beginning of another.
_CHAINED = "::"
# The names of inputs, and of their unfinished files.
_INPUT = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}|\.[0-9a-f]{64}-[0-9a-f]{16}\.[0-9a-f]+\.part")
_FULL = (errno.ENOSPC, errno.EDQUOT)
# The errors of a place that is wrong and not away: nothing is there, or it may not be written. Filesystems of object
# stores raise these kinds for a missing bucket and for denied access.
_WRONG = (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
# The names that filesystems use for the time of the last write, the most reliable first: folders, s3, az, gs, memory.
_MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "created")


def video_key(job_id: JobId, attempt: int, kind: OutputFormat = "mp4") -> str:
    """The key of the attempt's video. Raises ValueError for an id that is not one of ours.

    Each attempt has its own file, so an attempt that was given up cannot remove the file of a later one.
    """
    return _check(f"videos/{_check_segment(job_id)}/{attempt}.{kind}")


def thumbnail_key(job_id: JobId, attempt: int) -> str:
    """The key of the attempt's thumbnail. Raises ValueError as ``video_key``."""
    return _check(f"videos/{_check_segment(job_id)}/{attempt}.webp")


def spritesheet_key(job_id: JobId, attempt: int) -> str:
    """The key of the attempt's sheet of frames. Raises ValueError as ``video_key``."""
    return _check(f"videos/{_check_segment(job_id)}/{attempt}.jpg")


def manifest_key(job_id: JobId, attempt: int) -> str:
    """The key of the attempt's manifest. Raises ValueError as ``video_key``."""
    return _check(f"videos/{_check_segment(job_id)}/{attempt}.json")


def image_key(job_id: JobId) -> str:
    """The key of the job's first frame. Raises ValueError for an id that is not one of ours."""
    return _check(f"videos/{_check_segment(job_id)}/input.png")


def last_frame_key(job_id: JobId) -> str:
    """The key of the job's last frame. Raises ValueError for an id that is not one of ours."""
    return _check(f"videos/{_check_segment(job_id)}/last_frame.png")


def film_key(job_id: JobId) -> str:
    """The key of the video that the job extends or edits, in any format. Raises ValueError as the others.

    It is the job's own copy, so that deleting the source video does not affect the job.
    """
    return _check(f"videos/{_check_segment(job_id)}/input.film")


def other_input_key(job_id: JobId, number: int) -> str:
    """The key of a further input of the job. Raises ValueError as the others."""
    return _check(f"videos/{_check_segment(job_id)}/input-{number}")


def input_key(name: str) -> str:
    """The key of an input that jobs share. Raises ValueError as the others.

    The job database gives the name: the SHA-256 of the bytes, a dash, and 64 random bits, in hex.
    """
    return _check(f"inputs/{_check_segment(name)}")


def checkpoint_key(job_id: JobId) -> str:
    """The key of the job's newest checkpoint, for every attempt. Raises ValueError as the others."""
    return _check(f"videos/{_check_segment(job_id)}/{CHECKPOINT_NAME}")


def temporary_key(job_id: JobId) -> str:
    """The key of a file that says: no database knows this job, and its files may be removed. Raises ValueError."""
    return _check(f"videos/{_check_segment(job_id)}/{TEMPORARY_NAME}")


@dataclass(frozen=True, slots=True)
class StoredJob:
    """The stored files of a job: their names and sizes in bytes, and the time of the newest write.

    Unfinished files are among them; their names begin with a dot and end in ``.part``.
    """

    sizes: Mapping[str, int]
    modified_at: float

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())

    def without(self, names: Sequence[str]) -> StoredJob:
        return StoredJob({name: size for name, size in self.sizes.items() if name not in names}, self.modified_at)


@dataclass(frozen=True, slots=True)
class StoredInput:
    """The file of an input, its size in bytes and the time of its last write."""

    size_bytes: int
    modified_at: float


@dataclass(frozen=True, slots=True)
class _Found:
    """A file, or with an empty name the folder for it. The time is in seconds since the epoch."""

    job_id: JobId
    name: str
    size_bytes: int
    modified_at: float


class Storage:
    """Files under one fsspec URL. An ETag is the start of the content's SHA-256 in hex, without quotes.

    Keys are relative paths of plain names; any other key is our own mistake and a ValueError.
    """

    def __init__(self, url: str, public_url: str | None = None) -> None:
        """Open the storage. ``public_url`` is the address where the folder is served over HTTP, if it is. Only then may
        other users of this machine read its files.

        Raises ConfigError for a URL that names no place, and for a protocol that is unknown or not installed.
        """
        self._public_url = public_url
        self._protocol = _protocol(url)
        self._fs, self._root = _open_filesystem(url, self._protocol)
        # What errors call the storage.
        self.name = masked(url)

    @property
    def is_volatile(self) -> bool:
        """Whether the files end with the process."""
        return self._protocol == "memory"

    def put_bytes(self, key: str, data: bytes, media_type: str) -> Artifact:
        """Store the bytes, and replace an existing file. Raises StorageUnavailable with the reason."""
        path = self._path(key)
        with _translated(f"cannot write {key}"):
            if isinstance(self._fs, LocalFileSystem):
                with self._part_of(Path(path)) as part:
                    part.write_bytes(data)
                    os.replace(part, path)
            else:
                self._fs.pipe_file(path, data, **self._arguments(media_type))
        return Artifact(
            key=key, media_type=media_type, size_bytes=len(data), etag=_etag(hashlib.sha256(data).hexdigest())
        )

    def put_file(self, path: Path, key: str, media_type: str, sha256: Callable[[], str]) -> Artifact:
        """Store a local file, and replace an existing one. Nobody may change the file afterwards: on the same disk, it
        has two names then. ``sha256`` gives the file's, in hex; it is asked once the file is stored.

        Raises StorageUnavailable with the reason.
        """
        target = self._path(key)
        with _translated(f"cannot write {key}"):
            if isinstance(self._fs, LocalFileSystem):
                with self._part_of(Path(target)) as part:
                    _link_or_copy(path, part)
                    os.replace(part, target)
            else:
                self._fs.put_file(str(path), target, **self._arguments(media_type), **self._parts())
            size_bytes = path.stat().st_size
        return Artifact(key=key, media_type=media_type, size_bytes=size_bytes, etag=_etag(sha256()))

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from ``start`` to ``end`` (exclusive; None: to the last one) in chunks of 256 KiB.

        Raises FileGone at the first chunk when there is no such file, StorageUnavailable when there is no answer.
        """
        path = self._path(key)
        if self._protocol == "s3":
            with _translated(f"cannot read {key}"):
                yield from _stream_s3(self._fs, path, start, end)
            return
        with _translated(f"cannot read {key}"), self._open(path) as file:
            file.seek(start)
            left = None if end is None else end - start
            while left is None or left > 0:
                chunk: bytes = file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
                if not chunk:
                    return
                left = None if left is None else left - len(chunk)
                yield chunk

    def _open(self, path: str) -> Any:  # noqa: ANN401 - a file of the filesystem's own kind
        try:
            return self._fs.open(path, "rb")
        except FileNotFoundError as exc:
            raise FileGone() from exc

    @property
    def has_links(self) -> bool:
        """Whether files can be opened by a URL: object stores sign one, a folder may be served at a public URL."""
        return self._public_url is not None or self._protocol in _SIGNING

    def link(self, key: str, expires_s: int, **headers: str) -> str | None:
        """A URL that opens the file; a signed one is valid for the given time. None if ``has_links`` is false.

        On s3 ``headers`` are parameters of the request that is signed, such as ResponseContentDisposition.

        Raises StorageUnavailable with the reason, for instance when the credentials cannot sign.
        """
        path = self._path(key)
        if self._public_url is not None:
            return f"{self._public_url.rstrip('/')}/{key}"
        if not self.has_links:
            return None
        with _translated(f"cannot sign a link to {key}"):
            return str(self._fs.sign(path, expiration=expires_s, **(headers if self._protocol == "s3" else {})))

    def delete(self, key: str) -> None:
        """Remove the file; a missing one is fine. Raises StorageUnavailable with the reason."""
        path = self._path(key)
        with _translated(f"cannot delete {key}"):
            try:
                self._fs.rm_file(path)
            except FileNotFoundError:
                return

    def check(self) -> None:
        """Write a small file over the one of the last check. Raises StorageUnavailable, or StorageFull."""
        self.put_bytes(_CHECK_KEY, b"", "text/plain")

    def read_owner(self) -> str | None:
        """The id of the job database whose files these are; None before one was written. Raises StorageUnavailable."""
        try:
            return b"".join(self.read(OWNER_KEY)).decode("ascii", "replace").strip() or None
        except FileGone:
            return None

    def write_owner(self, store_id: str) -> None:
        """Write the id of the job database, in place of another one. Raises StorageUnavailable with the reason."""
        self.put_bytes(OWNER_KEY, f"{store_id}\n".encode(), "text/plain")

    def claim(self, store_id: str) -> str:
        """Write the id of the job database if there is none, and return the id that is there then.

        Of several databases that do this at once, one gets the storage. Raises StorageUnavailable with the reason.
        """
        data = f"{store_id}\n".encode()
        try:
            self._create(self._path(OWNER_KEY), data)
        except Exception:  # it is there already, or this store does not know a write that replaces nothing
            if self.read_owner() is None:
                self.write_owner(store_id)
        return self.read_owner() or store_id

    def _create(self, path: str, data: bytes) -> None:
        """Write a file that is not there. Raises an exception of the filesystem's own when it is."""
        if isinstance(self._fs, LocalFileSystem):
            with self._part_of(Path(path)) as part:
                part.write_bytes(data)
                os.link(part, path)
        else:
            self._fs.pipe_file(path, data, mode="create", **self._arguments("text/plain"))

    def has(self, key: str, size_bytes: int) -> bool:
        """Whether there is a file of this size. Raises StorageUnavailable with the reason."""
        path = self._path(key)
        with _translated(f"cannot look for {key}"):
            try:
                return int(self._fs.info(path)["size"]) == size_bytes
            except FileNotFoundError:
                return False

    def free_bytes(self) -> int | None:
        """The free space of the disk that a local folder is on; None for other storages. Raises StorageUnavailable."""
        if not isinstance(self._fs, LocalFileSystem):
            return None
        folder = Path(self._root)
        with _translated("cannot measure the free space"):
            while not os.path.exists(folder):  # it is made with the first file
                folder = folder.parent
            return shutil.disk_usage(folder).free

    def list_jobs(self) -> dict[JobId, StoredJob]:
        """All jobs that have files, or an empty folder. Raises StorageUnavailable with the reason.

        Files that are not under the id of a job are not ours, and are left out.
        """
        sizes: dict[JobId, dict[str, int]] = defaultdict(dict)
        modified: dict[JobId, float] = defaultdict(float)
        with _translated("cannot list the files"):
            for found in self._find_all():
                modified[found.job_id] = max(modified[found.job_id], found.modified_at)
                if found.name:
                    sizes[found.job_id][found.name] = found.size_bytes
        return {job_id: StoredJob(sizes[job_id], modified_at) for job_id, modified_at in modified.items()}

    def list_inputs(self) -> dict[str, StoredInput]:
        """The files of inputs by their names, unfinished ones too. Raises StorageUnavailable with the reason.

        Files with other names are not ours, and are left out.
        """
        with _translated("cannot list the inputs"):
            return {name: file for name, file in self._find_inputs() if _INPUT.fullmatch(name)}

    def delete_input(self, name: str) -> None:
        """Remove a file that ``list_inputs`` has named; a missing one is fine. Raises StorageUnavailable."""
        _check_segment(name.removeprefix("."))
        with _translated("cannot delete an input"):
            self._remove([f"{self._path('inputs')}/{name}"])

    def delete_job(self, job_id: JobId) -> None:
        """Remove all files of the job; none is fine. Raises StorageUnavailable with the reason."""
        folder = self._job_folder(job_id)
        with _translated(f"cannot delete the files of {job_id}"), suppress(FileNotFoundError):
            if isinstance(self._fs, LocalFileSystem):
                self._remove([entry.path for entry in os.scandir(folder)])
                os.rmdir(folder)
            else:
                self._remove(self._fs.find(folder))

    def delete_files(self, job_id: JobId, names: Sequence[str]) -> None:
        """Remove those files of the job, named as ``list_jobs`` does; missing ones are fine.

        Raises StorageUnavailable with the reason.
        """
        folder = self._job_folder(job_id)
        for name in names:
            _check_segment(name.removeprefix("."))
        with _translated(f"cannot delete files of {job_id}"):
            self._remove(f"{folder}/{name}" for name in names)

    def _remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            with suppress(FileNotFoundError):
                self._fs.rm_file(path)

    def _job_folder(self, job_id: JobId) -> str:
        return self._path(f"videos/{_check_segment(job_id)}")

    def _find_all(self) -> Iterator[_Found]:
        folder = self._path("videos")
        if isinstance(self._fs, LocalFileSystem):
            yield from _find_local(Path(folder))
            return
        for path, info in self._walk(folder):
            job_id, _, name = path.strip("/").removeprefix(f"{folder.strip('/')}/").partition("/")
            if is_job_id(job_id) and name and "/" not in name:
                yield _Found(JobId(job_id), name, info["size"], _modified_at(info))

    def _walk(self, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The files under the folder of an object store, with what it tells of them."""
        if self._protocol == "s3":
            return _walk_s3(self._fs, folder)
        return iter(self._fs.find(folder, detail=True).items())

    def _find_inputs(self) -> Iterator[tuple[str, StoredInput]]:
        folder = self._path("inputs")
        if isinstance(self._fs, LocalFileSystem):
            for file in _scan(Path(folder)):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    yield file.name, StoredInput(status.st_size, status.st_mtime)
            return
        for path, info in self._walk(folder):
            name = path.strip("/").removeprefix(f"{folder.strip('/')}/")
            yield name, StoredInput(info["size"], _modified_at(info))

    @contextmanager
    def _part_of(self, path: Path) -> Iterator[Path]:
        """An empty file with a temporary name beside ``path``, to be filled and renamed; else it is removed.

        So a reader sees the whole file or none. The modes do not depend on the umask.
        """
        if self._public_url is None:
            make_private_folder(path.parent)
        else:
            _make_public_folder(path.parent)
        part = _part_beside(path)
        try:
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.fchmod(file, 0o600 if self._public_url is None else 0o644)
            os.close(file)
            yield part
        finally:
            part.unlink(missing_ok=True)

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{_check(key)}"

    def _parts(self) -> dict[str, object]:
        """How a file is sent in parts, where the filesystem would hold hundreds of megabytes of it."""
        return {"chunksize": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE} if self._protocol == "s3" else {}

    def _arguments(self, media_type: str) -> dict[str, object]:
        """The arguments for a write: the media type where the filesystem accepts one, and permission to replace."""
        match self._protocol:
            case "s3":
                return {"ContentType": media_type}
            case "gs" | "gcs":
                return {"content_type": media_type}
            case "az" | "abfs":
                return {"overwrite": True}  # adlfs does not replace files by default, and guesses the type from the key
        return {}


def _part_beside(path: Path) -> Path:
    """A new temporary name in the folder of ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def _link_or_copy(source: Path, part: Path) -> None:
    """Put the file ``source`` in place of ``part``, with the mode of this one; a copy of it where that cannot be."""
    linked = _part_beside(part)
    try:
        source.chmod(part.stat().st_mode)
        os.link(source, linked)
        os.replace(linked, part)
    except OSError:  # another disk, or one that has no links
        shutil.copyfile(source, part)
    finally:
        linked.unlink(missing_ok=True)


def is_wrong_place(error: StorageUnavailable) -> bool:
    """Whether to wait would not help: the place does not exist, or nothing may be written there."""
    cause = error.__cause__
    return isinstance(cause, _WRONG) or (isinstance(cause, OSError) and cause.errno == errno.EROFS)


def _check(key: str) -> str:
    for segment in key.split("/"):
        _check_segment(segment)
    return key


def _check_segment(segment: str) -> str:
    """Refuse a separator or a leading dot, so that '..', absolute paths and hidden files are not possible."""
    if not _SEGMENT.fullmatch(segment):
        raise ValueError(f"{segment!r} is not a plain name")
    return segment


def _protocol(url: str) -> str:
    protocol, separator, _ = url.partition("://")
    if not separator or protocol not in _EXTRAS:
        raise ConfigError(f"storage.url = {masked(url)!r}: not a place that files can go to; accepted are {_ACCEPTED}")
    return protocol


def _open_filesystem(url: str, protocol: str) -> tuple[Any, str]:
    """The filesystem and the root folder in it. This reads and writes nothing."""
    name = masked(url)
    if protocol not in {"file", "memory"} and _has_credentials(url):
        raise ConfigError(
            f"storage.url = {name!r}: a URL with a key and a secret is not accepted; give them to the library as it "
            "reads them, for instance as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    has_place = bool(url.partition("://")[2].strip("/"))
    if not has_place and protocol != "memory":
        raise ConfigError(f"storage.url = {name!r}: names no folder or bucket; accepted are {_ACCEPTED}")
    if protocol == "file":  # everything behind it is a path, also what other URLs have as a query or a second place
        return LocalFileSystem(use_listings_cache=False), str(LocalFileSystem._strip_protocol(url))
    if _CHAINED in url:
        raise ConfigError(f"storage.url = {name!r}: {_CHAINED} would name a second place; {_ACCEPTED}")
    try:
        filesystem, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as exc:
        extra = _EXTRAS[protocol]
        raise ConfigError(f"storage.url = {name!r}: needs a package; pip install 'kinema[{extra}]'") from exc
    except Exception as exc:  # each filesystem has its own errors for a wrong URL or wrong credentials
        reason = without_secrets(_reason(exc), [url])
        raise ConfigError(f"storage.url = {name!r}: {reason}; accepted are {_ACCEPTED}") from exc
    return filesystem, str(root)


def _has_credentials(url: str) -> bool:
    """Whether there is a user and a password before the bucket, which none of these filesystems reads."""
    place = url.partition("://")[2]
    return ":" in place.partition("/")[0] and "@" in place


def _make_public_folder(path: Path) -> None:
    """Make the folder and those above it that are missing, for all users to read."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)


def _find_local(folder: Path) -> Iterator[_Found]:
    """The folders of jobs and the files in them.

    fsspec is not used here: it omits everything when one folder disappears while it looks.
    """
    for job in _scan(folder):
        if not is_job_id(job.name):
            continue
        with suppress(FileNotFoundError):
            yield _Found(JobId(job.name), "", 0, job.stat().st_mtime)
        for file in _scan(job):
            with suppress(FileNotFoundError):
                status = file.stat()
                yield _Found(JobId(job.name), file.name, status.st_size, status.st_mtime)


def _scan(folder: os.PathLike[str]) -> list[os.DirEntry[str]]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return list(entries)
    return []


def _stream_s3(fs: Any, path: str, start: int, end: int | None) -> Iterator[bytes]:  # noqa: ANN401 - s3fs is an extra
    """Yield the bytes of an object in chunks, from one request. Its own file would hold 50 MiB of each reader.

    The connection waits for a slow reader. If it breaks off, another request goes on where it was.
    """
    from fsspec.asyn import sync  # noqa: PLC0415 - it starts asyncio

    bucket, key, _ = fs.split_path(path)
    position = start
    while end is None or position < end:
        began = position
        span = {} if position == 0 and end is None else {"Range": f"bytes={position}-{'' if end is None else end - 1}"}
        try:
            body = fs.call_s3("get_object", Bucket=bucket, Key=key, **span)["Body"]
        except FileNotFoundError as exc:
            raise FileGone() from exc
        except OSError as exc:
            if exc.errno == errno.EINVAL and began > 0:  # nothing lies behind the last byte
                return
            raise
        try:
            while chunk := sync(fs.loop, _read_chunk, body):
                position += len(chunk)
                yield chunk
            return
        except Exception:
            if position == began:
                raise
        finally:
            fs.loop.call_soon_threadsafe(body.close)


async def _read_chunk(body: Any) -> bytes:  # noqa: ANN401 - as above
    parts, left = [], CHUNK_BYTES
    while left and (part := await body.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _walk_s3(fs: Any, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:  # noqa: ANN401 - as above
    """The objects under the folder, a page of a thousand at a time."""
    bucket, prefix, _ = fs.split_path(folder)
    page: Mapping[str, Any] = {"NextContinuationToken": None}
    while "NextContinuationToken" in page:
        token = page["NextContinuationToken"]
        more = {} if token is None else {"ContinuationToken": token}
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix.rstrip('/')}/", **more)
        for found in page.get("Contents", ()):
            yield f"{bucket}/{found['Key']}", {"size": found["Size"], "LastModified": found["LastModified"]}


def _modified_at(info: Mapping[str, Any]) -> float:
    """The time of the last write in seconds since the epoch; a file of unknown age counts as new."""
    value = next((info[name] for name in _MODIFIED if info.get(name) is not None), math.inf)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn every exception of a filesystem into StorageUnavailable; object stores raise those of many libraries."""
    try:
        yield
    except FileGone:
        raise
    except OSError as exc:
        kind = StorageFull if exc.errno in _FULL else StorageUnavailable
        raise kind(f"{what}: {_reason(exc)}") from exc
    except Exception as exc:
        raise StorageUnavailable(f"{what}: {_reason(exc)}") from exc


def _reason(exc: Exception) -> str:
    """One line of the exception, without paths of this machine."""
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    if isinstance(exc, FileNotFoundError):
        return "no such file or bucket"
    text = str(exc).strip()
    return text.splitlines()[0][:200] if text else type(exc).__name__


def _etag(hexdigest: str) -> str:
    return hexdigest[:32]
