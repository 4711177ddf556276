"""What happened to a job, as values that are stored, streamed and sent between processes.

Every accepted job ends in exactly one of the three terminal events. An event says what happened, and not who is told.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Artifact(_Value):
    """A stored file: its key in storage, its type and size, and the ETag of its content.

    ``manifest`` is the file beside a video that says how to make it again.
    """

    key: str
    media_type: str
    size_bytes: int
    etag: str
    manifest: Artifact | None = None


class Timings(_Value):
    """Where the seconds of a generation went, as the worker saw them."""

    denoise_s: float = 0.0
    # The part of it to the end of the first step: that step and what is done once, as reading the prompts.
    first_step_s: float = 0.0
    decode_s: float = 0.0
    # From the last decoded chunk to the stored file: the time that delivery adds to the generation.
    delivery_s: float = 0.0
    total_s: float = 0.0
    # The time that the device worked for this video alone; the rest it worked for others, or not at all.
    device_s: float = 0.0


class Queued(_Value):
    """The job was accepted."""

    type: Literal["queued"] = "queued"


class Started(_Value):
    """A worker admitted the job. ``attempt`` counts from 1."""

    type: Literal["started"] = "started"
    worker_id: str
    attempt: int


class Progress(_Value):
    """``step`` of ``total`` units of ``stage`` are done: denoising steps, or latent frames decoded."""

    type: Literal["progress"] = "progress"
    stage: Literal["denoise", "decode"]
    step: int
    total: int


class Preview(_Value):
    """A picture of the unfinished video: a small JPEG as base64, after ``step`` of ``total`` denoising steps.

    Only the newest preview of a job is kept.
    """

    type: Literal["preview"] = "preview"
    step: int
    total: int
    b64_jpeg: str


class Completed(_Value):
    """The video is stored, with the pictures that are shown before it plays.

    ``warnings`` are sentences on how it differs from the request.
    """

    type: Literal["completed"] = "completed"
    artifact: Artifact
    thumbnail: Artifact | None = None
    spritesheet: Artifact | None = None
    timings: Timings = Timings()
    warnings: tuple[str, ...] = ()


class Failed(_Value):
    """The job ended without a video. ``message`` is one sentence for the client."""

    type: Literal["failed"] = "failed"
    code: str
    message: str


class Cancelled(_Value):
    """The job was stopped because somebody asked for it."""

    type: Literal["cancelled"] = "cancelled"


Terminal = Completed | Failed | Cancelled
Event = Annotated[Queued | Started | Progress | Preview | Completed | Failed | Cancelled, Field(discriminator="type")]
event_adapter: TypeAdapter[Event] = TypeAdapter(Event)


def is_terminal(event: Event) -> bool:
    return isinstance(event, Completed | Failed | Cancelled)
