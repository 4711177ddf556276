"""The colours of a film are what they were when frames crossed to the encoder as RGB, on what the tiny model makes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from kinema.engines.base import Step, UInt8Array
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.media.mp4 import Mp4Writer
from kinema.media.planes import to_rgb, to_yuv
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve


@pytest.fixture(scope="module")
def both() -> tuple[UInt8Array, UInt8Array]:
    """The planes of a film, and the same film as RGB (f, h, w, 3)."""
    engine = WanEngine(inspect("tiny-wan"), device="cpu")
    engine.load()
    options = GenerationOptions(prompt="a red circle on a blue background", num_inference_steps=4, num_frames=9, seed=3)
    request = resolve(options, engine.capabilities).request
    steps = engine.sample(request)
    while True:
        try:
            assert isinstance(next(steps), Step)
        except StopIteration as done:
            latents = done.value
            break
    with torch.inference_mode():
        found = [(part.planes.numpy().copy(), engine.decoder.to_rgb(part)) for part in engine.decoder.decode(latents)]
    rgb = torch.cat([colours for _, colours in found])
    return np.concatenate([planes for planes, _ in found]), (rgb * 255).round().to(torch.uint8).numpy()


def test_planes_are_those_of_the_scaler(both: tuple[UInt8Array, UInt8Array]) -> None:
    """FFmpeg makes them of rounded RGB: a level apart at most, and rarely."""
    planes, rgb = both
    theirs = np.stack([to_yuv(pixels).to_ndarray() for pixels in rgb])
    difference = np.abs(planes.astype(int) - theirs)
    assert difference.max() <= 2
    assert difference.mean() < 0.2


def test_a_film_of_planes_looks_like_a_film_of_rgb(both: tuple[UInt8Array, UInt8Array], tmp_path: Path) -> None:
    """With the same tags, and on average less than a level apart."""
    shown = []
    for name, frames in zip(("planes", "rgb"), both, strict=True):
        path = tmp_path / f"{name}.mp4"
        height, width = both[1].shape[1:3]
        writer = Mp4Writer(path, width=width, height=height, fps=16)
        writer.add(frames)
        writer.close()
        with av.open(str(path)) as film:
            context = film.streams.video[0].codec_context
            assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
            shown.append(np.stack([to_rgb(frame.to_ndarray()) for frame in film.decode(video=0)]).astype(int))
    assert np.abs(shown[0] - shown[1]).mean() < 1.0
    assert np.abs(shown[0] - both[1]).mean() < 4.0
