"""A task alive in a worker: how far it is, and how much work is left."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from kinema.engines.base import Frames, Note, Output, Step
from kinema.errors import Drained, GenerationError, WorkerLost
from kinema.events import Event, Progress, Timings
from kinema.job import Task, share_done
from kinema.worker.checkpoints import Checkpoints
from kinema.worker.delivery import Delivery
from kinema.worker.film_decoders import FilmDecoders
from kinema.worker.live import LiveFilm
from kinema.worker.storage_retries import StorageRetries


@dataclass(slots=True)
class Marks:
    """When a generation reached each part of its way, on the clock of ``time.perf_counter``."""

    admitted: float = field(default_factory=time.perf_counter)
    on_device: float = 0.0
    first_step: float = 0.0
    denoised: float = 0.0
    decoded: float = 0.0


@dataclass(slots=True)
class Generation:
    """A task alive in a worker. The last item of ``outcomes`` is a terminal event, WorkerLost or Drained."""

    key: int
    task: Task
    delivery: Delivery
    live: LiveFilm
    # These two end when nobody wants the video any more.
    retries: StorageRetries
    decoders: FilmDecoders
    checkpoints: Checkpoints
    marks: Marks = field(default_factory=Marks)
    outcomes: asyncio.Queue[Event | GenerationError] = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False
    # It ends here, but its job does not: nobody listens any more, or it was given back.
    goes_on: bool = False
    # Why another worker makes the video. Listeners get this at once, and do not wait for the device.
    given_back: Drained | WorkerLost | None = None
    share_done: float = 0.0
    # The engine's sentences on how the video differs from the request.
    warnings: list[str] = field(default_factory=list)
    device_s: float = 0.0
    driver: asyncio.Task[None] | None = None
    # What the engine reads of LoRAs, while it is waited for.
    reading: asyncio.Future[object] | None = None

    @property
    def remaining_work(self) -> float:
        """The work that is left, in the units of ``GenerationRequest.work``."""
        return self.task.request.work * (1 - self.share_done)

    @property
    def timings(self) -> Timings:
        marks = self.marks
        denoised = marks.denoised or marks.on_device
        return Timings(
            denoise_s=denoised - marks.on_device,
            first_step_s=max(marks.first_step - marks.on_device, 0.0),
            decode_s=marks.decoded - denoised,
            delivery_s=self.delivery.delivery_s,
            total_s=time.perf_counter() - marks.admitted,
            device_s=self.device_s,
        )

    def stop_reading(self) -> None:
        """Wait no longer for LoRAs."""
        if self.reading is not None and not self.reading.done():
            self.reading.set_result(None)

    def note(self, output: Output) -> Progress | None:
        """Handle an output on the device thread: a checkpoint may be made, and frames go to the encoder.

        Returns None for an output that is no progress.
        """
        now = time.perf_counter()
        match output:
            case Step():
                self.marks.first_step = self.marks.first_step or now
                self.marks.denoised = now
                self.checkpoints.note(output)
                progress = Progress(stage="denoise", step=output.index, total=output.total)
            case Frames():
                self.delivery.add(output.data, output.sound)
                self.marks.decoded = now
                progress = Progress(stage="decode", step=output.index, total=output.total)
            case Note():
                self.warnings.append(output.text)
                return None
        self.share_done = share_done(progress, self.task.request)
        return progress
