"""A tier of the bundled model: its video is that of the same values, and goes on where it was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kinema.bench.wan.subject import PARTS, Subject
from kinema.cli.generate import generate_file
from kinema.cli.replay import Verdict, compare, prepare_again, read_manifest
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.inputs import prepare
from kinema.request.options import NOTHING_GIVEN, GenerationOptions
from kinema.request.resolve import resolve
from tests.integration.wan.ranks import assert_same_in_turns_and_resumed, take_turns
from tests.unit.engines.wan.tiny import tiny_with

pytestmark = pytest.mark.usefixtures("one_thread")

TIERS = {
    "draft": {"num_inference_steps": 4, "guidance_scale": 1, "solver": "euler", "description": "Four steps."},
    "listed": {"timesteps": [1000, 900, 600, 300], "guidance_scale": 1, "solver": "lcm", "flow_shift": 5},
}
ASKED = {"prompt": "a red circle moving right", "num_frames": 5, "size": "64x64", "seed": 3}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> WanEngine:
    folder = tiny_with(tmp_path_factory.mktemp("tiers") / "tiny-wan", TIERS)
    made = WanEngine(inspect(str(folder)), device="cpu", dtype="float32")
    made.load()
    return made


def options(**values: object) -> GenerationOptions:
    return GenerationOptions.model_validate({**ASKED, **values})


def test_the_video_is_that_of_the_same_values(engine: WanEngine) -> None:
    """Without a tier, in turns with another video, and when it is resumed."""
    can = engine.capabilities
    draft, listed, plain = (resolve(options(tier=tier), can).request for tier in ("draft", "listed", None))
    euler = {"num_inference_steps": 4, "guidance_scale": 1.0, "solver": "euler"}
    lcm = {"num_inference_steps": 4, "guidance_scale": 1.0, "solver": "lcm", "flow_shift": 5.0}
    by_values = [
        plain.model_copy(update=euler),
        plain.model_copy(update={**lcm, "timesteps": (1000.0, 900.0, 600.0, 300.0)}),
    ]
    made = take_turns([engine.sample(request) for request in (draft, listed)])
    for one, request in zip(made, by_values, strict=True):
        assert torch.equal(one, take_turns([engine.sample(request)])[0])
    assert not torch.equal(*made)
    assert_same_in_turns_and_resumed(engine, [draft, listed])


@pytest.mark.parametrize("tier", TIERS)
def test_it_is_made_again_from_its_file(engine: WanEngine, tier: str, tmp_path: Path) -> None:
    """By a model that no longer has the tier."""
    path, again = tmp_path / "film.mp4", tmp_path / "again.mp4"
    can = engine.capabilities
    generate_file(engine, prepare(NOTHING_GIVEN, options(tier=tier), can), path, lambda _output: None)
    assert read_manifest(path).request.tier == tier
    without = can.model_copy(update={"tiers": ()})
    generate_file(engine, prepare_again(path, read_manifest(path), without), again, lambda _output: None)
    assert compare(path, again) == Verdict(True, "the same bytes")


def test_a_measurement_of_some_steps_takes_the_first_timesteps(engine: WanEngine) -> None:
    """So that they are one for each step."""
    request = resolve(options(tier="listed"), engine.capabilities).request
    checkpoint = inspect("tiny-wan")
    subject = Subject(checkpoint, False, request, 2, frozenset(PARTS), 1, False, False)
    assert subject.measured.timesteps == (1000.0, 900.0)
    assert len(list(engine.sample(subject.measured))) == 2
