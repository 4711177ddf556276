"""The JSON shapes of answers: a video, a list, a model, an error. ``request/bodies.py`` has the shapes of requests."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from kinema.cluster.base import WorkerInfo
from kinema.events import Timings
from kinema.job import Job, JobStatus
from kinema.request.capabilities import Capabilities, LoraInfo, Tier
from kinema.request.formats import OutputFormat
from kinema.request.memory import Memory, most_frames
from kinema.request.request import GenerationRequest, LoraUse, Priority
from kinema.request.resolve import Resolved
from kinema.server.paging import Listed, Page
from kinema.service.outlook import Outlook
from kinema.service.queue import TimeEstimate

_CANCELLED = "The video was cancelled."
# An answer about a video leaves these out when they are null or empty.
_LEFT_OUT = (
    "guidance_scale_2",
    "boundary_ratio",
    "strength",
    "tier",
    "solver",
    "timesteps",
    "loras",
    "preview_every",
    "deadline_s",
)


class WireStatus(StrEnum):
    """The statuses that OpenAI's clients know."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


class Datum(BaseModel):
    """A finished video: the address at which it opens, or its bytes as base64."""

    url: str | None = None
    b64_json: str | None = None
    output_format: OutputFormat = "mp4"
    fps: int

    @model_serializer(mode="wrap")
    def _one_of_both(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        return {name: value for name, value in dumped.items() if value is not None}


class VideoError(BaseModel):
    """Why there is no video."""

    code: str
    message: str


class Parameters(BaseModel):
    """What a video is made from: every value as it is used. ``warnings`` has a sentence for each that was adjusted."""

    prompt: str
    negative_prompt: str
    size: str = Field(description="WIDTHxHEIGHT in pixels.")
    seconds: str = Field(description="The length of the video.")
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    strength: float | None = None
    flow_shift: float | None = Field(None, description="None for a model whose solver moves no timesteps.")
    tier: str | None = Field(None, description="The tier of the model whose values these are.")
    solver: str | None = Field(None, description="The rule of a step, where it is not the model's own.")
    timesteps: list[float] | None = Field(None, description="The timestep of each step, where a tier lists them.")
    seed: int
    output_format: OutputFormat = Field("mp4", description="The kind of file that the video is stored as.")
    loras: list[LoraUse] = Field([], description="Each LoRA with the digest of its file and its strengths.")
    preview_every: int | None = None
    priority: Priority
    deadline_s: float | None = None
    warnings: list[str]


_PARAMETERS = set(Parameters.model_fields)


class VideoState(Listed):
    """Where a job stands. Times are whole seconds since the epoch."""

    object: Literal["video"] = "video"
    model: str
    status: WireStatus
    progress: int = Field(description="The part of the video's own work that is done, in percent.")
    created: int
    created_at: int
    completed_at: int | None
    expires_at: int | None = Field(description="When the video is removed.")
    starred: bool = Field(description="Whether somebody keeps it: then it does not expire.")
    data: list[Datum] = Field(description="The finished video; empty before that.")
    live_url: str | None = Field(
        description="Where the video opens while it is made, from its first frame on; null unless it is in progress."
    )
    error: VideoError | None
    remixed_from_video_id: str | None
    queue_position: int | None = Field(description="The place in the queue: 1 is next; null once the job runs.")
    eta_s: float | None = Field(description="Predicted seconds to the end of the video.")
    inference_time_s: float | None
    timings: Timings | None
    user: str | None


class Video(Parameters, VideoState):  # pydantic takes the fields of the last base first
    """A job: OpenAI's video with all of its fields, Dynamo's ``data``, and every resolved parameter.

    A cancelled job reads as failed with the code ``cancelled``, since OpenAI's clients take an unknown status for
    completed.
    """

    @model_serializer(mode="wrap")
    def _without_absent_parameters(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        for name in _LEFT_OUT:
            if dumped[name] in (None, []):
                del dumped[name]
        return dumped

    def with_base64(self, text: str) -> str:
        """Return the JSON of this finished video with its bytes as base64 in place of its address."""
        data = [datum.model_copy(update={"url": None, "b64_json": text}) for datum in self.data]
        return self.model_copy(update={"data": data}).model_dump_json()

    @classmethod
    def from_job(
        cls,
        job: Job,
        *,
        url: str | None = None,
        b64_json: str | None = None,
        live_url: str | None = None,
        expires_at: float | None = None,
        outlook: Outlook | None = None,
    ) -> Video:
        """Return the answer about a job. ``url`` or ``b64_json`` is the video of a completed job, and ``live_url``
        opens one in progress."""
        request, outlook = job.request, outlook or Outlook(None, None)
        has_video = url is not None or b64_json is not None
        return cls(
            **_parameters(request, job.warnings),
            id=job.id,
            model=request.model,
            status=wire_status(job.status),
            progress=job.progress,
            created=int(job.created_at),
            created_at=int(job.created_at),
            completed_at=_seconds(job.finished_at),
            expires_at=_seconds(expires_at),
            starred=job.starred_at is not None,
            data=[Datum(url=url, b64_json=b64_json, output_format=request.output_format, fps=request.fps)]
            if has_video
            else [],
            live_url=live_url,
            error=_error(job),
            remixed_from_video_id=job.remixed_from,
            queue_position=outlook.queue_position,
            eta_s=outlook.eta_s,
            inference_time_s=None if job.timings is None else round(job.timings.total_s, 3),
            timings=None if job.timings is None else _rounded(job.timings),
            user=job.user,
        )


class VideoRow(Listed):
    """A job in a few fields: OpenAI's video, and what a list shows of it beside that."""

    object: Literal["video"] = "video"
    model: str
    status: WireStatus
    progress: int = Field(description="The part of the video's own work that is done, in percent.")
    created_at: int
    completed_at: int | None
    expires_at: int | None = Field(description="When the video is removed.")
    starred: bool = Field(description="Whether somebody keeps it: then it does not expire.")
    error: VideoError | None
    remixed_from_video_id: str | None
    prompt: str
    size: str = Field(description="WIDTHxHEIGHT in pixels.")
    seconds: str = Field(description="The length of the video.")
    seed: int
    url: str | None = Field(description="Where the finished video opens; its other files open with a `variant` there.")
    queue_position: int | None = Field(description="The place in the queue: 1 is next; null once the job runs.")
    eta_s: float | None = Field(description="Predicted seconds to the end of the video.")

    @classmethod
    def from_job(cls, job: Job, *, url: str | None, expires_at: float | None, outlook: Outlook) -> VideoRow:
        request = job.request
        return cls(
            id=job.id,
            model=request.model,
            status=wire_status(job.status),
            progress=job.progress,
            created_at=int(job.created_at),
            completed_at=_seconds(job.finished_at),
            expires_at=_seconds(expires_at),
            starred=job.starred_at is not None,
            error=_error(job),
            remixed_from_video_id=job.remixed_from,
            prompt=request.prompt,
            size=str(request.size),
            seconds=f"{round(request.seconds, 2):g}",
            seed=request.seed,
            url=url,
            queue_position=outlook.queue_position,
            eta_s=outlook.eta_s,
        )


class VideoEstimate(Parameters):
    """The video that a request would become, and how long it would take.

    The seconds are null until a video of the model was timed.
    """

    object: Literal["video.estimate"] = "video.estimate"
    model: str
    predicted_s: float | None = Field(description="Seconds to the end of the video.")
    queue_wait_s: float | None = Field(description="The part of predicted_s in which other videos are made.")
    gpu_s: float | None = Field(description="Seconds that a device works for this video.")

    @classmethod
    def of(cls, resolved: Resolved, found: TimeEstimate) -> VideoEstimate:
        wait_s = None
        if found.eta_s is not None and found.device_s is not None:
            wait_s = round(max(found.eta_s - found.device_s, 0.0), 1)
        return cls(
            **_parameters(resolved.request, resolved.warnings),
            model=resolved.request.model,
            predicted_s=found.eta_s,
            queue_wait_s=wait_s,
            gpu_s=found.device_s,
        )


class VideoList(Page[Video]):
    """A page of the list of videos."""


class VideoRowList(Page[VideoRow]):
    """A page of the list of videos, in short answers."""


class DeletedVideo(BaseModel):
    """The video that was deleted."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Deletion(BaseModel):
    """A video that was to be deleted, and whether it was there."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool


class DeletionList(BaseModel):
    """What became of the videos that were to be deleted, in the order in which they were asked for."""

    object: Literal["list"] = "list"
    data: list[Deletion]


class Usage(BaseModel):
    """What a key has made on a day."""

    object: Literal["usage"] = "usage"
    day: str = Field(description="The day on which the videos were finished (UTC), for instance 2026-12-31.")
    key: str | None = Field(
        description="The name of the key, or the beginning of its digest; null on a server without keys."
    )
    videos: int = Field(description="Finished videos, deleted ones too.")
    device_s: float = Field(description="Seconds for which a device worked for them alone.")
    bytes: int = Field(description="Size of their files.")


class UsageList(BaseModel):
    """What was made, by day."""

    object: Literal["list"] = "list"
    data: list[Usage]


Feature = Literal["turns", "checkpoints", "previews", "sound"]
Mode = Literal[
    "text-to-video",
    "image-to-video",
    "first-last-frame-to-video",
    "video-to-video",
    "control-to-video",
    "reference-to-video",
    "frames-to-video",
]


class Model(BaseModel):
    """OpenAI's model object, and what the model makes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kinema"
    aliases: list[str] = Field(description="Further names that requests may call it.")
    engine: str
    description: str
    modes: list[Mode]
    features: list[Feature]
    control_videos: list[str] = Field(description="The films of `control_video`, in their order.")
    fixed: list[str] = Field(description="Parameters that have the preset's value and no other.")
    output_formats: list[str]
    preset: dict[str, Any]
    limits: dict[str, Any]
    loras: list[LoraInfo] = Field(description="The LoRAs that a video may be made with now.")
    tiers: list[Tier] = Field(description="Named sets of values and LoRAs that a request may choose now.")
    max_frames_in_memory: int | None = Field(
        description="The most frames of the preset's size that fit into a device's memory; null before it was measured."
    )

    @classmethod
    def from_capabilities(cls, can: Capabilities, created: int, workers: Sequence[Memory | None] = ()) -> Model:
        """Return the answer about a model whose workers have these memories."""
        modes: dict[Mode, bool] = {
            "text-to-video": can.is_text_to_video,
            "image-to-video": can.is_image_to_video,
            "first-last-frame-to-video": can.is_first_last_frame_to_video,
            "video-to-video": can.is_video_to_video,
            "control-to-video": bool(can.control_videos),
            "reference-to-video": can.max_reference_images > 0,
            "frames-to-video": can.takes_conditioning,
        }
        features: dict[Feature, bool] = {
            "turns": can.is_interleaved,
            "checkpoints": can.has_checkpoints,
            "previews": can.has_previews,
            "sound": can.has_sound,
        }
        return cls(
            id=can.model,
            created=created,
            aliases=list(can.aliases),
            engine=can.engine,
            description=can.description,
            modes=[mode for mode, is_made in modes.items() if is_made],
            features=[feature for feature, is_there in features.items() if is_there],
            control_videos=list(can.control_videos),
            fixed=list(can.fixed_options),
            output_formats=list(can.output_formats),
            preset=can.preset.model_dump() | {"size": str(can.preset.size)},
            limits=can.limits.model_dump(),
            loras=list(can.loras),
            tiers=list(can.offered_tiers),
            max_frames_in_memory=most_frames(can, workers),
        )


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorInfo(BaseModel):
    """What went wrong."""

    message: str = Field(description="One sentence that says what is wrong and what would be accepted.")
    type: str
    param: str | None = Field(description="The field or the query parameter that is wrong.")
    code: str | None = Field(description="A word for programs.")
    id: str | None = Field(None, description="The id of the video, where it was accepted before the error.")


class ErrorBody(BaseModel):
    """Every error has this shape."""

    error: ErrorInfo


class LoadingState(BaseModel):
    """How far the worker of this process is with its start."""

    stage: str = Field(description="What it does now, in words.")
    part: float | None = Field(description="The part of it that is done, from 0 to 1; null where that is not known.")
    seconds: float = Field(description="The seconds since the start began.")


class NotReady(ErrorBody):
    """No worker takes jobs yet. `status` and `loading` are there while the worker of this process starts."""

    status: Literal["starting"] | None = None
    loading: LoadingState | None = None


class ResidentMemory(BaseModel):
    """The memory of a worker's device, in bytes."""

    limit_bytes: int = Field(description="What all tensors may take.")
    room_bytes: int = Field(description="What is left for a single video.")
    residents: dict[str, int] = Field(description="What lies there for all videos, by name.")


class WorkerState(BaseModel):
    """A worker and its device."""

    model: str
    device: str
    ready: bool
    memory: ResidentMemory | None = Field(description="Null where nobody knows: on a CPU, for instance.")
    parked: int = Field(description="How often a video left the device's memory for others since the start.")
    resumed: int = Field(description="How often one came back.")

    @classmethod
    def of(cls, worker: WorkerInfo) -> WorkerState:
        memory = worker.memory
        return cls(
            model=worker.capabilities.model,
            device=worker.device,
            ready=worker.is_ready,
            memory=None if memory is None else ResidentMemory(**memory.model_dump(include=_RESIDENT_MEMORY)),
            parked=worker.num_parked,
            resumed=worker.num_resumed,
        )


_RESIDENT_MEMORY = set(ResidentMemory.model_fields)


class Health(BaseModel):
    """The state of the server. `loading` is there while the worker of this process starts."""

    status: Literal["ready", "starting"]
    loading: LoadingState | None = None
    models: list[str]
    workers: list[WorkerState]
    jobs_waiting: int = Field(description="The number of videos that wait for a worker.")
    sweeping: Literal["working", "held", "stopped"] = Field(
        description="Whether files that are no longer needed are removed. `held`: files that belong to no video of the "
        "database are kept until somebody removes them. `stopped`: nothing is removed, because the storage belongs to "
        "another database, or one of the two cannot be reached."
    )
    files_held: int = Field(description="The number of files that belong to no video of the database and are kept.")
    bytes_held: int = Field(description="The size of these files.")


def wire_status(status: JobStatus) -> WireStatus:
    """Return the status in the words that clients know."""
    return WireStatus.FAILED if status is JobStatus.CANCELLED else WireStatus(status.value)


def _parameters(request: GenerationRequest, warnings: Sequence[str]) -> dict[str, Any]:
    """Return the values of Parameters. No key of storage is among them."""
    return request.model_dump(include=_PARAMETERS) | {
        "size": str(request.size),
        "seconds": f"{round(request.seconds, 2):g}",
        "warnings": list(warnings),
    }


def _error(job: Job) -> VideoError | None:
    if job.status is JobStatus.CANCELLED:
        return VideoError(code="cancelled", message=_CANCELLED)
    return None if job.error is None else VideoError(**job.error.model_dump())


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def _rounded(timings: Timings) -> Timings:
    """Return the times in whole milliseconds; more digits would be noise."""
    return Timings(**{name: round(seconds, 3) for name, seconds in timings.model_dump().items()})
