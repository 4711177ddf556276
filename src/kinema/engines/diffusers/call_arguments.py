"""From a request to the arguments of a pipeline's call."""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image

from kinema.engines.base import Inputs, UInt8Array
from kinema.engines.diffusers.families import Family, FrameClass
from kinema.request.request import GenerationRequest

# What Wan VACE is given where no picture is, and its mask there: white is to be made, black is to be kept.
_EMPTY, _MAKE, _KEEP = 128, 255, 0


def arguments_of(
    family: Family, request: GenerationRequest, inputs: Inputs, accepted: Collection[str]
) -> dict[str, Any]:
    """The arguments by the pipeline's own names, without its generator; only those that it accepts.

    Pictures are given as PIL images in the request's size.
    """
    values: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_frames": family.asked_frames(request.num_frames),
        "fps": request.fps,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "guidance_scale_2": request.guidance_scale_2,
        "strength": request.strength,
        "pyramid_num_inference_steps_list": _split(request.num_inference_steps, family.stages),
        **_seen(family, request, inputs),
        **_references(family, inputs),
        **_part(family, request),
    }
    ours = {family.names.get(name, name): value for name, value in values.items() if value is not None}
    return {name: value for name, value in {**ours, **family.always}.items() if name in accepted}


def _split(num_steps: int, stages: int | None) -> list[int] | None:
    """The steps of each stage, together as many as asked for; each stage has one."""
    if stages is None:
        return None
    return [max((num_steps + stages - 1 - stage) // stages, 1) for stage in range(stages)]


def _part(family: Family, request: GenerationRequest) -> dict[str, int]:
    """How many frames are made at once, where a pipeline is told that."""
    if family.window_argument is None:
        return {}
    name, most = family.window_argument
    return {name: min(most, request.num_frames)}


def _seen(family: Family, request: GenerationRequest, inputs: Inputs) -> dict[str, Any]:
    """The pictures and films of the video itself, in the form that the pipeline for these inputs takes."""
    if family.has_masks:
        return _masked(request, inputs)
    pipeline = family.pipeline_for(inputs)
    if family.frame_class is not None and pipeline == family.frames:
        return {"conditions": _frames(family.frame_class, request, inputs)}
    named = {"image": inputs.first_frame, "last_image": inputs.last_frame}
    pictures: dict[str, Any] = {name: _image(data) for name, data in named.items() if data is not None}
    if inputs.film is not None:
        pictures["video"] = _images(inputs.film)
    return pictures | {name: _images(film) for name, film in zip(family.controls, inputs.control_video, strict=False)}


def _frames(kind: FrameClass, request: GenerationRequest, inputs: Inputs) -> list[Any]:
    """An object of the library for each given frame, of which the first and the last one are two."""
    module = importlib.import_module(f"diffusers.pipelines.{kind.module}")
    frames = {0: inputs.first_frame, request.num_frames - 1: inputs.last_frame, **dict(inputs.conditioning)}
    return [
        getattr(module, kind.name)(**{kind.picture: _image(picture), kind.index: math.ceil(number / kind.step)})
        for number, picture in sorted(frames.items())
        if picture is not None
    ]


def _references(family: Family, inputs: Inputs) -> dict[str, Any]:
    if family.references is None or not inputs.reference_images:
        return {}
    return {family.references: [_image(picture) for picture in inputs.reference_images]}


def _masked(request: GenerationRequest, inputs: Inputs) -> dict[str, Any]:
    """A film of control, or one that is grey, but for the given frames, and a mask of what is to be made; nothing
    without either."""
    if inputs.first_frame is None and not inputs.control_video:
        return {}
    shape = (request.num_frames, request.height, request.width)
    film, mask = np.full((*shape, 3), _EMPTY, np.uint8), np.full(shape, _MAKE, np.uint8)
    for control in inputs.control_video:
        film[:] = control
    for index, frame in ((0, inputs.first_frame), (-1, inputs.last_frame)):
        if frame is not None:
            film[index], mask[index] = frame, _KEEP
    return {"video": _images(film), "mask": [Image.fromarray(one) for one in mask]}


def _image(frame: UInt8Array) -> Image.Image:
    return Image.fromarray(frame)


def _images(film: UInt8Array) -> list[Image.Image]:
    return [_image(frame) for frame in film]
