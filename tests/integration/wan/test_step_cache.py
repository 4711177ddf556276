"""Steps that are not computed: which, what is read off for them, and the real tiny model with them, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinema.engines.base import Frames, Inputs, Output, Step, UInt8Array
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.step_cache import StepCache, choose_skipped
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from tests.integration.wan.random_checkpoints import save_two_experts
from tests.integration.wan.ranks import take_turns

NUM_STEPS = 10
FILM = np.random.default_rng(5).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


def loaded(model: str, *, has_step_cache: bool = True) -> WanEngine:
    engine = WanEngine(inspect(model), device="cpu", has_step_cache=has_step_cache)
    engine.load()
    return engine


def make_request(engine: WanEngine, **values: object) -> GenerationRequest:
    asked = {"prompt": "a red circle moving right", "num_inference_steps": NUM_STEPS, "seed": 3, "num_frames": 5}
    options = GenerationOptions.model_validate({"size": "64x64", **asked, **values})
    return resolve(options, engine.capabilities).request


@pytest.fixture(scope="module")
def engine() -> WanEngine:
    return loaded("tiny-wan")


def frames(outputs: list[Output]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


def collect(outputs: Iterator[Output]) -> tuple[list[Output], list[bytes]]:
    """All of them, and the checkpoint of each step."""
    collected, checkpoints = [], []
    for output in outputs:
        collected.append(output)
        if isinstance(output, Step):
            assert output.checkpoint is not None
            checkpoints.append(output.checkpoint())
    return collected, checkpoints


class Counted:
    """The transformer in an engine's place of it, with the steps that it computed."""

    def __init__(self, engine: WanEngine, name: str = "transformer") -> None:
        self.steps: list[int] = []
        self._own: Any = getattr(engine.parts, name)
        setattr(engine.parts, name, self)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        return self._own.prepare(*args, **kwargs)

    def velocities(self, prepared: Any, latents: Tensor, index: int) -> Tensor:
        self.steps.append(index)
        velocities: Tensor = self._own.velocities(prepared, latents, index)
        return velocities


@pytest.mark.parametrize(
    ("num_steps", "skipped"),
    [(1, []), (2, []), (6, []), (7, [4]), (10, [4, 6]), (20, [4, 6, 8, 10, 12, 14, 16]), (50, [*range(10, 45, 2)])],
)
def test_every_second_step_in_the_middle_is_skipped(num_steps: int, skipped: list[int]) -> None:
    assert sorted(choose_skipped(num_steps)) == skipped


def test_the_ends_are_computed_and_no_two_in_a_row_are_skipped() -> None:
    for num_steps in range(1, 201):
        skipped = choose_skipped(num_steps)
        assert all(max(0.2 * num_steps, 4) <= index < min(0.9 * num_steps, num_steps - 2) for index in skipped)
        assert all(index + 1 not in skipped for index in skipped)


def test_a_transformer_that_takes_over_computes_twice_first() -> None:
    for takes_over in range(1, 20):
        skipped = choose_skipped(20, takes_over)
        assert {takes_over, takes_over + 1}.isdisjoint(skipped)
        assert len(skipped) >= len(choose_skipped(20)) - 2


def test_half_of_a_line_through_the_last_two_is_gone_along() -> None:
    cache = StepCache([1.0, 0.8, 0.7, 0.65], frozenset({2}))
    cache.add(0, torch.full((1,), 4.0))
    cache.add(1, torch.full((1,), 6.0))
    assert cache.velocity(2).item() == pytest.approx(6.0 + 0.5 * (6.0 - 4.0) * 0.1 / 0.2)


def test_a_line_in_bfloat16_is_followed_in_float32() -> None:
    cache = StepCache([1.0, 0.9, 0.8], frozenset({2}))
    cache.add(0, torch.full((1,), 256.0, dtype=torch.bfloat16))
    cache.add(1, torch.full((1,), 258.0, dtype=torch.bfloat16))
    assert cache.velocity(2).item() == pytest.approx(259.0)


def test_what_is_skipped_is_not_computed_and_says_so() -> None:
    engine = loaded("tiny-wan")
    request = make_request(engine)
    counted = Counted(engine)
    steps = [output for output in engine.generate(request) if isinstance(output, Step)]
    skipped = choose_skipped(NUM_STEPS)
    assert [step.index for step in steps] == list(range(1, NUM_STEPS + 1))
    assert {step.index - 1 for step in steps if step.is_cached} == skipped
    assert counted.steps == [index for index in range(NUM_STEPS) if index not in skipped]


def test_it_is_off_by_default_and_named_when_on(engine: WanEngine) -> None:
    off = WanEngine(inspect("tiny-wan"), device="cpu")
    off.load()
    assert off.facts.step_cache is None
    assert engine.facts.step_cache is True
    steps = [output for output in off.generate(make_request(off)) if isinstance(output, Step)]
    assert not any(step.is_cached for step in steps)


def test_the_video_is_close_to_the_exact_one_and_another(engine: WanEngine) -> None:
    """Closer than one of as many steps as are computed."""
    exact = loaded("tiny-wan", has_step_cache=False)
    request = make_request(engine, num_inference_steps=20, num_frames=9, size="128x128")
    fewer = request.model_copy(update={"num_inference_steps": 20 - len(choose_skipped(20))})
    made, wanted, short = take_turns([engine.sample(request), exact.sample(request), exact.sample(fewer)])
    assert 0 < (made - wanted).norm() < 0.5 * (short - wanted).norm()


def test_as_few_steps_as_are_all_computed_are_exact(engine: WanEngine) -> None:
    exact = loaded("tiny-wan", has_step_cache=False)
    request = make_request(engine, num_inference_steps=6)
    assert np.array_equal(frames(list(engine.generate(request))), frames(list(exact.generate(request))))


@pytest.mark.parametrize("mode", ["text", "unguided", "image", "edit"])
def test_resumed_equals_uninterrupted(engine: WanEngine, mode: str) -> None:
    """Bit for bit, from every step: before one that is skipped, behind it, and behind both."""
    request = make_request(engine, guidance_scale=1.0 if mode == "unguided" else 3.0)
    inputs = Inputs(first_frame=FILM[0] if mode == "image" else None, film=FILM if mode == "edit" else None)
    if inputs.film is not None:
        request = request.model_copy(update={"strength": 0.9, "num_inference_steps": 12})
    outputs, checkpoints = collect(engine.generate(request, inputs))
    assert any(isinstance(output, Step) and output.is_cached for output in outputs)
    for num_done, checkpoint in enumerate(checkpoints, start=1):
        resumed, again = collect(engine.generate(request, inputs, checkpoint))
        assert again == checkpoints[num_done:]
        assert np.array_equal(frames(resumed), frames(outputs))


def test_interleaved_equals_alone(engine: WanEngine) -> None:
    asked = ((1, 10), (2, 8), (3, 12))
    requests = [make_request(engine, seed=seed, num_inference_steps=steps) for seed, steps in asked]
    alone = [take_turns([engine.sample(request)])[0] for request in requests]
    together = take_turns([engine.sample(request) for request in requests])
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize(("solver", "is_skipped"), [("euler", True), ("lcm", False)])
def test_new_noise_of_each_step_is_no_line_to_follow(engine: WanEngine, solver: str, is_skipped: bool) -> None:
    """A velocity leads away from the noise of its step, so with ``lcm`` every step is computed."""
    request = make_request(engine).model_copy(update={"solver": solver})
    outputs, _ = collect(engine.generate(request))
    assert any(output.is_cached for output in outputs if isinstance(output, Step)) == is_skipped


def test_a_checkpoint_of_the_exact_mode_begins_again(engine: WanEngine) -> None:
    exact = loaded("tiny-wan", has_step_cache=False)
    request = make_request(engine)
    step = next(exact.sample(request))
    assert step.checkpoint is not None
    assert next(engine.sample(request, resume=step.checkpoint())).index == 1


def test_each_of_two_experts_has_velocities_of_its_own(tmp_path: Path) -> None:
    """The second computes its first two steps, wherever it takes over."""
    engine = loaded(str(save_two_experts(tmp_path / "model")))
    request = make_request(engine, num_inference_steps=20)
    first, second = Counted(engine, "transformer"), Counted(engine, "transformer_2")
    take_turns([engine.sample(request)])
    takes_over = second.steps[0]
    assert 3 < takes_over < 17
    assert second.steps[:2] == [takes_over, takes_over + 1]
    assert max(first.steps) < takes_over
    assert sorted([*first.steps, *second.steps]) == [i for i in range(20) if i not in choose_skipped(20, takes_over)]
