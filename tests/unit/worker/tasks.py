"""What the tests of the worker share: tasks of the fake engine, and films as they should be."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from kinema.engines.base import Frames
from kinema.engines.fake import FakeEngine
from kinema.events import Event, Started
from kinema.ids import new_job_id
from kinema.job import Task
from kinema.manifest import Manifest
from kinema.media.mp4 import Mp4Writer, encoder_facts
from kinema.request.capabilities import LoraInfo
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve

# Long enough for a loaded machine; a test that waits this long has failed.
PATIENCE_S = 20.0


def make_request(prompt: str = "a red circle", **options: object) -> GenerationRequest:
    small = {"size": "64x64", "num_frames": 9, "num_inference_steps": 3, "seed": 7}
    asked = GenerationOptions.model_validate({"prompt": prompt, **small, **options})
    return resolve(asked, FakeEngine().capabilities).request


def make_task(prompt: str = "a red circle", **options: object) -> Task:
    return Task(job_id=new_job_id(), attempt=1, request=make_request(prompt, **options))


def manifest_of(request: GenerationRequest) -> Manifest:
    """What stands in the film of a request without inputs."""
    return Manifest.of(request, (), FakeEngine().facts, encoder_facts())


def film_of(request: GenerationRequest, loras: Sequence[LoraInfo] = ()) -> bytes:
    """The film that the request makes when nothing else runs, with an engine that has these LoRAs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        tags = manifest_of(request).tags
        writer = Mp4Writer(path, width=request.width, height=request.height, fps=request.fps, metadata=tags)
        for output in FakeEngine(loras=loras).generate(request):
            if isinstance(output, Frames):
                writer.add(output.data, None)
        writer.close()
        return path.read_bytes()


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    """What follows Started, which every task's events begin with."""
    assert isinstance(await anext(events), Started)
    return [event async for event in events]
