"""The judge of the tiny model is right about clips whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from training.tiny import world
from training.tiny.detector import STEADY, is_steady, look


@pytest.mark.parametrize(
    ("num_clips", "num_frames", "height", "width"), [(30, 33, 128, 128), (30, 17, 128, 128), (60, 17, 96, 160)]
)
def test_detector_agrees_with_the_renderer(num_clips: int, num_frames: int, height: int, width: int) -> None:
    """On rendered clips at least 98 % of background, colour, shape and motion are seen as drawn, each and together."""
    rng = np.random.default_rng(11)
    side = min(height, width)
    clips = world.sample_clips(rng, num_clips, num_frames, (width / side, height / side))
    frames = world.to_uint8(world.render(clips, height, width))
    right = []
    for i, video in enumerate(frames):
        seen = look(video)
        right.append(
            (
                seen.background == list(world.BACKGROUNDS)[clips.background[i]],
                seen.colour == list(world.COLOURS)[clips.colour[i]],
                seen.shape == world.SHAPES[clips.shape[i]],
                seen.motion == world.MOTIONS[clips.motion[i]],
            )
        )
    shares = np.array(right).mean(0)
    assert (shares >= 0.98).all(), dict(zip(("background", "colour", "shape", "motion"), shares, strict=True))
    assert np.array(right).all(1).mean() >= 0.98


def test_outlined_shapes_are_seen_as_what_they_enclose() -> None:
    """And as outlines, unless they are too small to have room inside of the line. A ring would be a circle."""
    clips = world.sample_clips(np.random.default_rng(5), 40, 17)
    frames = {name: world.to_uint8(world.render(clips, 128, 128, is_outlined=name)) for name in (True, False)}
    others = [i for i in range(len(clips)) if world.SHAPES[clips.shape[i]] != "ring"]
    seen = {i: look(frames[True][i], is_outlined=True) for i in others}
    for i, sighting in seen.items():
        assert sighting.shape == world.SHAPES[clips.shape[i]]
        assert sighting.colour == list(world.COLOURS)[clips.colour[i]]
        assert sighting.motion == world.MOTIONS[clips.motion[i]]
        assert look(frames[False][i]).hollow < 0.02
        assert sighting.hollow > 0.15 or clips.path[i, :, 2].mean() < 0.19


def test_an_empty_scene_has_no_shape() -> None:
    """A plain background shows nothing: no shape, colour or motion is made up."""
    seen = look(np.full((9, 64, 64, 3), 246, dtype=np.uint8))
    assert (seen.background, seen.colour, seen.shape, seen.motion) == ("white", None, None, None)


def test_a_steady_clip_neither_turns_back_nor_jumps() -> None:
    """Ways and changes of size are steady as rendered, and no longer with a frame out of place; others never are."""
    clips = world.sample_clips(np.random.default_rng(3), 40, 17)
    for video, motion in zip(world.to_uint8(world.render(clips, 96, 96)), clips.motion, strict=True):
        is_way = world.MOTIONS[motion] in STEADY
        assert is_steady(video) == is_way, world.MOTIONS[motion]
        assert not is_steady(video[[*range(8), 4, *range(9, 17)]])
        assert not is_steady(video[[*range(5), *[5] * 7, *range(12, 17)]])
