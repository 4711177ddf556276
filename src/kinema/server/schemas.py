"""The JSON shapes of the API: from a body to GenerationOptions, from a Job or Capabilities to an answer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import ErrorDetails

from kinema.capabilities import Capabilities
from kinema.errors import InvalidRequest, UnsupportedRequest
from kinema.job import Job, JobStatus
from kinema.request import GenerationOptions
from kinema.server.fields import Flag, ImageBytes, JsonText, Real, Text, Whole

_RESPONSE_FORMATS = ("url", "b64_json")
_OUTPUT_FORMATS = ("mp4",)


class NvExt(BaseModel):
    """The same parameters where NVIDIA Dynamo's frontend has them."""

    model_config = ConfigDict(extra="forbid")

    fps: Whole = None
    num_frames: Whole = None
    negative_prompt: Text = None
    num_inference_steps: Whole = None
    guidance_scale: Real = None
    guidance_scale_2: Real = None
    seed: Whole = None
    boundary_ratio: Real = None
    annotations: list[str] | None = Field(None, description="Accepted and ignored, with a warning.")


class GenerationBody(BaseModel):
    """The body of ``POST /v1/videos/generations``. What is left out comes from the model's preset."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"required": ["prompt"]})

    prompt: Text = Field(None, description="What the video shows.")
    model: Text = Field(None, description="One of /v1/models; by default the first.")
    negative_prompt: Text = Field(None, description="What the video should not show.")
    size: Text = Field(None, description="WIDTHxHEIGHT in pixels, for instance 832x480.")
    num_frames: Whole = Field(None, description="Frames; brought to the nearest 4k+1. Overrides seconds.")
    seconds: Real = Field(None, description="Length.")
    fps: Whole = Field(None, description="Frames a second.")
    num_inference_steps: Whole = Field(None, description="Denoising steps.")
    guidance_scale: Real = Field(None, description="How strictly the prompt is followed; 1 or less turns it off.")
    guidance_scale_2: Real = Field(None, description="The same for the second expert of a model with two.")
    boundary_ratio: Real = Field(None, description="Where a model with two experts changes over.")
    flow_shift: Real = Field(None, description="Shifts the timesteps towards the noisy end.")
    seed: Whole = Field(None, description="The same seed makes the same video; drawn when absent.")
    input_reference: ImageBytes = None
    user: Text = Field(None, max_length=1000, description="The client's own name for its user; stored, not used.")
    response_format: Text = Field(None, description="url (default) or b64_json.")
    output_format: Text = Field(None, description="mp4.")
    stream: Flag = Field(None, description="Answer with server-sent events.")
    nvext: Annotated[NvExt | None, JsonText] = None

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> GenerationBody:
        """Raises InvalidRequest, which names the field; UnsupportedRequest for an output that is not made."""
        try:
            body = cls.model_validate(fields)
        except ValidationError as exc:
            raise _explain(exc.errors(include_url=False)[0]) from exc
        body._check()
        return body

    def options(self) -> GenerationOptions:
        """A parameter may stand at the top or in nvext. Raises InvalidRequest when both are there and differ."""
        values = {name: getattr(self, name) for name in GenerationOptions.model_fields}
        for name, value in (self.nvext or NvExt()).model_dump(exclude={"annotations"}, exclude_none=True).items():
            if values[name] not in (None, value):
                raise InvalidRequest(f"{name} and nvext.{name} differ; send one of them", param=f"nvext.{name}")
            values[name] = value
        return GenerationOptions(**values)

    def notes(self) -> Sequence[str]:
        """What is accepted and has no effect."""
        has_annotations = self.nvext is not None and self.nvext.annotations
        return ("nvext.annotations was ignored: there are none here",) if has_annotations else ()

    @property
    def is_base64(self) -> bool:
        return self.response_format == "b64_json"

    def _check(self) -> None:
        if self.prompt is None:
            raise InvalidRequest("prompt is missing", param="prompt")
        _check_choice("response_format", self.response_format, _RESPONSE_FORMATS, InvalidRequest)
        _check_choice("output_format", self.output_format, _OUTPUT_FORMATS, UnsupportedRequest)


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
    """The answer to a generation: OpenAI's video, Dynamo's ``data``, and every resolved parameter."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: JobStatus
    progress: int
    created: int
    created_at: int
    completed_at: int | None
    data: list[Datum]
    error: VideoError | None
    inference_time_s: float | None
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
    warnings: list[str]

    @model_serializer(mode="wrap")
    def _without_second_expert(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        for name in ("guidance_scale_2", "boundary_ratio"):
            if dumped[name] is None:
                del dumped[name]
        return dumped

    @classmethod
    def from_job(cls, job: Job, *, url: str | None = None, b64_json: str | None = None) -> Video:
        """``url`` or ``b64_json`` of a completed job's video."""
        request = job.request
        has_video = url is not None or b64_json is not None
        return cls(
            **request.model_dump(exclude={"width", "height", "image_key"}),
            id=job.id,
            status=job.status,
            progress=job.progress,
            created=int(job.created_at),
            created_at=int(job.created_at),
            completed_at=None if job.finished_at is None else int(job.finished_at),
            data=[Datum(url=url, b64_json=b64_json, fps=request.fps)] if has_video else [],
            error=None if job.error is None else VideoError(**job.error.model_dump()),
            inference_time_s=None if job.timings is None else round(job.timings.total_s, 3),
            size=str(request.size),
            seconds=f"{round(request.seconds, 2):g}",
            warnings=list(job.warnings),
        )


class Model(BaseModel):
    """OpenAI's model object, and what the model makes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kinema"
    engine: str
    description: str
    modes: list[Literal["text-to-video", "image-to-video"]]
    output_formats: list[str]
    preset: dict[str, Any]
    limits: dict[str, Any]

    @classmethod
    def from_capabilities(cls, can: Capabilities, created: int) -> Model:
        modes: list[Literal["text-to-video", "image-to-video"]] = []
        if can.is_text_to_video:
            modes.append("text-to-video")
        if can.is_image_to_video:
            modes.append("image-to-video")
        return cls(
            id=can.model,
            created=created,
            engine=can.engine,
            description=can.description,
            modes=modes,
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


def _check_choice(
    name: str, value: str | None, accepted: Sequence[str], error: type[InvalidRequest | UnsupportedRequest]
) -> None:
    if value is not None and value not in accepted:
        raise error(f"{name} {value[:40]!r} is not known; accepted: {', '.join(accepted)}", param=name)


def _explain(error: ErrorDetails) -> InvalidRequest:
    """One sentence about the first field that is wrong."""
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)[:100]
    if error["type"] == "extra_forbidden":
        return _unknown(path, name)
    if error["type"] == "string_too_long":
        return InvalidRequest(f"{name} is too long; at most {error['ctx']['max_length']} characters", param=name)
    said = error["ctx"]["what"] if error["type"] == "field" else f"is not valid: {error['msg']}"
    return InvalidRequest(f"{name} {said}", param=name)


def _unknown(path: Sequence[str], name: str) -> InvalidRequest:
    known = NvExt.model_fields if path[0] == "nvext" else GenerationBody.model_fields
    nearest = difflib.get_close_matches(path[-1][:100], known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
    return InvalidRequest(f"unknown field {name!r}; {hint}", param=name)
