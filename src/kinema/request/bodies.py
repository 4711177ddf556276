"""The bodies of the API's calls: from the fields of a body to GenerationOptions.

An unknown field is refused, and the answer names the nearest field that is known.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from kinema.errors import InvalidRequest, UnsupportedRequest
from kinema.ids import JobId
from kinema.request.capabilities import Tier
from kinema.request.fields import (
    FILM_FORMS,
    PICTURE_KINDS,
    Audio,
    Choice,
    Conditioning,
    Film,
    Films,
    Flag,
    JsonText,
    LoraField,
    Loras,
    Picture,
    Pictures,
    Real,
    References,
    Text,
    Texts,
    Whole,
)
from kinema.request.json_text import parse_json, told
from kinema.request.options import GenerationOptions, Given
from kinema.request.request import GenerationRequest
from kinema.request.tiers import TIER_VALUES

_RESPONSE_FORMATS = ("url", "b64_json")
# The fields that hold files.
_FILES = ("input_reference", "last_frame", "control_video", "reference_images", "conditioning", "audio")
# A remix does not inherit how soon the first video was wanted.
_OF_A_SUBMISSION = {"priority", "deadline_s"}


class NvExt(BaseModel):
    """Parameters in the place where NVIDIA Dynamo's frontend has them."""

    model_config = ConfigDict(extra="forbid")

    fps: Whole = None
    num_frames: Whole = None
    negative_prompt: Text = None
    num_inference_steps: Whole = None
    guidance_scale: Real = None
    guidance_scale_2: Real = None
    seed: Whole = None
    boundary_ratio: Real = None
    annotations: Texts = Field(None, description="Accepted and ignored, with a warning.")


def _complete_schema(schema: dict[str, Any], model: type[Body]) -> None:
    """Adds what pydantic does not see: absent fields are None, and envelopes are opened before it reads the fields."""
    if model.required:
        schema["required"] = list(model.required)
    shape = {
        "anyOf": [{"type": "object"}, {"type": "string"}],
        "description": "More fields of this body, as an object or as the JSON text of one.",
    }
    schema["properties"] |= dict.fromkeys(model.envelopes, shape)


class Body(BaseModel):
    """What all bodies share: an unknown field is refused, and an error names its field."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_complete_schema)

    # The fields that a client must send, and what the error says about one that is missing.
    required: ClassVar[Mapping[str, str]] = {}
    # The fields that hold further fields.
    envelopes: ClassVar[Sequence[str]] = ()
    # What a person who tries the call may begin with.
    example: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Raises InvalidRequest, which names the field; UnsupportedRequest for an output that is not made."""
        try:
            body = cls.model_validate(_opened(fields, cls.envelopes))
        except ValidationError as exc:
            raise _explain(exc.errors(include_url=False, include_input=False), cls) from exc
        body.check()
        return body

    def check(self) -> None:
        """Raises InvalidRequest or UnsupportedRequest for fields that are missing or do not go together."""
        for name, hint in self.required.items():
            if getattr(self, name) is None:
                raise InvalidRequest(f"{name} is missing{hint}", param=name)


class VideoBody(Body):
    """The body of ``POST /v1/videos``. The model's preset has the values that are left out."""

    required = {"prompt": ""}
    envelopes = ("extra_body", "extra_params")
    example = {"prompt": "a red circle moves right"}

    prompt: Text = Field(None, description="What the video shows.")
    model: Choice = Field(None, description="A model of /v1/models, or one of its aliases; by default the first.")
    negative_prompt: Text = Field(None, description="What the video should not show.")
    size: Text = Field(None, description="WIDTHxHEIGHT in pixels; the `preset` in /v1/models has the model's own.")
    num_frames: Whole = Field(
        None,
        description="Number of frames. The nearest number that the model makes is taken. Overrides seconds.",
    )
    seconds: Real = Field(None, description="Length of the video in seconds.")
    fps: Whole = Field(None, description="Frames per second.")
    num_inference_steps: Whole = Field(None, description="Number of denoising steps.")
    guidance_scale: Real = Field(None, description="How strictly the prompt is followed; 1 or less turns it off.")
    guidance_scale_2: Real = Field(None, description="The guidance scale of the second expert, for a model with two.")
    boundary_ratio: Real = Field(
        None,
        description="The part of the noise at which a model with two experts changes from the first to the second.",
    )
    flow_shift: Real = Field(
        None, description="Shifts the timesteps towards the noisy end, where the model has such a shift."
    )
    seed: Whole = Field(None, description="The same seed makes the same video; random by default.")
    tier: Text = Field(None, description="A tier of the model in /v1/models: a named set of defaults and LoRAs.")
    loras: Loras = None
    output_format: Choice = Field(
        None,
        description="The kind of file: mp4 (default, H.264 and AAC), webm (VP9 and Opus) or gif (without sound).",
    )
    preview_every: Whole = Field(None, description="Denoising steps from one preview to the next; none by default.")
    input_reference: Pictures = None
    last_frame: Picture = Field(
        None, description=f"Last frame ({PICTURE_KINDS}) beside a first one, for a model that takes it."
    )
    control_video: Films = None
    reference_images: References = None
    conditioning: Conditioning = None
    audio: Audio = None
    priority: Choice = Field(
        None,
        description="low, normal or high. High counts the work of the video as an eighth, low as eight times as much.",
    )
    deadline_s: Real = Field(None, description="Seconds from now within which the video is wanted.")
    user: Text = Field(
        None, max_length=1000, description="The client's name for its user; it is stored and has no effect."
    )

    def options(self) -> GenerationOptions:
        """Return the parameters as they were sent. Raises InvalidRequest when they contradict each other."""
        return GenerationOptions(**{name: getattr(self, name, None) for name in GenerationOptions.model_fields})

    def given(self) -> Given:
        """Return the files that came with the body; ``named_films`` are not among them."""
        first, second, *_ = (*(self.input_reference or ()), None, None)
        return Given(
            image=first,
            last_frame=self.last_frame if second is None else second,
            control_video=tuple(film for film in self.control_video or () if isinstance(film, bytes)),
            reference_images=self.reference_images or (),
            conditioning=self.conditioning or (),
            audio=self.audio,
        )

    @property
    def named_films(self) -> Mapping[int, JobId]:
        """The videos of this server among the films of control, by their places."""
        films = enumerate(self.control_video or ())
        return {place: film for place, film in films if not isinstance(film, bytes)}

    def without_files(self) -> Self:
        """Return the body without what ``given`` returns."""
        return self.model_copy(update=dict.fromkeys(_FILES))

    def check(self) -> None:
        super().check()
        if self.last_frame is not None and len(self.input_reference or ()) == 2:
            raise InvalidRequest(
                "last_frame has no use here: the second picture of input_reference is the last frame; send one of them",
                param="last_frame",
            )


class RemixBody(VideoBody):
    """The body of ``POST /v1/videos/{id}/remix``: a new prompt. The first video has the values that are left out."""

    strength: Real = Field(None, description="How much of an edited video may change, above 0 and up to 1.")

    def options_after(
        self, first: GenerationRequest, tiers: Sequence[Tier] = (), named: str | None = None
    ) -> GenerationOptions:
        """Return the parameters of the first video, its seed too, with the new values in their place.

        It keeps the first one's tier, by its values. With another tier, or an empty text for none, all that a tier may
        set is left out. Which LoRAs are those of the first one's tier is said by ``tiers``, those of the model.
        ``named`` is the tier behind the model's name.
        """
        given = self.options().model_dump(exclude_none=True)
        if {"num_frames", "seconds"} & given.keys():
            kept: dict[str, Any] = first.model_dump(exclude={"num_frames", *_OF_A_SUBMISSION})
        else:
            kept = first.model_dump(exclude=_OF_A_SUBMISSION)
        kept["size"] = str(first.size)
        if self.control_video is not None:
            kept["kept_num_frames"] = kept.pop("num_frames", None)
        of_tier = {lora.name for tier in tiers if tier.name == first.tier for lora in tier.loras}
        uses = [use.model_dump() for use in first.loras]
        kept["kept_tier"] = kept.pop("tier")
        chosen = self.tier if named is None else named
        if chosen is not None and chosen != first.tier:
            kept |= dict.fromkeys(("kept_tier", *TIER_VALUES))
            uses = [use for use in uses if use["name"] not in of_tier]
        else:
            given.pop("tier", None)
            if self.loras is not None:
                given["loras"] = [*(use for use in uses if use["name"] in of_tier), *given["loras"]]
        kept["loras"] = uses or None
        return GenerationOptions(**{k: v for k, v in kept.items() if k in GenerationOptions.model_fields} | given)


class FilmBody(VideoBody):
    """The body of ``POST /v1/videos/extensions``: a video of this server or a film, and a prompt for what follows."""

    required = {**VideoBody.required, "video": f"; {FILM_FORMS}"}
    example = {**VideoBody.example, "video": {"id": "video_0123..."}}

    video: Film = None

    def check(self) -> None:
        super().check()
        for name in _FILES:
            if getattr(self, name) is not None:
                raise InvalidRequest(
                    f"{name} has no use here: the video itself is where it begins; leave it out", param=name
                )


class EditBody(FilmBody):
    """The body of ``POST /v1/videos/edits``: a video of this server or a film, and a prompt for the new video."""

    strength: Real = Field(None, description="How much may change, above 0 and up to 1.")


class GenerationBody(VideoBody):
    """The body of ``POST /v1/videos/generations``. The model's preset has the values that are left out."""

    response_format: Choice = Field(None, description="url (default): the video has its address; b64_json: the bytes.")
    stream: Flag = Field(None, description="Answer with server-sent events while the video is made.")
    nvext: Annotated[NvExt | None, JsonText] = None

    def options(self) -> GenerationOptions:
        """Return the parameters, from the top of the body or from nvext. Raises InvalidRequest when the two differ."""
        values = super().options().model_dump()
        for name, value in (self.nvext or NvExt()).model_dump(exclude={"annotations"}, exclude_none=True).items():
            if values[name] not in (None, value):
                raise InvalidRequest(f"{name} and nvext.{name} differ; send one of them", param=f"nvext.{name}")
            values[name] = value
        return GenerationOptions(**values)

    def notes(self) -> Sequence[str]:
        """Return one sentence for each field that is accepted and has no effect."""
        has_annotations = self.nvext is not None and self.nvext.annotations
        return ("nvext.annotations was ignored: there are none here",) if has_annotations else ()

    @property
    def is_base64(self) -> bool:
        return self.response_format == "b64_json"

    def check(self) -> None:
        super().check()
        _check_choice("response_format", self.response_format, _RESPONSE_FORMATS, InvalidRequest)


def fingerprint(path: str, fields: Mapping[str, Any]) -> str:
    """Return a digest of the path and the fields. It is the same for JSON and for multipart, which has only text."""
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


def _opened(fields: Mapping[str, Any], envelopes: Sequence[str]) -> dict[str, Any]:
    """Return all fields on one level. The fields of an envelope override those beside it, as in the OpenAI SDKs.

    Some clients put the parameters that their library does not know into an envelope, in a form as JSON text.
    """
    opened = {name: value for name, value in fields.items() if name not in envelopes}
    for name in envelopes:
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


def _explain(errors: Sequence[ErrorDetails], body: type[BaseModel]) -> InvalidRequest:
    """Return an error with one sentence about the first field that is wrong, or about all that are not known."""
    error = errors[0]
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)[:100]
    if error["type"] == "extra_forbidden":
        others = [other["loc"] for other in errors[1:] if other["type"] == "extra_forbidden"]
        return _unknown(path, [name, *(".".join(map(str, loc)) for loc in others)], body)
    if error["type"] == "string_too_long":
        return InvalidRequest(f"{name} is too long; at most {error['ctx']['max_length']} characters", param=name)
    told = {"missing": "is missing", "string_too_short": "must not be empty"}
    said = (
        error["ctx"]["what"] if error["type"] == "field" else told.get(error["type"], f"is not valid: {error['msg']}")
    )
    return InvalidRequest(f"{name} {said}", param=name)


# What a tier may set and a request may not.
_OF_TIERS = frozenset(TIER_VALUES) - VideoBody.model_fields.keys()


def _unknown(path: Sequence[str], names: Sequence[str], body: type[BaseModel]) -> InvalidRequest:
    inner: Mapping[str, type[BaseModel]] = {"nvext": NvExt, "loras": LoraField}
    known = inner.get(path[0], body).model_fields if len(path) > 1 else body.model_fields
    nearest = difflib.get_close_matches(path[-1][:100], known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
    if path[-1] in _OF_TIERS:
        hint = "only the tiers of a model set it; leave it out, or name one as tier"
    what = f"unknown field {names[0]!r}" if len(names) == 1 else f"{len(names)} unknown fields: {told(names)}"
    return InvalidRequest(f"{what}; {hint}", param=names[0])
