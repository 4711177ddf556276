"""The answers of the service as values. Fields that a newer service adds are kept as attributes."""

from __future__ import annotations

import base64
from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

VideoStatus = Literal["queued", "in_progress", "completed", "failed"]
CANCELLED = "cancelled"


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class VideoError(_Answer):
    """Why there is no video: a stable code, and one sentence."""

    code: str
    message: str


class VideoDatum(_Answer):
    """A finished video: where it opens."""

    url: str | None = None
    output_format: str = "mp4"
    fps: int | None = None


class Lora(_Answer):
    """A LoRA that a video is made with: the SHA-256 of its file, and its strengths."""

    name: str
    digest: str
    scale: float
    scale_2: float | None = None

    def __str__(self) -> str:
        second = "" if self.scale_2 is None else f" and {self.scale_2:g}"
        return f"{self.name} x {self.scale:g}{second}"


class Video(_Answer):
    """A video, from its request to its end. Times are whole seconds since the epoch.

    A cancelled video reads as failed, with the error code ``cancelled``. ``live_url`` opens a video in progress from
    its first frame on, in a browser or player that sends no key.
    """

    id: str
    object: str = "video"
    status: VideoStatus
    progress: int = 0
    model: str
    prompt: str | None = None
    size: str
    seconds: str
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    starred: bool = False
    error: VideoError | None = None
    remixed_from_video_id: str | None = None
    data: list[VideoDatum] = []
    live_url: str | None = None
    warnings: list[str] = []
    queue_position: int | None = None
    eta_s: float | None = None
    inference_time_s: float | None = None
    seed: int | None = None
    fps: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    tier: str | None = None
    solver: str | None = None
    timesteps: list[float] | None = None
    loras: list[Lora] = []
    output_format: str = "mp4"
    negative_prompt: str | None = None
    preview_every: int | None = None
    priority: str | None = None
    deadline_s: float | None = None
    user: str | None = None

    @property
    def is_over(self) -> bool:
        """Tell whether the video has ended."""
        return self.status in {"completed", "failed"}

    @property
    def is_cancelled(self) -> bool:
        return self.error is not None and self.error.code == CANCELLED


class InputFile(_Answer):
    """An input of the request. The digest of a first frame is that of its pixels (h, w, 3) uint8 RGB."""

    role: str
    sha256: str
    size_bytes: int


class Manifest(_Answer):
    """How a finished video was made. ``kinema replay`` makes it again from the MP4, which has the same.

    ``request`` has every value as it was used, ``made_by`` the engine, its model's digest, device and libraries,
    ``encoder`` the libraries that wrote the MP4, and ``video`` its digest and size.
    """

    kinema: str
    request: dict[str, Any]
    inputs: list[InputFile] = []
    made_by: dict[str, Any]
    encoder: dict[str, str]
    timings: dict[str, float]
    video: dict[str, Any]
    attempt: int
    made_at: float


class Estimate(_Answer):
    """The video that a request would become, and how long it would take.

    ``predicted_s`` are the seconds to its end. In ``queue_wait_s`` of them other videos are made, and a device works
    ``gpu_s`` for this video. They are None until a video of the model was timed.
    """

    model: str
    size: str
    seconds: str
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    tier: str | None = None
    loras: list[Lora] = []
    warnings: list[str] = []
    predicted_s: float | None = None
    queue_wait_s: float | None = None
    gpu_s: float | None = None


class VideoPage(_Answer):
    """One page of the list. To get the next page, send ``last_id`` as ``after``."""

    data: list[Video]
    last_id: str | None = None
    has_more: bool = False


class Deletion(_Answer):
    """A video that was to be deleted, and whether it was there."""

    id: str
    deleted: bool


class Deletions(_Answer):
    """What became of each of several videos."""

    data: list[Deletion]


class Usage(_Answer):
    """What a key has made on a day (UTC): finished videos, the seconds of a device and the bytes that they took.

    ``key`` is its name, or the beginning of its digest; None on a server without keys.
    """

    day: date
    key: str | None = None
    videos: int
    device_s: float
    bytes: int


class UsagePage(_Answer):
    """The days on which something was made."""

    data: list[Usage]


class VideoEvent(_Answer):
    """Something that happened to a video. ``seq`` counts a video's events from 1.

    An event whose type this version does not know has this class.
    """

    type: str
    seq: int = 0
    id: str
    status: VideoStatus
    progress: int = 0


class QueuedEvent(VideoEvent):
    """The video was accepted."""


class StartedEvent(VideoEvent):
    """A worker began to make it; ``attempt`` counts from 1."""

    attempt: int = 1


class ProgressEvent(VideoEvent):
    """``step`` of ``total`` steps of ``stage`` are done."""

    stage: str
    step: int
    total: int


class PreviewEvent(VideoEvent):
    """A small JPEG of the video after ``step`` of ``total`` denoising steps."""

    step: int
    total: int
    b64_jpeg: str

    @property
    def jpeg(self) -> bytes:
        return base64.b64decode(self.b64_jpeg)


class EndEvent(VideoEvent):
    """The last event, which carries the whole video."""

    video: Video


class CompletedEvent(EndEvent):
    """The video is stored and can be downloaded."""


class FailedEvent(EndEvent):
    """There is no video; ``video.error`` says why."""


class CancelledEvent(EndEvent):
    """The video was stopped because somebody asked for it."""


class VideoRow(_Answer):
    """A video in a few fields, as a list shows it. Fields as in ``Video``; ``url`` opens a finished one."""

    id: str
    status: VideoStatus
    progress: int = 0
    model: str
    prompt: str
    size: str
    seconds: str
    seed: int | None = None
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    starred: bool = False
    error: VideoError | None = None
    remixed_from_video_id: str | None = None
    url: str | None = None
    queue_position: int | None = None
    eta_s: float | None = None

    @property
    def is_over(self) -> bool:
        """Tell whether the video has ended."""
        return self.status in {"completed", "failed"}

    @property
    def is_cancelled(self) -> bool:
        return self.error is not None and self.error.code == CANCELLED


class VideoRowPage(_Answer):
    """One page of the list, in rows."""

    data: list[VideoRow]
    last_id: str | None = None
    has_more: bool = False


class ListEvent(_Answer):
    """Something that happened to the videos of a key. Another stream goes on behind the ``event_id``.

    An event whose type this version does not know has this class.
    """

    type: str
    event_id: str


class ListReset(ListEvent):
    """The list is to be read now: nothing is known of the time before. ``reason`` is no_id or unknown_id."""

    reason: str
    message: str


class VideoChanged(ListEvent):
    """A video is new, or has changed."""

    video: VideoRow


class VideoDeleted(ListEvent):
    """The video of this id is gone."""

    id: str


_KINDS: dict[str, type[VideoEvent]] = {
    "queued": QueuedEvent,
    "started": StartedEvent,
    "progress": ProgressEvent,
    "preview": PreviewEvent,
    "completed": CompletedEvent,
    "failed": FailedEvent,
    "cancelled": CancelledEvent,
}


def read_event(kind: str, seq: int, data: dict[str, Any]) -> VideoEvent:
    """Return the event of that type. Raises ValueError when ``data`` does not describe an event."""
    model = _KINDS.get(kind, VideoEvent)
    if issubclass(model, EndEvent):
        video = Video.model_validate(data)
        return model(type=kind, seq=seq, id=video.id, status=video.status, progress=video.progress, video=video)
    return model.model_validate(data | {"type": kind, "seq": seq})


_LIST_KINDS: dict[str, type[ListEvent]] = {"reset": ListReset, "deleted": VideoDeleted}


def read_list_event(kind: str, event_id: str, data: dict[str, Any]) -> ListEvent:
    """Return the event of that type. Raises ValueError when ``data`` does not describe an event."""
    about = {"type": kind, "event_id": event_id}
    if kind == "video":
        return VideoChanged(**about, video=VideoRow.model_validate(data))
    model = _LIST_KINDS.get(kind, ListEvent)
    return model.model_validate(data | about)
