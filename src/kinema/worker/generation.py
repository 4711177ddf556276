"""A task alive in a worker: where it is on its way, and how much of it is left."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from kinema.engines.base import Frames, Output, Step
from kinema.errors import GenerationError
from kinema.events import Event, Progress, Timings
from kinema.job import Task, percent
from kinema.worker.delivery import Delivery
from kinema.worker.patience import Patience


@dataclass(slots=True)
class Marks:
    """When a generation reached each part of its way, on the clock of ``time.perf_counter``."""

    admitted: float = field(default_factory=time.perf_counter)
    on_device: float = 0.0
    denoised: float = 0.0
    decoded: float = 0.0


@dataclass(slots=True)
class Generation:
    """``outcomes`` are its events; the last item is a terminal event, WorkerLost or Drained."""

    key: int
    task: Task
    delivery: Delivery
    # Ends with the wish for the video.
    patience: Patience
    marks: Marks = field(default_factory=Marks)
    outcomes: asyncio.Queue[Event | GenerationError] = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False
    # Somebody else makes the video; whoever listened was told so and does not wait for the device.
    is_given_back: bool = False
    percent_done: int = 0
    driver: asyncio.Task[None] | None = None

    @property
    def remaining_work(self) -> float:
        """In the units of ``GenerationRequest.work``."""
        return self.task.request.work * (1 - self.percent_done / 100)

    @property
    def timings(self) -> Timings:
        marks = self.marks
        denoised = marks.denoised or marks.on_device
        return Timings(
            denoise_s=denoised - marks.on_device,
            decode_s=marks.decoded - denoised,
            delivery_s=self.delivery.delivery_s,
            total_s=time.perf_counter() - marks.admitted,
        )

    def note(self, output: Output) -> Progress:
        """What the device thread does with an output: frames go to the encoder, the time is noted."""
        now = time.perf_counter()
        match output:
            case Step():
                self.marks.denoised = now
                progress = Progress(stage="denoise", step=output.index, total=output.total)
            case Frames():
                self.delivery.add(output.data)
                self.marks.decoded = now
                progress = Progress(stage="decode", step=output.index, total=output.total)
        self.percent_done = percent(progress)
        return progress
