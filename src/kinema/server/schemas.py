"""The JSON shapes that are answered: of a job, a list, a model, an error. Those that come in are in ``submissions``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from kinema.events import Timings
from kinema.job import Job, JobStatus
from kinema.request.capabilities import Capabilities
from kinema.request.request import Priority
from kinema.request.resolve import Resolved
from kinema.service.outlook import Outlook
from kinema.service.queue import Estimate

_CANCELLED = "The video was cancelled."
# Of a request, what a client may read: no key of storage is among them.
_PARAMETERS = {
    "model", "prompt", "negative_prompt", "num_frames", "fps", "num_inference_steps", "guidance_scale",
    "guidance_scale_2", "boundary_ratio", "flow_shift", "strength", "seed", "preview_every", "priority", "deadline_s",
}  # fmt: skip


class WireStatus(StrEnum):
    """What OpenAI's clients know of a job's status."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


class Datum(BaseModel):
    """A finished video: where it opens, or its bytes."""

    url: str | None = None
    b64_json: str | None = None
    output_format: str = "mp4"
    fps: int

    @model_serializer(mode="wrap")
    def _one_of_both(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        return {name: value for name, value in dumped.items() if value is not None}


class VideoError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A job: OpenAI's video with all of its fields, Dynamo's ``data``, and every resolved parameter.

    A cancelled job reads as failed with the code ``cancelled``: the SDKs know four statuses and take others for done.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: WireStatus
    progress: int
    created: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    data: list[Datum]
    error: VideoError | None
    remixed_from_video_id: str | None
    queue_position: int | None
    eta_s: float | None
    inference_time_s: float | None
    timings: Timings | None
    user: str | None
    prompt: str
    negative_prompt: str
    size: str
    seconds: str
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    strength: float | None = None
    flow_shift: float
    seed: int
    preview_every: int | None = None
    priority: Priority
    deadline_s: float | None = None
    warnings: list[str]

    @model_serializer(mode="wrap")
    def _without_what_it_has_not(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        for name in ("guidance_scale_2", "boundary_ratio", "strength", "preview_every", "deadline_s"):
            if dumped[name] is None:
                del dumped[name]
        return dumped

    @classmethod
    def from_job(
        cls,
        job: Job,
        *,
        url: str | None = None,
        b64_json: str | None = None,
        expires_at: float | None = None,
        outlook: Outlook | None = None,
    ) -> Video:
        """``url`` or ``b64_json`` of a completed job's video."""
        request, outlook = job.request, outlook or Outlook(None, None)
        has_video = url is not None or b64_json is not None
        return cls(
            **request.model_dump(include=_PARAMETERS),
            id=job.id,
            status=wire_status(job.status),
            progress=job.progress,
            created=int(job.created_at),
            created_at=int(job.created_at),
            completed_at=_seconds(job.finished_at),
            expires_at=_seconds(expires_at),
            data=[Datum(url=url, b64_json=b64_json, fps=request.fps)] if has_video else [],
            error=_error(job),
            remixed_from_video_id=job.remixed_from,
            queue_position=outlook.queue_position,
            eta_s=outlook.eta_s,
            inference_time_s=None if job.timings is None else round(job.timings.total_s, 3),
            timings=None if job.timings is None else _rounded(job.timings),
            user=job.user,
            size=str(request.size),
            seconds=f"{round(request.seconds, 2):g}",
            warnings=list(job.warnings),
        )


class VideoEstimate(BaseModel):
    """What a request would become: every resolved parameter, and seconds, which are null until a video of the model was
    timed. ``predicted_s`` is to the end of the video, ``queue_wait_s`` what of it others take, ``gpu_s`` its own."""

    object: Literal["video.estimate"] = "video.estimate"
    model: str
    prompt: str
    negative_prompt: str
    size: str
    seconds: str
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    flow_shift: float
    seed: int
    priority: Priority
    deadline_s: float | None = None
    warnings: list[str]
    predicted_s: float | None
    queue_wait_s: float | None
    gpu_s: float | None

    @classmethod
    def of(cls, resolved: Resolved, found: Estimate) -> VideoEstimate:
        request, wait_s = resolved.request, None
        if found.eta_s is not None and found.device_s is not None:
            wait_s = round(max(found.eta_s - found.device_s, 0.0), 1)
        return cls(
            **request.model_dump(include=_PARAMETERS),
            size=str(request.size),
            seconds=f"{round(request.seconds, 2):g}",
            warnings=list(resolved.warnings),
            predicted_s=found.eta_s,
            queue_wait_s=wait_s,
            gpu_s=found.device_s,
        )


class VideoList(BaseModel):
    """A page of jobs; ``last_id`` is what the next one is asked for with."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, videos: Sequence[Video], *, has_more: bool) -> VideoList:
        first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
        return cls(data=list(videos), first_id=first, last_id=last, has_more=has_more)


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


Feature = Literal["turns", "checkpoints", "previews"]
Mode = Literal["text-to-video", "image-to-video", "video-to-video"]


class Model(BaseModel):
    """OpenAI's model object, and what the model makes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kinema"
    engine: str
    description: str
    modes: list[Mode]
    features: list[Feature]
    fixed: list[str] = Field(description="Parameters that have the preset's value and no other.")
    output_formats: list[str]
    preset: dict[str, Any]
    limits: dict[str, Any]

    @classmethod
    def from_capabilities(cls, can: Capabilities, created: int) -> Model:
        modes: dict[Mode, bool] = {
            "text-to-video": can.is_text_to_video,
            "image-to-video": can.is_image_to_video,
            "video-to-video": can.is_video_to_video,
        }
        features: dict[Feature, bool] = {
            "turns": can.is_interleaved,
            "checkpoints": can.has_checkpoints,
            "previews": can.has_previews,
        }
        return cls(
            id=can.model,
            created=created,
            engine=can.engine,
            description=can.description,
            modes=[mode for mode, is_made in modes.items() if is_made],
            features=[feature for feature, is_there in features.items() if is_there],
            fixed=list(can.fixed_options),
            output_formats=list(can.output_formats),
            preset=can.preset.model_dump() | {"size": str(can.preset.size)},
            limits=can.limits.model_dump(),
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None
    id: str | None = Field(None, description="The job, once it was accepted.")


class ErrorBody(BaseModel):
    """Every error has this shape."""

    error: ErrorInfo


def wire_status(status: JobStatus) -> WireStatus:
    """The four words that clients know."""
    return WireStatus.FAILED if status is JobStatus.CANCELLED else WireStatus(status.value)


def _error(job: Job) -> VideoError | None:
    if job.status is JobStatus.CANCELLED:
        return VideoError(code="cancelled", message=_CANCELLED)
    return None if job.error is None else VideoError(**job.error.model_dump())


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def _rounded(timings: Timings) -> Timings:
    """To the millisecond; more is noise."""
    return Timings(**{name: round(seconds, 3) for name, seconds in timings.model_dump().items()})
