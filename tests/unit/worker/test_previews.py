"""What a step shows of the video that is being made."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from kinema.engines.base import Frames, Step, UInt8Array
from kinema.engines.fake import FakeEngine
from kinema.events import Completed, Preview
from kinema.settings import WorkerSettings
from kinema.storage import Storage
from kinema.worker.previews import MAX_BYTES, preview_of
from kinema.worker.worker import Worker
from tests.unit.worker.tasks import collect, film_of, make_request, make_task


def noise() -> UInt8Array:
    return np.random.default_rng(0).integers(0, 256, (180, 320, 3), dtype=np.uint8)


def jpeg_of(preview: Preview | None) -> Image.Image:
    assert preview is not None
    return Image.open(io.BytesIO(base64.b64decode(preview.b64_jpeg)))


def test_a_preview_is_a_small_jpeg_in_the_shape_of_the_video() -> None:
    """Whatever the engine's picture is like; a small video keeps its size."""
    for size, expected in (("1280x720", (320, 180)), ("720x1280", (180, 320)), ("64x64", (64, 64))):
        request = make_request(size=size, preview_every=1)
        preview = preview_of(request, Step(1, 3, preview=lambda: np.full((9, 16, 3), 200, np.uint8)))
        picture = jpeg_of(preview)
        assert (picture.format, picture.size) == ("JPEG", expected)
        assert abs(np.asarray(picture).astype(int) - 200).max() <= 3


def test_a_preview_is_never_large() -> None:
    """Noise neither, which compresses worst."""
    request = make_request(size="1280x720", preview_every=1)
    preview = preview_of(request, Step(1, 3, preview=noise))
    assert preview is not None
    assert len(base64.b64decode(preview.b64_jpeg)) <= MAX_BYTES


def test_previews_come_every_so_many_steps() -> None:
    """To those who asked, of an engine that has them; nothing is computed for others."""

    def refuse() -> UInt8Array:
        raise AssertionError("nobody asked for it")

    asked = make_request(preview_every=2)
    assert [preview_of(asked, Step(i, 5, preview=noise)) is not None for i in range(1, 6)] == [0, 1, 0, 1, 0]
    assert preview_of(asked, Step(1, 5, preview=refuse)) is None
    assert preview_of(make_request(), Step(2, 5, preview=refuse)) is None
    assert preview_of(asked, Step(2, 5)) is None
    assert preview_of(asked, Frames(noise()[None], 2, 2)) is None


@pytest.mark.parametrize("error", [MemoryError(), ValueError("no picture")])
def test_a_preview_that_fails_is_left_out(error: Exception) -> None:
    """The video is not its business."""

    def fail() -> UInt8Array:
        raise error

    with capture_logs() as logs:
        assert preview_of(make_request(preview_every=1), Step(1, 3, preview=fail)) is None
    assert [entry["event"] for entry in logs] == ["a preview was left out"]


async def test_a_worker_tells_of_previews_and_makes_the_same_video(tmp_path: Path) -> None:
    """Each follows its step; the video is that of a request without them, to the byte."""
    storage = Storage(f"file://{tmp_path}")
    task = make_task(num_inference_steps=4, preview_every=2)
    worker = Worker(FakeEngine(), storage, WorkerSettings(), worker_id="w1")
    await worker.start()
    try:
        events = await collect(worker.run(task))
    finally:
        await worker.stop()
    assert [event.type for event in events[:6]] == [
        "progress",
        "progress",
        "preview",
        "progress",
        "progress",
        "preview",
    ]
    assert [(event.step, event.total) for event in events if isinstance(event, Preview)] == [(2, 4), (4, 4)]
    done = events[-1]
    assert isinstance(done, Completed)
    assert b"".join(storage.read(done.artifact.key)) == film_of(make_request(num_inference_steps=4))
