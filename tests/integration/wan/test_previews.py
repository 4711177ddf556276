"""Previews of the real tiny model: they look like the video, and change nothing in it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from kinema.engines.base import Frames, Step, UInt8Array
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.media.planes import to_rgb
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve


@pytest.fixture(scope="module")
def engine() -> WanEngine:
    engine = WanEngine(inspect("tiny-wan"), device="cpu")
    engine.load()
    return engine


def make_request(engine: WanEngine, prompt: str) -> GenerationRequest:
    options = GenerationOptions(prompt=prompt, num_inference_steps=6, seed=3, num_frames=9)
    return resolve(options, engine.capabilities).request


def made(engine: WanEngine, request: GenerationRequest, *, shown: bool) -> tuple[list[UInt8Array], UInt8Array]:
    """The previews, if they are asked for, and the frames."""
    previews, frames = [], []
    for output in engine.generate(request):
        if isinstance(output, Frames):
            frames.extend(to_rgb(planes) for planes in output.data)
        elif shown:
            assert isinstance(output, Step)
            assert output.preview is not None
            previews.append(output.preview())
    return previews, np.stack(frames)


@pytest.mark.parametrize("colour", ["red", "blue"])
def test_a_preview_looks_like_the_video(engine: WanEngine, colour: str) -> None:
    """Its shape and colours, from the second of six steps on; and asking for them changes no pixel."""
    request = make_request(engine, f"a {colour} square on a white background")
    previews, frames = made(engine, request, shown=True)
    assert np.array_equal(frames, made(engine, request, shown=False)[1])
    assert previews[0].shape == (request.height // 8, request.width // 8, 3)
    # The second of three latent frames stands for the frames 1 to 4.
    small = [Image.fromarray(frame).resize(previews[0].shape[1::-1], Image.Resampling.BOX) for frame in frames[1:5]]
    film = np.mean([np.asarray(picture, np.float64) for picture in small], axis=0)
    for preview in previews[1:]:
        assert np.corrcoef(preview.ravel(), film.ravel())[0, 1] > 0.8
        assert np.abs(preview - film).mean() < 32
