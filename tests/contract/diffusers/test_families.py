"""The diffusers engine makes what the stock pipelines make, with each kind of checkpoint and each of its inputs.

Some of them keep the whole contract (``test_engine.py``). The libraries are imported by the tests that need them, for
every process of a run reads this file.
"""

from __future__ import annotations

import inspect
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.engines.base import Engine, Frames, Inputs, Step, UInt8Array
from kinema.engines.diffusers.call_arguments import arguments_of
from kinema.engines.diffusers.families import FAMILIES, Family
from kinema.engines.diffusers.model_folder import Model
from kinema.request.request import GenerationRequest

pytestmark = pytest.mark.filterwarnings("ignore")

INPUTS = ("text", "image", "first_last", "film", "control", "references", "frames")
CASES = [(family, name) for family in FAMILIES for name in INPUTS if getattr(family, name)]
# It takes pictures as Helios does, by the same code, and seconds.
CASES = [case for case in CASES if (case[0].name, case[1]) != ("Helios pyramid", "image")]
# It makes none without films of control.
CASES = [case for case in CASES if not (case[1] in ("text", "image") and case[0].needs_control)]
# The first stage of the one has a quarter of the side, and the VAE of the other mirrors more than one latent.
SIDES = {"Helios pyramid": 64, "LTX-2": 64}


@cache
def engine_of(name: str) -> Engine:
    """Loaded once for all tests of a row."""
    from kinema.engines.diffusers.engine import DiffusersEngine
    from tests.dummies.pipelines import make

    family = next(family for family in FAMILIES if family.name == name)
    model = Model(name, Path(), {"_class_name": family.pipelines[0]}, family, {}, flow_shift=1.0)
    engine = DiffusersEngine(model, "cpu", load_pipeline=lambda *_: make(name))
    engine.load()
    return engine


def request_for(family: Family, name: str, seed: int) -> GenerationRequest:
    """Few steps of the shortest video with more than one frame."""
    side = SIDES.get(family.name, 32)
    least = family.frame_offset or family.frame_step
    return GenerationRequest(
        model=family.name,
        prompt="a cat",
        negative_prompt="grey",
        width=side,
        height=side,
        num_frames=least if least > 1 else max(family.frame_step + 1, 3),
        fps=8,
        num_inference_steps=family.stages or 2,
        guidance_scale=4.0,
        flow_shift=1.0,
        seed=seed,
        strength=1.0 if name == "film" else None,
    )


def inputs_for(request: GenerationRequest, name: str) -> Inputs:
    shape = (request.num_frames, request.height, request.width, 3)
    film = np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)
    family = next(family for family in FAMILIES if family.name == request.model)
    given: dict[str, Inputs] = {
        "control": Inputs(
            first_frame=film[0] if family.text is None and family.image else None,
            control_video=tuple(film // (number + 1) for number in range(len(family.controls))),
        ),
        "references": Inputs(reference_images=(film[0], film[1, :16])),
        "frames": Inputs(first_frame=film[1], conditioning=((request.num_frames - 1, film[0]),)),
        "image": Inputs(first_frame=film[0]),
        "first_last": Inputs(first_frame=film[0], last_frame=film[1]),
        "film": Inputs(film=film),
    }
    return given.get(name, Inputs())


@cache
def stock_pipeline(name: str, kind: str) -> Any:
    """Another one than the engine's, of this class."""
    import diffusers

    from tests.dummies.pipelines import make

    pipeline = make(name)
    wanted = getattr(diffusers, kind)
    if type(pipeline) is wanted:
        return pipeline
    accepted = inspect.signature(wanted.__init__).parameters
    return wanted(**{part: has for part, has in pipeline.components.items() if part in accepted})


def stock_video(family: Family, name: str, seed: int) -> UInt8Array:
    from kinema.engines.diffusers.engine import frames_of as frames_in

    return (np.asarray(frames_in(stock_output(family, name, seed))) * 255).round().astype(np.uint8)


def stock_output(family: Family, name: str, seed: int) -> Any:
    """What the library's pipeline makes, which is called plainly and once."""
    import torch

    request = request_for(family, name, seed)
    inputs = inputs_for(request, name)
    pipeline: Any = stock_pipeline(family.name, str(family.pipeline_for(inputs)))
    if family.is_tiled:
        pipeline.vae.enable_tiling()
    if hasattr(pipeline, "guider"):
        pipeline.guider = pipeline.guider.new(guidance_scale=request.guidance_scale)
    arguments = arguments_of(family, request, inputs, inspect.signature(type(pipeline).__call__).parameters)
    torch.manual_seed(seed)  # some draw from these numbers too
    return pipeline(**arguments, generator=torch.Generator().manual_seed(seed), output_type="np")


def frames_of(outputs: list[Any]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family.name}, {name}" for family, name in CASES])
def test_videos_in_turn_are_those_of_the_stock_pipeline(family: Family, name: str) -> None:
    """Bit for bit, a step a turn, also of one that begins after another was closed in the middle."""
    engine, request = engine_of(family.name), request_for(family, name, seed=3)
    later = request_for(family, name, seed=4)
    inputs = inputs_for(request, name)
    first, closed = engine.generate(request, inputs), engine.generate(request_for(family, name, seed=5), inputs)
    outputs: tuple[list[Any], list[Any]] = ([next(first)], [])
    next(closed)
    outputs[0].append(next(first))
    closed.close()
    second = engine.generate(later, inputs)
    outputs[1].append(next(second))
    outputs[0].extend(first)
    outputs[1].extend(second)
    total = request.num_inference_steps * family.num_loops(request.num_frames)
    for made in outputs:
        steps = [(step.index, step.total) for step in made if isinstance(step, Step)]
        assert steps == [(index, total) for index in range(1, total + 1)]
    frames, others = map(frames_of, outputs)
    assert frames.shape == (request.num_frames, request.height, request.width, 3)
    assert np.array_equal(frames, stock_video(family, name, seed=3))
    assert np.array_equal(others, stock_video(family, name, seed=4))
    assert not np.array_equal(frames, others)
    assert not [thread for thread in threading.enumerate() if thread.name == "diffusers"]


def test_a_long_video_counts_the_steps_of_all_its_loops() -> None:
    """Its total is known at the first of them."""
    family = next(family for family in FAMILIES if family.name == "Helios")
    request = request_for(family, "text", seed=3).model_copy(update={"num_frames": 65})
    outputs = list(engine_of(family.name).generate(request))
    steps = [(step.index, step.total) for step in outputs if isinstance(step, Step)]
    assert steps == [(index, 4) for index in range(1, 5)]
    assert frames_of(outputs).shape[0] == 65


@pytest.mark.parametrize("name", ["AnimateDiff", "AnimateDiff SDXL", "AnimateDiff control"])
def test_a_row_makes_no_more_frames_than_its_motion_has_places(name: str) -> None:
    """As many as the library's motion modules have: a longer one would end in the first step."""
    engine: Any = engine_of(name)
    (pipeline, *_) = engine._pipelines.values()
    assert engine.capabilities.limits.max_frames == pipeline.unet.config.motion_max_seq_length == 32


def test_each_row_is_tried() -> None:
    """But for those that need what no request has."""
    from tests.dummies.pipelines import DUMMIES

    needing = {family.name for family in FAMILIES if family.needs is not None}
    assert {family.name for family in FAMILIES} - DUMMIES.keys() == needing
