"""Turns decoded frames into a stored video and its previews, beside the device.

A thread of its own encodes the frames as they come, so that only the last ones are left when the engine is done. When a
video is extended, the same writer first encodes the older video again. The files are made in a private temporary
folder, which is removed when the generation ends in any way; the next worker removes the folder of a killed process.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from kinema.engines.base import UInt8Array
from kinema.engines.failures import note_traceback, release_frames
from kinema.errors import EngineFailed, KinemaError, StorageFull, StorageUnavailable
from kinema.events import Artifact, Timings
from kinema.job import Task
from kinema.manifest import MEDIA_TYPE as MANIFEST_TYPE
from kinema.manifest import Manifest, StoredManifest, VideoFile
from kinema.media.film import Frames
from kinema.media.live_view import Viewers
from kinema.media.patient_file import FULL, Repeat
from kinema.media.planes import size_of
from kinema.media.previews import Previews
from kinema.media.sound import Sound, sound_of_frames
from kinema.media.writers import open_writer
from kinema.request.formats import MEDIA_TYPES, WITH_SOUND, OutputFormat
from kinema.request.shapes import Size
from kinema.storage import Storage, manifest_key, spritesheet_key, thumbnail_key, video_key
from kinema.worker.live import LiveFilm
from kinema.worker.scratch import ScratchFolder
from kinema.worker.storage_retries import StorageRetries

log = structlog.get_logger(__name__)


class FilmWriter(Protocol):
    """An encoder; a ``FileWriter`` is one."""

    def add(self, frames: UInt8Array, sound: Sound | None = None) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


class OpenWriter(Protocol):
    """Opens an encoder; ``media.writers.open_writer`` does. ``repeat`` waits for space."""

    def __call__(
        self,
        kind: OutputFormat,
        path: Path,
        size: Size,
        fps: int,
        tags: Mapping[str, str],
        viewers: Viewers | None = None,
        *,
        has_sound: bool = False,
        repeat: Repeat | None = None,
    ) -> FilmWriter: ...


# Frames and what is heard meanwhile; None for silence.
Chunk = tuple[UInt8Array, Sound | None]


@dataclass(frozen=True, slots=True)
class Delivered:
    """The stored files of one generation. The video's artifact has the manifest."""

    film: Artifact
    thumbnail: Artifact
    spritesheet: Artifact


class Delivery:
    """One generation's way from frames to artifacts: ``add`` each chunk, then call either ``finish`` or ``abort``.

    ``add`` and ``continue_from`` never block. ``finish`` and ``abort`` block; they are not called at the same time.
    """

    def __init__(
        self,
        task: Task,
        storage: Storage,
        retries: StorageRetries,
        open_writer: OpenWriter = open_writer,
        live: LiveFilm | None = None,
        *,
        has_sound: bool = False,
    ) -> None:
        """``live`` gets the video while it is encoded. ``has_sound`` says that sound comes with the new frames."""
        self._task = task
        self._request = task.request
        self._storage = storage
        self._retries = retries
        self._open_writer = open_writer
        self._live = live
        self._has_sound = has_sound
        # Unbounded: the engine bounds the frames in memory. A device that waits for an encoder would delay all videos.
        self._chunks: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._older: Frames | None = None
        self._thread: threading.Thread | None = None
        self._scratch: ScratchFolder | None = None
        self._error: Exception | None = None
        # Thumbnail and sheet.
        self._pictures: tuple[bytes, bytes] | None = None
        # Of the whole file, in hex. It is computed while previews and files are stored.
        self._sha256: Future[str] | None = None
        self._num_frames = task.request.num_frames
        # The video is first: the other files are previews of it.
        self._stored: list[Artifact] = []
        self._manifest: Manifest | None = None
        self._is_aborted = False
        self._last_chunk_at: float | None = None
        self.delivery_s = 0.0

    def describe(self, manifest: Manifest) -> None:
        """Set the manifest that goes into the file and beside it. Call this first; without it there is no manifest."""
        self._manifest = manifest

    def continue_from(self, older: Frames) -> None:
        """Put an older video before the new one. The first new frame equals the last older one, and is left out.

        Its sound stays with it; where one of both has no sound, that part is silent. Call this before ``add``. The
        older video is encoded from now on, one frame at a time; ``add`` and ``finish`` raise its errors.
        """
        request = self._request
        self._older = older
        self._num_frames = older.shape.num_frames_at(request.fps) + request.num_frames - 1
        self._start_encoder()

    def add(self, frames: UInt8Array, sound: Sound | None = None) -> None:
        """Queue a chunk for the encoder: RGB or planes, and what is heard meanwhile, as in ``engines/base.py: Frames``.

        Raises the error of an earlier chunk, like ``finish``, because decoding more would be useless.
        """
        if self._is_aborted:
            return
        self._raise_error()
        self._last_chunk_at = time.perf_counter()
        self._chunks.put((frames, sound))
        self._start_encoder()

    def finish(self, timings: Callable[[], Timings] = Timings) -> Delivered:
        """Close the video and store it with its other files, all or none; waits for storage.

        ``delivery_s`` is then the time from the last chunk to the stored files. The manifest has ``timings`` up to
        their storing. Raises StorageUnavailable, or EngineFailed when there is no frame or a frame cannot be encoded.
        """
        try:
            self._join_encoder()
            self._raise_error()
            if self._last_chunk_at is None:
                raise EngineFailed("The engine ended without a frame.")
            return self._store(self._last_chunk_at, timings)
        finally:
            self._remove_folder()

    def abort(self) -> None:
        """Remove everything, also files that are already stored.

        Raises StorageUnavailable when the stored video cannot be deleted; then it stays with all of its previews.
        """
        self._is_aborted = True
        self._join_encoder()
        self._remove_folder()
        if self._stored:
            self._storage.delete(self._stored[0].key)
            self._delete(self._stored[1:])

    def _store(self, last_chunk_at: float, timings: Callable[[], Timings]) -> Delivered:
        """Store the files side by side: an object store answers each after a while. When one cannot be stored, the
        others are deleted again."""
        assert self._pictures is not None, "there was a frame"
        assert self._sha256 is not None
        thumbnail, sheet = self._pictures
        of, put_bytes = (self._task.job_id, self._task.attempt), self._storage.put_bytes
        kind = self._request.output_format
        self.delivery_s = time.perf_counter() - last_chunk_at
        puts = [
            partial(self._storage.put_file, self._path, video_key(*of, kind), MEDIA_TYPES[kind], self._sha256.result),
            partial(put_bytes, thumbnail_key(*of), thumbnail, "image/webp"),
            partial(put_bytes, spritesheet_key(*of), sheet, "image/jpeg"),
        ]
        if self._manifest is not None:
            puts.append(partial(self._put_manifest, self._manifest, time.time(), timings()))
        self._stored = self._put_all(puts)
        self.delivery_s = time.perf_counter() - last_chunk_at
        film, small, frames, *manifests = self._stored
        return Delivered(film.model_copy(update={"manifest": manifests[0]}) if manifests else film, small, frames)

    def _put_all(self, puts: Sequence[Callable[[], Artifact]]) -> list[Artifact]:
        """Run all of them at once. When one raises, what the others have stored is deleted again."""
        with ThreadPoolExecutor(len(puts), "storing") as threads:
            storing = [threads.submit(self._retries, put) for put in puts]
        errors = [error for one in storing if (error := one.exception()) is not None]
        stored = [one.result() for one in storing if one.exception() is None]
        if errors:
            self._delete(stored)
            raise errors[0]
        return stored

    def _put_manifest(self, manifest: Manifest, made_at: float, timings: Timings) -> Artifact:
        """Store it with what is known of the finished video."""
        job_id, attempt = self._task.job_id, self._task.attempt
        assert self._sha256 is not None
        video = VideoFile(sha256=self._sha256.result(), size_bytes=self._path.stat().st_size)
        stored = StoredManifest(
            **dict(manifest), id=job_id, attempt=attempt, made_at=made_at, timings=timings, video=video
        )
        data = stored.model_dump_json(exclude_none=True, indent=2).encode()
        return self._storage.put_bytes(manifest_key(job_id, attempt), data, MANIFEST_TYPE)

    def _delete(self, stored: list[Artifact]) -> None:
        """Delete the files as far as storage allows. Nobody knows the key of a file that stays."""
        for artifact in stored:
            try:
                self._storage.delete(artifact.key)
            except StorageUnavailable as exc:
                log.warning("a file was left in storage", key=artifact.key, reason=exc.message)

    @property
    def _path(self) -> Path:
        assert self._scratch is not None, "the encoder makes the folder before its first frame"
        return self._scratch.path / f"video.{self._request.output_format}"

    def _start_encoder(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._encode, name="encoder", daemon=True)
            self._thread.start()

    def _encode(self) -> None:
        """Run the encoder thread: the older video, chunks until None, then the end of the file."""
        try:
            self._encode_all()
        except Exception as exc:
            note_traceback(exc)
            release_frames(exc)
            self._error = exc

    def _encode_all(self) -> None:
        self._scratch = self._retries(_make_scratch)
        chunks = self._all_chunks()
        if (first := next(chunks, None)) is not None:
            self._write_film(first, chunks)

    def _write_film(self, first: Chunk, others: Iterator[Chunk]) -> None:
        """Write the video in the size of the frames, which an engine may have chosen itself."""
        frames, sound = first
        size, request = size_of(frames), self._request
        tags = self._manifest.tags if self._manifest else {}
        writer = self._open_writer(
            request.output_format,
            self._path,
            size,
            request.fps,
            tags,
            self._live,
            has_sound=request.output_format in WITH_SOUND and (self._has_sound or sound is not None),
            repeat=self._retries,
        )
        previews = Previews(size, self._num_frames)
        try:
            self._write(writer, previews, itertools.chain([first], others))
        except BaseException:
            writer.abort()
            raise
        finally:
            previews.close()

    def _write(self, writer: FilmWriter, previews: Previews, chunks: Iterator[Chunk]) -> None:
        for frames, sound in chunks:
            if self._is_aborted:
                break
            previews.add(frames)
            writer.add(frames, sound)
        if self._is_aborted:
            writer.abort()
        else:
            writer.close()
            if self._live is not None:
                self._live.complete()
            self._sha256 = _beside(partial(_sha256_of, self._path))
            self._pictures = previews.thumbnail(), previews.spritesheet()

    def _all_chunks(self) -> Iterator[Chunk]:
        """Yield the older video frame by frame, then the chunks as they come, without the frame that both have."""
        fps, num_doubled = self._request.fps, 0
        if self._older is not None:
            heard = self._older.sound()
            for number, pixels in enumerate(self._older.frames(self._request.size, fps)):
                yield pixels[None], None if heard is None else sound_of_frames(heard, number, number + 1, fps)
            num_doubled = 1
        while (chunk := self._chunks.get()) is not None:
            frames, sound = chunk
            if num_doubled and sound is not None:
                sound = sound_of_frames(sound, num_doubled, len(frames), fps)
            yield frames[num_doubled:], sound
            num_doubled = 0

    def _raise_error(self) -> None:
        """Raise the error of the encoder thread, if there is one."""
        if isinstance(self._error, KinemaError):
            raise self._error
        if self._error is not None:
            raise _explained(self._error) from self._error

    def _join_encoder(self) -> None:
        self._chunks.put(None)
        if self._thread is not None:
            self._thread.join()

    def _remove_folder(self) -> None:
        if self._scratch is not None:
            self._scratch.remove()


def _make_scratch() -> ScratchFolder:
    """Raises StorageFull where the disk has no space for a folder."""
    try:
        return ScratchFolder()
    except OSError as exc:
        if exc.errno in FULL:
            raise StorageFull(f"cannot write a temporary file: {exc.strerror}") from exc
        raise


def _beside(work: Callable[[], str]) -> Future[str]:
    """Run it on a thread of its own."""
    thread = ThreadPoolExecutor(1, "checksum")
    done = thread.submit(work)
    thread.shutdown(wait=False)
    return done


def _sha256_of(path: Path) -> str:
    """In hex, in one call, which does not wait for the interpreter again and again. Raises StorageUnavailable."""
    try:
        with path.open("rb") as film, mmap.mmap(film.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return hashlib.sha256(data).hexdigest()
    except OSError as exc:
        raise StorageUnavailable(f"cannot read a temporary file: {exc.strerror}") from exc


def _explained(error: Exception) -> EngineFailed | StorageUnavailable:
    """The error for a client: the system's own words without the path of the temporary file."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, OSError):
        return StorageUnavailable(f"cannot write a temporary file: {reason}")
    return EngineFailed(f"the frames could not be encoded: {reason}")
