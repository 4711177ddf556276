"""From a request to the arguments of a pipeline's call."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image

from kinema.engines.base import Inputs, UInt8Array
from kinema.engines.diffusers.families import Family
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
        **(_masked(request, inputs) if family.has_masks else _pictures(inputs)),
    }
    ours = {family.names.get(name, name): value for name, value in values.items() if value is not None}
    return {name: value for name, value in {**ours, **family.always}.items() if name in accepted}


def _split(num_steps: int, stages: int | None) -> list[int] | None:
    """The steps of each stage, together as many as asked for; each stage has one."""
    if stages is None:
        return None
    return [max((num_steps + stages - 1 - stage) // stages, 1) for stage in range(stages)]


def _pictures(inputs: Inputs) -> dict[str, Any]:
    named = {"image": inputs.first_frame, "last_image": inputs.last_frame}
    pictures: dict[str, Any] = {name: _image(data) for name, data in named.items() if data is not None}
    if inputs.film is not None:
        pictures["video"] = [_image(frame) for frame in inputs.film]
    return pictures


def _masked(request: GenerationRequest, inputs: Inputs) -> dict[str, Any]:
    """A film that is grey but for the given frames, and a mask of what is to be made; nothing without a frame."""
    if inputs.first_frame is None:
        return {}
    shape = (request.num_frames, request.height, request.width)
    film, mask = np.full((*shape, 3), _EMPTY, np.uint8), np.full(shape, _MAKE, np.uint8)
    for index, frame in ((0, inputs.first_frame), (-1, inputs.last_frame)):
        if frame is not None:
            film[index], mask[index] = frame, _KEEP
    return {"video": [_image(frame) for frame in film], "mask": [Image.fromarray(one) for one in mask]}


def _image(frame: UInt8Array) -> Image.Image:
    return Image.fromarray(frame)
