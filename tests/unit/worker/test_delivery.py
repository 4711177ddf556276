"""From frames to a stored film."""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from kinema.engines.base import Frames, UInt8Array
from kinema.engines.fake import FakeEngine
from kinema.errors import EngineFailed, StorageFull, StorageUnavailable
from kinema.events import Artifact, Timings
from kinema.media.planes import to_yuv
from kinema.media.sound import Sound
from kinema.media.writers import open_writer
from kinema.request.formats import OutputFormat
from kinema.request.request import GenerationRequest
from kinema.storage import Storage, manifest_key, spritesheet_key, thumbnail_key, video_key
from kinema.worker.delivery import Delivery, FilmWriter
from kinema.worker.storage_retries import StorageRetries
from tests.unit.worker.tasks import PATIENCE_S, film_of, make_request, make_task, manifest_of


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary files go to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(f"file://{tmp_path}/files")


def chunks(request: GenerationRequest) -> list[UInt8Array]:
    return [output.data for output in FakeEngine().generate(request) if isinstance(output, Frames)]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class Spy:
    """A writer that tells when it has encoded a chunk, and may be held or fail."""

    def __init__(self, *place: Any, **options: Any) -> None:
        self._writer: FilmWriter = open_writer(*place, **options)
        self.encoded = threading.Semaphore(0)
        self.error: Exception | None = None

    def add(self, frames: UInt8Array, sound: Sound | None = None) -> None:
        if self.error is not None:
            raise self.error
        self._writer.add(frames, sound)
        self.encoded.release()

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        self._writer.abort()


def test_a_film_is_stored_under_the_jobs_key(storage: Storage, temporary: Path) -> None:
    """And nothing else is left."""
    task = make_task()
    request = task.request
    delivery = Delivery(task, storage, StorageRetries(0))
    delivery.describe(manifest_of(request))
    for chunk in chunks(request):
        delivery.add(chunk)
    artifact = delivery.finish().film
    assert (artifact.key, artifact.media_type) == (video_key(task.job_id, 1), "video/mp4")
    assert b"".join(storage.read(artifact.key)) == film_of(request)
    assert artifact.manifest is not None
    assert delivery.delivery_s > 0
    assert list(temporary.iterdir()) == []


def test_planes_make_the_film_that_their_rgb_makes(storage: Storage) -> None:
    """An engine may convert its frames itself."""
    task = make_task()
    delivery = Delivery(task, storage, StorageRetries(0))
    delivery.describe(manifest_of(task.request))
    for chunk in chunks(task.request):
        delivery.add(np.stack([to_yuv(pixels).to_ndarray() for pixels in chunk]))
    made = delivery.finish()
    assert b"".join(storage.read(made.film.key)) == film_of(task.request)
    assert made.thumbnail.size_bytes > 0


def test_previews_are_stored_beside_the_film(storage: Storage) -> None:
    """A WebP of the middle frame and a JPEG of frames from the first to the last, as their artifacts say."""
    task = make_task()
    delivery = Delivery(task, storage, StorageRetries(0))
    for chunk in chunks(task.request):
        delivery.add(chunk)
    made = delivery.finish()
    assert (made.thumbnail.key, made.thumbnail.media_type) == (thumbnail_key(task.job_id, 1), "image/webp")
    assert (made.spritesheet.key, made.spritesheet.media_type) == (spritesheet_key(task.job_id, 1), "image/jpeg")
    thumbnail, sheet = (
        Image.open(io.BytesIO(b"".join(storage.read(artifact.key)))) for artifact in (made.thumbnail, made.spritesheet)
    )
    assert (thumbnail.format, thumbnail.size) == ("WEBP", (64, 64))
    assert (sheet.format, sheet.size) == ("JPEG", (192, 192))
    middle = np.concatenate(chunks(task.request))[4].astype(int)
    assert np.abs(np.asarray(thumbnail.convert("RGB")) - middle).mean() < 4


def test_a_chunk_is_encoded_before_the_next_one_exists(storage: Storage) -> None:
    """Encoding overlaps decoding: each chunk is through the encoder before the next is handed over."""
    request = make_request()
    spies: list[Spy] = []
    is_open = threading.Event()

    def open_spy(*place: Any, **options: Any) -> FilmWriter:
        spies.append(Spy(*place, **options))
        is_open.set()
        return spies[0]

    delivery = Delivery(make_task(), storage, StorageRetries(0), open_spy)
    for chunk in chunks(request):
        delivery.add(chunk)
        assert is_open.wait(PATIENCE_S)
        assert spies[0].encoded.acquire(timeout=PATIENCE_S)
    assert delivery.finish().film.size_bytes > 0


def test_temporary_files_are_private(storage: Storage, temporary: Path) -> None:
    """Nobody else on the machine reads a film that is being made."""
    modes: list[int] = []

    def look(kind: OutputFormat, path: Path, *rest: Any, **options: Any) -> FilmWriter:
        modes.append(path.parent.stat().st_mode & 0o777)
        return open_writer(kind, path, *rest, **options)

    request = make_request()
    delivery = Delivery(make_task(), storage, StorageRetries(0), look)
    delivery.add(chunks(request)[0])
    delivery.finish()
    assert modes == [0o700]


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_abort_leaves_nothing(storage: Storage, temporary: Path, tmp_path: Path, num_chunks: int) -> None:
    """No temporary file and no artifact, after any number of chunks; chunks that come later are dropped."""
    request = make_request()
    delivery = Delivery(make_task(), storage, StorageRetries(0))
    for chunk in chunks(request)[:num_chunks]:
        delivery.add(chunk)
    delivery.abort()
    delivery.add(chunks(request)[0])
    assert files(tmp_path) == []
    assert list(temporary.iterdir()) == []


def test_abort_after_finish_takes_the_artifact_back(storage: Storage, tmp_path: Path) -> None:
    """For a cancel that came while the film was being stored."""
    request = make_request()
    delivery = Delivery(make_task(), storage, StorageRetries(0))
    delivery.add(chunks(request)[0])
    delivery.finish()
    delivery.abort()
    assert files(tmp_path) == []


def test_storage_that_fails_is_said_by_finish(temporary: Path, tmp_path: Path) -> None:
    """With its reason, and no temporary file stays."""

    class Full(Storage):
        def put_file(self, path: Path, key: str, media_type: str, sha256: Callable[[], str]) -> Artifact:
            raise StorageUnavailable("disk full")

    request = make_request()
    delivery = Delivery(make_task(), Full(f"file://{tmp_path}/files"), StorageRetries(0))
    delivery.add(chunks(request)[0])
    with pytest.raises(StorageUnavailable, match="disk full"):
        delivery.finish()
    assert list(temporary.iterdir()) == []


def test_the_files_are_stored_side_by_side(tmp_path: Path) -> None:
    """An object store answers each after a while, and that while is waited for once."""
    all_begun = threading.Barrier(4, timeout=PATIENCE_S)

    class Slow(Storage):
        def put_file(self, path: Path, key: str, media_type: str, sha256: Callable[[], str]) -> Artifact:
            all_begun.wait()
            return super().put_file(path, key, media_type, sha256)

        def put_bytes(self, key: str, data: bytes, media_type: str) -> Artifact:
            all_begun.wait()
            return super().put_bytes(key, data, media_type)

    delivery = Delivery(make_task(), Slow(f"file://{tmp_path}/files"), StorageRetries(0))
    delivery.describe(manifest_of(make_request()))
    delivery.add(chunks(make_request())[0])
    delivery.finish()
    assert len(files(tmp_path / "files")) == 4


@pytest.mark.parametrize("failing", [".webp", ".jpg", ".json"])
def test_what_goes_with_it_that_cannot_be_stored_takes_the_film_back(tmp_path: Path, failing: str) -> None:
    """All files of a video are there or none."""

    class Full(Storage):
        def put_bytes(self, key: str, data: bytes, media_type: str) -> Artifact:
            if key.endswith(failing):
                raise StorageUnavailable("disk full")
            return super().put_bytes(key, data, media_type)

    delivery = Delivery(make_task(), Full(f"file://{tmp_path}/files"), StorageRetries(0))
    delivery.describe(manifest_of(make_request()))
    delivery.add(chunks(make_request())[0])
    with pytest.raises(StorageUnavailable, match="disk full"):
        delivery.finish()
    assert files(tmp_path / "files") == []


def test_each_attempt_has_a_manifest_of_its_own(storage: Storage) -> None:
    """The one of an attempt that was given up stays as it was, and says which attempt that was."""
    task = make_task()
    stored = {}
    for attempt in (1, 2):
        delivery = Delivery(task.model_copy(update={"attempt": attempt}), storage, StorageRetries(0))
        delivery.describe(manifest_of(task.request))
        delivery.add(chunks(task.request)[0])
        film = delivery.finish(lambda: Timings(denoise_s=4.5)).film
        assert film.manifest is not None
        stored[film.manifest.key] = film
    read = {key: json.loads(b"".join(storage.read(key))) for key in stored}
    assert {key: said["attempt"] for key, said in read.items()} == {manifest_key(task.job_id, n): n for n in (1, 2)}
    assert [said["timings"]["denoise_s"] for said in read.values()] == [4.5, 4.5]
    assert len({film.etag for film in stored.values()}) == 1, "the MP4 says nothing that differs from run to run"


def test_abort_keeps_all_or_nothing(tmp_path: Path) -> None:
    """A film that cannot be deleted keeps its previews; a preview that cannot is left behind and said in the log."""
    stuck: list[str] = [".mp4"]

    class Stuck(Storage):
        def delete(self, key: str) -> None:
            if key.endswith(tuple(stuck)):
                raise StorageUnavailable("cannot delete")
            super().delete(key)

    delivery = Delivery(make_task(), Stuck(f"file://{tmp_path}/files"), StorageRetries(0))
    delivery.add(chunks(make_request())[0])
    delivery.finish()
    with pytest.raises(StorageUnavailable):
        delivery.abort()
    assert len(files(tmp_path / "files")) == 3
    stuck[:] = [".webp"]
    with capture_logs() as logs:
        delivery.abort()
    assert [path.suffix for path in files(tmp_path / "files")] == [".webp"]
    assert [entry["event"] for entry in logs] == ["a file was left in storage"]


def test_frames_that_cannot_be_encoded_are_said_by_finish(storage: Storage, temporary: Path) -> None:
    """With the encoder's reason, and nothing is left."""
    delivery = Delivery(make_task(), storage, StorageRetries(0))
    delivery.add(np.zeros((1, 33, 33, 3), np.uint8))
    with pytest.raises(EngineFailed, match="could not be encoded"):
        delivery.finish()
    assert list(temporary.iterdir()) == []


def test_a_dead_encoder_stops_the_decoding(storage: Storage) -> None:
    """Frames for which there is no encoder any more are refused, so that the device does not decode the rest."""

    def refuse() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            delivery.add(chunk)

    chunk = np.zeros((1, 33, 33, 3), np.uint8)
    delivery = Delivery(make_task(), storage, StorageRetries(0))
    with pytest.raises(EngineFailed, match="could not be encoded"):
        refuse()
    delivery.abort()


def test_a_full_temporary_folder_is_a_storage_error(storage: Storage, temporary: Path) -> None:
    """The path of the temporary file is nobody's business."""

    def full(_kind: OutputFormat, path: Path, *_rest: object, **_options: object) -> FilmWriter:
        raise OSError(28, "No space left on device", str(path))

    request = make_request()
    delivery = Delivery(make_task(), storage, StorageRetries(0), full)
    delivery.add(chunks(request)[0])
    with pytest.raises(StorageUnavailable, match=r"^cannot write a temporary file: No space left on device$"):
        delivery.finish()


@pytest.mark.parametrize(("where", "kind"), [("mkdtemp", "mp4"), ("write", "mp4"), ("write", "webm"), ("write", "gif")])
def test_a_film_waits_for_space_in_the_temporary_folder(
    where: str, kind: OutputFormat, storage: Storage, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that were computed are not lost, and the file is the one that was never interrupted."""
    request, module = make_request(output_format=kind), {"mkdtemp": tempfile, "write": os}[where]
    real: Callable[..., object] = getattr(module, where)
    refused: list[int] = []

    def full(*arguments: object, **options: object) -> object:
        if len(refused) < 2:
            refused.append(errno.ENOSPC)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    def deliver() -> bytes:
        delivery = Delivery(make_task(output_format=kind), storage, StorageRetries(PATIENCE_S))
        for chunk in chunks(request):
            delivery.add(chunk)
        return b"".join(storage.read(delivery.finish().film.key))

    expected = deliver()
    monkeypatch.setattr(module, where, full)
    assert deliver() == expected
    assert len(refused) == 2
    assert files(temporary) == []


def test_a_temporary_folder_that_stays_full_ends_the_film(
    storage: Storage, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the time is up, as with a storage that stays full. Its path is nobody's business."""

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    delivery = Delivery(make_task(), storage, StorageRetries(0))
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        delivery.add(chunks(make_request())[0])
        with pytest.raises(StorageFull, match=r"^cannot write a temporary file: No space left on device$"):
            delivery.finish()
        delivery.abort()
    assert files(temporary) == []


def test_no_frame_is_the_engines_failure(storage: Storage) -> None:
    """A film of nothing is never stored."""
    with pytest.raises(EngineFailed, match="without a frame"):
        Delivery(make_task(), storage, StorageRetries(0)).finish()
