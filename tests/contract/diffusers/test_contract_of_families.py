"""The engine contract for every kind of checkpoint, in videos of two or three steps.

``test_families.py`` has turns, and frames that are the stock pipeline's; the whole suite of ``contract/engine.py`` runs
for a few kinds (``test_engine.py``).
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from kinema.engines.base import Frames, Inputs, Step
from kinema.engines.diffusers.families import FAMILIES, Family
from kinema.errors import EngineFailed, InvalidRequest, UnsupportedRequest
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve_alone
from tests.contract.diffusers.test_families import CASES, engine_of, frames_of, inputs_for, request_for

pytestmark = pytest.mark.filterwarnings("ignore")

# The first of its modes.
MODES = {family.name: name for family, name in reversed(CASES)}
SERVED = [family for family in FAMILIES if family.needs is None]


def made(engine: Any, family: Family, **changes: object) -> list[Any]:
    """The outputs of the smallest video, while others need room, from what is no checkpoint."""
    name = MODES[family.name]
    request = request_for(family, name, seed=3).model_copy(update={"guidance_scale": 1.0, **changes})
    outputs = []
    for output in engine.generate(request, inputs_for(request, name), resume=b"no checkpoint"):
        outputs.append(output)
        engine.make_room()
    return outputs


@pytest.mark.parametrize("family", SERVED, ids=[family.name for family in SERVED])
def test_a_family_keeps_the_contract(family: Family) -> None:
    """What it makes by its own word, again and again; what it does not take is refused, and the next video is right."""
    import torch

    engine: Any = engine_of(family.name)
    can = engine.capabilities
    assert (can.engine, engine.facts.engine, can.has_checkpoints, can.has_previews) == ("diffusers",) * 2 + (False,) * 2
    assert engine.facts.versions
    preset = resolve_alone(GenerationOptions(prompt="a cat", size=str(can.preset.size)), can).request
    assert (preset.size, preset.num_frames, preset.fps) == (can.preset.size, can.preset.num_frames, can.preset.fps)

    first = made(engine, family)
    steps, chunks = ([one for one in first if isinstance(one, kind)] for kind in (Step, Frames))
    assert first[: len(steps)] == steps
    assert [step.index for step in steps] == list(range(1, len(steps) + 1))
    assert not any(step.checkpoint or step.preview for step in steps)
    assert [chunk.index for chunk in chunks] == list(range(1, chunks[0].total + 1))
    assert all((chunk.sound is not None) == can.has_sound for chunk in chunks)

    refused = [
        Inputs(first_frame=chunks[0].data[0]) if not can.is_image_to_video else None,
        Inputs(film=frames_of(first)) if not can.is_video_to_video else None,
        Inputs(reference_images=(chunks[0].data[0],)) if not can.max_reference_images else None,
        Inputs(conditioning=((0, chunks[0].data[0]),)) if not can.takes_conditioning else None,
        Inputs(control_video=(frames_of(first),)) if not can.control_videos else None,
        Inputs() if not can.is_text_to_video or can.needs_control_video else None,
    ]
    request = request_for(family, MODES[family.name], seed=3)
    for inputs in refused:
        if inputs is not None:
            with pytest.raises(EngineFailed, match=r"takes no|needs a"):
                next(engine.generate(request, inputs))
    for name in can.fixed_options:
        wrong = "a dog" if name == "negative_prompt" else 0.123
        with pytest.raises((InvalidRequest, UnsupportedRequest)):
            resolve_alone(GenerationOptions.model_validate({"prompt": "a cat", name: wrong}), can)

    assert np.array_equal(frames_of(made(engine, family)), frames_of(first))
    assert not np.array_equal(frames_of(made(engine, family, seed=4)), frames_of(first))
    assert torch.is_grad_enabled()
    assert not [thread for thread in threading.enumerate() if thread.name == "diffusers"]


def test_steps_that_a_pipeline_cannot_take_are_refused() -> None:
    """Mochi's own steps need two; one would end in the library with a division by zero."""
    can = engine_of("Mochi").capabilities
    with pytest.raises(InvalidRequest, match="num_inference_steps must be a whole number from 2 to"):
        resolve_alone(GenerationOptions(prompt="a cat", num_inference_steps=1), can)


@pytest.mark.parametrize("family", SERVED, ids=[family.name for family in SERVED])
def test_the_trial_video_of_a_worker_is_one_that_the_family_makes(family: Family) -> None:
    """With the inputs that it needs, in its size, length and steps."""
    from kinema.engines.base import check_inputs
    from kinema.worker.worker import _probe_of

    can = engine_of(family.name).capabilities
    request, inputs = _probe_of(can, "cpu")
    check_inputs(inputs, can)
    assert request.num_inference_steps == family.min_steps
    assert (inputs.film is not None) == (not can.is_text_to_video and not can.is_image_to_video)
