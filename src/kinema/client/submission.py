"""The bodies of requests: JSON, or multipart/form-data when a field is a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict
from urllib.parse import quote

from kinema.client.models import Video
from kinema.errors import InvalidRequest

VideoRef = str | Video
"""A video: its id, or the answer of an earlier call."""
File = bytes | Path
"""The content of a file, or its path."""


class VideoOptions(TypedDict, total=False):
    """The options of a video besides its prompt. The model has a default for each.

    ``input_reference`` is the first frame (PNG, JPEG, WebP, AVIF, GIF, or HEIC where the server reads it), and
    ``last_frame`` the last one beside it. ``tier`` is one of the model's. ``loras`` are names of LoRAs of the model, or
    objects such as ``{"name": "paper", "scale": 0.8}``. Only an edit has a ``strength``. ``extra`` holds fields that a
    newer service knows.
    """

    model: str
    seconds: float | str
    size: str
    input_reference: File
    last_frame: File
    control_video: VideoRef | File | Sequence[VideoRef | File]
    reference_images: Sequence[File]
    conditioning: Mapping[int, File]
    audio: File
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float
    boundary_ratio: float
    flow_shift: float
    strength: float
    seed: int
    tier: str
    loras: Sequence[str | Mapping[str, object]]
    output_format: Literal["mp4", "webm", "gif"]
    negative_prompt: str
    preview_every: int
    priority: Literal["low", "normal", "high"]
    deadline_s: float
    user: str
    extra: Mapping[str, object]


def id_of(video: VideoRef) -> str:
    """Return the id as a part of a path. Raises InvalidRequest for an empty id."""
    video_id = video.id if isinstance(video, Video) else video
    if not video_id:
        raise InvalidRequest("the id of a video is empty; give one as the server answered it")
    return quote(video_id, safe="")


def fields_of(options: VideoOptions, **named: object) -> dict[str, Any]:
    """Return all fields by their names on the wire, without those that are None. A path is a file."""
    given: dict[str, Any] = {**named, **{name: value for name, value in options.items() if name != "extra"}}
    given |= options.get("extra", {})
    if (control := given.get("control_video")) is not None:
        several = control if isinstance(control, list | tuple) else [control]
        given["control_video"] = [source_of(video) for video in several]
    return {name: value for name, value in given.items() if value is not None}


def source_of(video: VideoRef | File) -> object:
    """Return the ``video`` field of an edit or an extension: a video of the server, or a file."""
    if isinstance(video, bytes | Path):
        return video
    return {"id": video.id if isinstance(video, Video) else video}


def encode(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return httpx's arguments for the body. A file is read whole, so that it can be sent again."""
    files = list(_files(fields))
    if not files:
        return {"json": fields}
    plain = {name: _without_files(value) for name, value in fields.items() if not isinstance(value, bytes | Path)}
    return {
        "data": dict(_form({name: value for name, value in plain.items() if value not in ([], {})})),
        "files": [(name, _part(name, file)) for name, file in files],
    }


def _files(fields: Mapping[str, Any]) -> Iterator[tuple[str, File]]:
    """Yield the parts of a form that are files: of a list under one name, of an object as ``name[key]``."""
    for name, value in fields.items():
        if isinstance(value, bytes | Path):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _files({f"{name}[{key}]": inner for key, inner in value.items()})
        elif isinstance(value, list | tuple):
            yield from ((name, one) for one in value if isinstance(one, bytes | Path))


def _without_files(value: Any) -> Any:  # noqa: ANN401 - of any field
    if isinstance(value, Mapping):
        return {name: inner for name, inner in value.items() if not isinstance(inner, bytes | Path)}
    if isinstance(value, list | tuple):
        return [one for one in value if not isinstance(one, bytes | Path)]
    return value


def _part(name: str, file: File) -> tuple[str, bytes]:
    return (name, file) if isinstance(file, bytes) else (file.name, file.read_bytes())


def _form(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the parts of a form: an object as ``name[key]``, other values that are not text as JSON."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _form({f"{name}[{key}]": inner for key, inner in value.items()})
        else:
            yield name, value if isinstance(value, str) else json.dumps(value)
