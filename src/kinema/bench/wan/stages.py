"""One video from a request to the stored files, with the times of its stages.

The engine is driven as a worker drives it, and a worker's own delivery encodes and stores. Only a clock is added, which
waits for the device where a stage ends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kinema.engines.base import NO_INPUTS, Engine, Frames, Inputs, Step, UInt8Array
from kinema.ids import new_job_id
from kinema.job import Task
from kinema.manifest import Manifest
from kinema.media.live_view import Viewers
from kinema.media.patient_file import Repeat
from kinema.media.sound import Sound
from kinema.media.writers import encoder_facts, open_writer
from kinema.request.formats import OutputFormat
from kinema.request.request import GenerationRequest
from kinema.request.shapes import Size
from kinema.storage import Storage
from kinema.worker.delivery import Delivery, FilmWriter
from kinema.worker.storage_retries import StorageRetries


class Clock(Protocol):
    """A clock that waits for the device."""

    def now(self) -> float:
        """Seconds, read when the device has done all that it was given."""


@dataclass(frozen=True)
class VideoTimes:
    """The seconds of a video's stages. ``step_s`` is the mean of the steps, computed or not; ``decode_s`` ends with the
    last frames on the host, ``encode_s`` goes on to the closed film, and ``store_s`` to the stored files.
    ``encoding_s`` is the encoder's work, most of it beside the decode. ``video_s`` is the whole."""

    step_s: float
    decode_s: float
    encoding_s: float
    encode_s: float
    store_s: float
    video_s: float


class _Steps:
    """The times at which the first and the last step were done, and how many between them were computed."""

    def __init__(self, clock: Clock) -> None:
        self.first_at = self.last_at = 0.0
        self._clock = clock
        self._num_computed = 0
        self._total = 0

    def note(self, step: Step) -> None:
        if step.index == 1:
            self.first_at, self._total = self._clock.now(), step.total
        elif not step.is_cached:
            self._num_computed += 1
        if step.index == step.total:
            self.last_at = self._clock.now()

    @property
    def mean_s(self) -> float:
        """The mean over all steps. The first one is counted as long as another that is computed, because its own time
        includes the text."""
        computed_s = (self.last_at - self.first_at) / self._num_computed
        return computed_s * (self._num_computed + 1) / self._total


class _TimedWriter:
    """A film writer that adds up its working time and notes when the film is closed, on the encoder's thread."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self.closed_at = 0.0
        self._writer: FilmWriter | None = None

    def open(
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
    ) -> FilmWriter:
        self._writer = open_writer(kind, path, size, fps, tags, viewers, has_sound=has_sound, repeat=repeat)
        return self

    @property
    def _opened(self) -> FilmWriter:
        assert self._writer is not None, "open() was not called"
        return self._writer

    def add(self, frames: UInt8Array, sound: Sound | None = None) -> None:
        started = time.perf_counter()
        self._opened.add(frames, sound)
        self.spent_s += time.perf_counter() - started

    def close(self) -> None:
        started = time.perf_counter()
        self._opened.close()
        self.closed_at = time.perf_counter()
        self.spent_s += self.closed_at - started

    def abort(self) -> None:
        self._opened.abort()


def make_video(
    engine: Engine, request: GenerationRequest, inputs: Inputs, storage: Storage, clock: Clock
) -> VideoTimes:
    """Make and store one video; the request has at least two steps. Raises as the engine and the delivery do."""
    writer, steps = _TimedWriter(), _Steps(clock)
    started = clock.now()
    delivery = Delivery(Task(job_id=new_job_id(), attempt=1, request=request), storage, StorageRetries(0), writer.open)
    delivery.describe(Manifest.of(request, (), engine.facts, encoder_facts()))
    try:
        for output in engine.generate(request, inputs):
            if isinstance(output, Frames):
                delivery.add(output.data)
            elif isinstance(output, Step):
                steps.note(output)
        decoded = time.perf_counter()
        delivery.finish()
    except BaseException:
        delivery.abort()
        raise
    stored = time.perf_counter()
    return VideoTimes(
        step_s=steps.mean_s,
        decode_s=decoded - steps.last_at,
        encoding_s=writer.spent_s,
        encode_s=writer.closed_at - decoded,
        store_s=stored - writer.closed_at,
        video_s=stored - started,
    )


def time_step(engine: Engine, request: GenerationRequest, clock: Clock, inputs: Inputs = NO_INPUTS) -> float:
    """The mean seconds of a step, computed or not; nothing after the last step is run."""
    steps = _Steps(clock)
    generator = engine.generate(request, inputs)
    try:
        for _ in range(request.num_denoising_steps):
            output = next(generator)
            assert isinstance(output, Step), "steps come before frames"
            steps.note(output)
    finally:
        generator.close()
    return steps.mean_s
