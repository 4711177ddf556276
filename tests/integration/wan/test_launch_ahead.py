"""Steps that are launched before the ones before them are done: the same bytes, and only where nobody else waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kinema.engines.base import Frames, Output, Step, UInt8Array
from kinema.engines.wan import launch_ahead
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.errors import EngineFailed
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve


@pytest.fixture(scope="module")
def engine() -> WanEngine:
    made = WanEngine(inspect("tiny-wan"), device="cpu", launches_ahead=True)
    made.load()
    return made


@pytest.fixture(autouse=True)
def _steps_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine too."""
    monkeypatch.setattr(launch_ahead, "_MAX_STEP_S", 1000.0)


@pytest.fixture
def num_launched(engine: WanEngine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many steps were launched."""
    transformer: Any = engine.parts.transformer
    plain, launched = transformer.velocities, []

    def velocities(*arguments: Any) -> torch.Tensor:
        launched.append(arguments)
        velocity: torch.Tensor = plain(*arguments)
        return velocity

    monkeypatch.setattr(transformer, "velocities", velocities)
    return lambda: len(launched)


def request_of(engine: WanEngine, seed: int, **values: object) -> GenerationRequest:
    asked = {"prompt": "a red circle moving right", "num_frames": 5, "size": "64x64", "num_inference_steps": 4}
    options = GenerationOptions.model_validate({**asked, "seed": seed, **values})
    return resolve(options, engine.capabilities).request


def collect(outputs: list[Output]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


def test_a_step_is_launched_ahead_when_the_time_of_one_is_known(
    engine: WanEngine, num_launched: Callable[[], int]
) -> None:
    """Not before the first one of a shape, and no more than one; the same frames as without, also from the
    checkpoint of any step."""
    request = request_of(engine, seed=1, size="96x64")
    plain = WanEngine(inspect("tiny-wan"), device="cpu")
    plain.load()
    expected = collect(list(plain.generate(request)))
    made, counts, checkpoints = [], [], []
    for _ in range(2):
        before = num_launched()
        for output in engine.generate(request):
            made.append(output)
            if isinstance(output, Step):
                counts.append(num_launched() - before)
                assert output.checkpoint is not None
                checkpoints.append(output.checkpoint())
    assert counts == [1, 3, 4, 4, 2, 3, 4, 4]
    assert np.array_equal(collect(made), np.concatenate([expected, expected]))
    assert checkpoints[:4] == checkpoints[4:]
    for checkpoint in checkpoints[4:]:
        assert np.array_equal(collect(list(engine.generate(request, resume=checkpoint))), expected)


def test_who_shares_the_device_launches_no_step_ahead(engine: WanEngine, num_launched: Callable[[], int]) -> None:
    """One that was launched while nobody else was there is not lost, and one that is closed is forgotten."""
    requests = [request_of(engine, seed) for seed in (1, 2, 3)]
    alone = [collect(list(engine.generate(request))) for request in requests]
    before = num_launched()
    first, second, third = (engine.generate(request) for request in requests)
    outputs: list[list[Output]] = [[], [], []]
    for generation, kept, count in ((first, 0, 2), (second, 1, 3), (first, 0, 3), (first, 0, 4), (second, 1, 5)):
        outputs[kept].append(next(generation))
        assert num_launched() - before == count
    first.close()
    outputs[1].append(next(second))
    assert num_launched() - before == 7
    second.close()
    assert np.array_equal(collect(list(third)), alone[2])
    assert num_launched() - before == 11


def test_a_step_that_gives_no_numbers_is_named_as_without(engine: WanEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own number, and not by that of the step that was launched behind it."""
    request = request_of(engine, seed=1)
    list(engine.generate(request))
    transformer: Any = engine.parts.transformer
    plain = transformer.velocities

    def velocities(prepared: Any, latents: torch.Tensor, index: int) -> torch.Tensor:
        velocity: torch.Tensor = plain(prepared, latents, index)
        return velocity * float("nan") if index == 2 else velocity

    monkeypatch.setattr(transformer, "velocities", velocities)
    generation = engine.generate(request)
    assert [next(generation), next(generation)] == [Step(1, 4), Step(2, 4)]
    with pytest.raises(EngineFailed, match="not finite, noticed at step 3 of 4"):
        next(generation)
    monkeypatch.undo()
    assert [output for output in engine.generate(request) if isinstance(output, Step)][-1] == Step(4, 4)
