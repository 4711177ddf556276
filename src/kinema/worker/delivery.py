"""From decoded frames to a stored film, beside the device.

Frames are encoded on a thread of their own as they come, so that only the last chunk is left to encode when the
engine is done. Files are made in a private temporary folder, which is gone when the generation ends, however it does.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kinema.engines.base import UInt8Array
from kinema.errors import EngineFailed, StorageUnavailable
from kinema.events import Artifact
from kinema.job import Task
from kinema.media.mp4 import Mp4Writer
from kinema.request import GenerationRequest
from kinema.storage import Storage, video_key

MEDIA_TYPE = "video/mp4"


class FilmWriter(Protocol):
    """What encodes; ``Mp4Writer`` is one."""

    def add(self, frames: UInt8Array) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


OpenWriter = Callable[[Path, GenerationRequest], FilmWriter]


def open_mp4(path: Path, request: GenerationRequest) -> FilmWriter:
    """A writer for the request's size and rate."""
    return Mp4Writer(path, width=request.width, height=request.height, fps=request.fps)


class Delivery:
    """One generation's way from frames to its artifact: ``add`` each chunk, then either ``finish`` or ``abort``.

    ``add`` never blocks. ``finish`` and ``abort`` block; they are not called at the same time.
    """

    def __init__(self, task: Task, storage: Storage, open_writer: OpenWriter = open_mp4) -> None:
        self._key = video_key(task.job_id, task.attempt)
        self._request = task.request
        self._storage = storage
        self._open_writer = open_writer
        # Unbounded: a film's frames fit in memory, and a device that waits for an encoder would wait for all.
        self._chunks: queue.SimpleQueue[UInt8Array | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._folder: Path | None = None
        self._error: Exception | None = None
        self._artifact: Artifact | None = None
        self._is_aborted = False
        self._last_chunk_at = 0.0
        self.delivery_s = 0.0

    def add(self, frames: UInt8Array) -> None:
        """Queue a chunk (f, h, w, 3) uint8 for the encoder.

        Raises what went wrong with an earlier chunk, as ``finish`` does: there is no use in decoding more.
        """
        if self._is_aborted:
            return
        if self._error is not None:
            raise _explained(self._error) from self._error
        self._last_chunk_at = time.perf_counter()
        self._chunks.put(frames)
        if self._thread is None:
            self._thread = threading.Thread(target=self._encode, name="encoder", daemon=True)
            self._thread.start()

    def finish(self) -> Artifact:
        """Close the film and store it. ``delivery_s`` is then the time from the last chunk to the stored file.

        Raises StorageUnavailable, or EngineFailed when there is no frame or a frame cannot be encoded.
        """
        if self._thread is None:
            raise EngineFailed("The engine ended without a frame.")
        try:
            self._join_encoder()
            if self._error is not None:
                raise _explained(self._error) from self._error
            self._artifact = self._storage.put_file(self._path, self._key, MEDIA_TYPE)
            self.delivery_s = time.perf_counter() - self._last_chunk_at
            return self._artifact
        finally:
            self._remove_folder()

    def abort(self) -> None:
        """Leave nothing behind, not even the artifact if it is stored already. Raises StorageUnavailable then only."""
        self._is_aborted = True
        self._join_encoder()
        self._remove_folder()
        if self._artifact is not None:
            self._storage.delete(self._artifact.key)

    @property
    def _path(self) -> Path:
        assert self._folder is not None, "the encoder makes the folder before its first frame"
        return self._folder / "video.mp4"

    def _encode(self) -> None:
        """The encoder thread: chunks until None, then the end of the film."""
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="kinema-"))
            writer = self._open_writer(self._path, self._request)
            try:
                self._write(writer)
            except BaseException:
                writer.abort()
                raise
        except Exception as exc:
            self._error = exc

    def _write(self, writer: FilmWriter) -> None:
        while (frames := self._chunks.get()) is not None:
            if not self._is_aborted:
                writer.add(frames)
        if self._is_aborted:
            writer.abort()
        else:
            writer.close()

    def _join_encoder(self) -> None:
        self._chunks.put(None)
        if self._thread is not None:
            self._thread.join()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _explained(error: Exception) -> EngineFailed | StorageUnavailable:
    """For a client: the system's own words without the path of the temporary file."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, OSError):
        return StorageUnavailable(f"cannot write a temporary file: {reason}")
    return EngineFailed(f"the frames could not be encoded: {reason}")
