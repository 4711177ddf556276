"""The JSON shapes that come in: from the fields of a body to GenerationOptions.

Fields that nobody knows are refused, with the known name that is nearest.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from kinema.errors import InvalidRequest, UnsupportedRequest
from kinema.request.fields import FILM_FORMS, Film, Flag, ImageBytes, JsonText, Real, Text, Whole
from kinema.request.json_text import parse_json
from kinema.request.options import GenerationOptions, Given
from kinema.request.request import GenerationRequest

_RESPONSE_FORMATS = ("url", "b64_json")
_OUTPUT_FORMATS = ("mp4",)
# Where some clients put what their own library has no argument for, as one JSON text.
_ENVELOPES = ("extra_body", "extra_params")
# How soon a video was wanted says nothing of the next one.
_OF_A_SUBMISSION = {"priority", "deadline_s"}


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


class VideoBody(BaseModel):
    """The body of ``POST /v1/videos``. What is left out comes from the model's preset."""

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
    preview_every: Whole = Field(None, description="Send a small picture after every so many denoising steps.")
    input_reference: ImageBytes = None
    priority: Text = Field(None, description="low, normal or high: counts the work as eight times more or less.")
    deadline_s: Real = Field(None, description="Seconds from now within which the video is wanted.")
    user: Text = Field(None, max_length=1000, description="The client's own name for its user; stored, not used.")

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Raises InvalidRequest, which names the field; UnsupportedRequest for an output that is not made."""
        try:
            body = cls.model_validate(_opened(fields))
        except ValidationError as exc:
            raise explain(exc.errors(include_url=False)[0], cls) from exc
        body._check()
        return body

    def options(self) -> GenerationOptions:
        """The parameters as they were sent. Raises InvalidRequest when they contradict each other."""
        return GenerationOptions(**{name: getattr(self, name, None) for name in GenerationOptions.model_fields})

    def given(self) -> Given:
        """The first frame, if there is one."""
        return Given(image=self.input_reference)

    def _check(self) -> None:
        if self.prompt is None:
            raise InvalidRequest("prompt is missing", param="prompt")


class RemixBody(VideoBody):
    """The body of ``POST /v1/videos/{id}/remix``: a new prompt. What is left out is as it was in the first video."""

    strength: Real = Field(None, description="Of an edit: how much may change, from 0 to 1.")

    def options_after(self, first: GenerationRequest) -> GenerationOptions:
        """The first video's parameters, the seed too, with the new ones in their place."""
        given = self.options().model_dump(exclude_none=True)
        if {"num_frames", "seconds"} & given.keys():
            kept: dict[str, Any] = first.model_dump(exclude={"num_frames", *_OF_A_SUBMISSION})
        else:
            kept = first.model_dump(exclude=_OF_A_SUBMISSION)
        kept["size"] = str(first.size)
        return GenerationOptions(**{k: v for k, v in kept.items() if k in GenerationOptions.model_fields} | given)


class FilmBody(VideoBody):
    """The body of ``POST /v1/videos/extensions``: a video of this server or a film, and how it goes on."""

    video: Film = None

    def _check(self) -> None:
        super()._check()
        if self.video is None:
            raise InvalidRequest(f"video is missing; {FILM_FORMS}", param="video")
        if self.input_reference is not None:
            raise InvalidRequest(
                "input_reference has no use here: the video itself is where it begins; leave it out",
                param="input_reference",
            )


class EditBody(FilmBody):
    """The body of ``POST /v1/videos/edits``: a video of this server or a film, and what it should become."""

    strength: Real = Field(None, description="How much may change, from 0 to 1.")


class GenerationBody(VideoBody):
    """The body of ``POST /v1/videos/generations``. What is left out comes from the model's preset."""

    response_format: Text = Field(None, description="url (default) or b64_json.")
    output_format: Text = Field(None, description="mp4.")
    stream: Flag = Field(None, description="Answer with server-sent events.")
    nvext: Annotated[NvExt | None, JsonText] = None

    def options(self) -> GenerationOptions:
        """A parameter may stand at the top or in nvext. Raises InvalidRequest when both are there and differ."""
        values = super().options().model_dump()
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
        super()._check()
        _check_choice("response_format", self.response_format, _RESPONSE_FORMATS, InvalidRequest)
        _check_choice("output_format", self.output_format, _OUTPUT_FORMATS, UnsupportedRequest)


def fingerprint(path: str, fields: Mapping[str, Any]) -> str:
    """A digest of what was asked where, the same in JSON and in multipart, which has text alone and no null."""
    return hashlib.sha256(json.dumps([path, _as_text(fields)], sort_keys=True).encode()).hexdigest()


def _as_text(value: Any) -> Any:  # noqa: ANN401 - whatever a body may hold
    match value:
        case Mapping():
            return {name: _as_text(inner) for name, inner in value.items() if inner is not None}
        case list():
            return [_as_text(inner) for inner in value]
        case bytes():
            return hashlib.sha256(value).hexdigest()
        case bool():
            return "true" if value else "false"
    return str(value)


def _opened(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with those of an envelope beside them; what the envelope says goes, as in the OpenAI SDKs."""
    opened = {name: value for name, value in fields.items() if name not in _ENVELOPES}
    for name in _ENVELOPES:
        inner = fields.get(name)
        if isinstance(inner, str):
            inner = parse_json(inner, name)
        if inner is not None and not isinstance(inner, dict):
            raise InvalidRequest(f'{name} must be an object, for instance {{"seed": 7}}', param=name)
        opened |= inner or {}
    return opened


def _check_choice(
    name: str, value: str | None, accepted: Sequence[str], error: type[InvalidRequest | UnsupportedRequest]
) -> None:
    if value is not None and value not in accepted:
        raise error(f"{name} {value[:40]!r} is not known; accepted: {', '.join(accepted)}", param=name)


def explain(error: ErrorDetails, body: type[BaseModel]) -> InvalidRequest:
    """One sentence about the first field that is wrong."""
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)[:100]
    if error["type"] == "extra_forbidden":
        return _unknown(path, name, body)
    if error["type"] == "string_too_long":
        return InvalidRequest(f"{name} is too long; at most {error['ctx']['max_length']} characters", param=name)
    said = error["ctx"]["what"] if error["type"] == "field" else f"is not valid: {error['msg']}"
    return InvalidRequest(f"{name} {said}", param=name)


def _unknown(path: Sequence[str], name: str, body: type[BaseModel]) -> InvalidRequest:
    known = NvExt.model_fields if path[0] == "nvext" else body.model_fields
    nearest = difflib.get_close_matches(path[-1][:100], known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
    return InvalidRequest(f"unknown field {name!r}; {hint}", param=name)
