"""How a model cuts a video, and what a request counts by that."""

from __future__ import annotations

import json

import pytest

from kinema.request.capabilities import Capabilities
from kinema.request.geometry import Geometry
from kinema.request.request import GenerationRequest
from kinema.request.shapes import Size
from tests.unit.worker.tasks import make_request

SIZE = Size(width=768, height=512)
# Of LTX, of a UNet, and of Helios.
LTX = Geometry(token_pixels=1024, token_frames=8, chunk_frames=None)
UNET = Geometry(token_pixels=64, token_frames=1, chunk_frames=None)
PARTS = Geometry(part_frames=33, part_step=32, chunk_frames=None)


def request(geometry: Geometry, num_frames: int, **changes: object) -> GenerationRequest:
    made = make_request(num_frames=9, num_inference_steps=10)
    size = {"width": SIZE.width, "height": SIZE.height}
    return made.model_copy(update={**size, "num_frames": num_frames, "geometry": geometry, **changes})


@pytest.mark.parametrize(
    ("geometry", "num_frames", "tokens"),
    [
        (Geometry(), 121, 48 * 32 * 31),
        (LTX, 121, 24 * 16 * 16),
        (UNET, 16, 96 * 64 * 16),
        (Geometry(), 88, 48 * 32 * 22),
    ],
)
def test_tokens_are_the_models_own(geometry: Geometry, num_frames: int, tokens: int) -> None:
    """A first frame alone, or frames that are a multiple, make the same number of latent frames."""
    assert geometry.num_tokens(SIZE, num_frames) == tokens
    thousands = tokens / 1000
    one = request(geometry, num_frames, guidance_scale=1.0)
    assert one.step_work == pytest.approx(thousands * (1 + thousands / 20))
    assert one.decoding_work == pytest.approx(5 * thousands)
    assert one.work == pytest.approx(10 * one.step_work + one.decoding_work)


def test_a_long_video_takes_its_steps_for_each_part() -> None:
    """Each step has the tokens of one part, and all are decoded."""
    assert [PARTS.num_parts(frames) for frames in (1, 33, 65, 66, 129)] == [1, 1, 2, 3, 4]
    one, four = request(PARTS, 33), request(PARTS, 129)
    assert (one.num_denoising_steps, four.num_denoising_steps) == (10, 40)
    assert four.step_work == one.step_work
    assert four.work - four.decoding_work == pytest.approx(4 * (one.work - one.decoding_work))
    assert request(PARTS, 129, strength=0.5).num_denoising_steps == 20


def test_chunks_are_those_of_the_engine() -> None:
    """A frame and then some at a time, or all at once."""
    assert [Geometry().num_chunks(frames) for frames in (1, 5, 6, 81)] == [1, 2, 3, 21]
    assert LTX.num_chunks(121) == 1


def test_what_an_older_version_stored_counts_as_it_did() -> None:
    """A job, and what a worker says, without a geometry: the numbers are those that stand in its database."""
    stored = make_request(size="832x480", num_frames=81, num_inference_steps=50).model_dump(exclude={"geometry"})
    old = GenerationRequest.model_validate_json(json.dumps(stored))
    assert (old.step_work, old.decoding_work) == (pytest.approx(172.84176), pytest.approx(163.8))
    assert old.work == pytest.approx(50 * old.step_work + old.decoding_work)
    assert Capabilities.model_fields["geometry"].default == Geometry() == old.geometry
