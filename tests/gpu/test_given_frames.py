"""Image-to-video by channels on CUDA: graphs whose input and velocities have other channels, and the grey film."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from kinema.bench.wan.random_weights import draw
from kinema.engines.base import Frames, Inputs, Output, UInt8Array
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.conditioning import encode_given, latent_statistics
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.vae.encoder import Memory
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve
from kinema.request.shapes import Size

DEVICE = "cuda"
PICTURES = np.random.default_rng(5).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def engine() -> Iterator[WanEngine]:
    """The tiny model with more channels, and random weights."""
    tiny = inspect("tiny-wan")
    in_channels = tiny.vae.scale_factor_temporal + 2 * tiny.vae.z_dim
    transformer = tiny.transformer.model_copy(update={"in_channels": in_channels})
    checkpoint = replace(tiny, index={**tiny.index, "expand_timesteps": False}, transformer=transformer)
    made = WanEngine(checkpoint, device=DEVICE, load_components=draw)
    made.load()
    yield made
    made.close()


def test_videos_that_take_turns_on_graphs_are_what_they_are_alone(engine: WanEngine) -> None:
    """Bit for bit: of one shape, from a first frame and between two, guided and not."""
    runs = []
    for seed, (guidance_scale, last) in enumerate([(4.0, None), (4.0, PICTURES[1]), (1.0, PICTURES[1])]):
        asked = {"size": "96x64", "num_frames": 9, "num_inference_steps": 4, "seed": seed}
        options = GenerationOptions.model_validate({"prompt": "a cat", "guidance_scale": guidance_scale, **asked})
        request = resolve(options, engine.capabilities, Size(width=96, height=64)).request
        runs.append((request, Inputs(PICTURES[0], last)))
    alone = [collect(list(engine.generate(*run))) for run in runs]
    outputs: list[list[Output]] = [[] for _ in runs]
    for turn in zip(*(engine.generate(*run) for run in runs), strict=True):
        for made, output in zip(outputs, turn, strict=True):
            made.append(output)
    assert all(np.array_equal(collect(made), expected) for made, expected in zip(outputs, alone, strict=True))


def collect(outputs: list[Output]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


@torch.inference_mode()
def test_a_film_that_is_mostly_grey_has_the_bits_of_any_film(engine: WanEngine) -> None:
    """Though layers that give the same again are not computed."""
    parts, num_later = engine.parts, 30
    film = torch.zeros(1, 3, 1 + 4 * num_later, 64, 96, device=DEVICE)
    for index, picture in zip((0, -1), PICTURES, strict=True):
        film[:, :, index] = 2.0 * (torch.from_numpy(picture).to(DEVICE).permute(2, 0, 1) / 255.0) - 1.0
    memory: Memory = {}
    groups = [film[:, :, :1], *film[:, :, 1:].split(4, dim=2)]
    mode = parts.vae.encoder.mode(torch.cat([parts.vae.encoder.hidden(group, memory) for group in groups], dim=2))
    mean, std = latent_statistics(parts)
    given = encode_given(parts, 1 + 4 * num_later, PICTURES[0], PICTURES[1])
    assert torch.equal(given[:, 4:], (mode - mean) / std)
