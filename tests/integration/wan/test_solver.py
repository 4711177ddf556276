"""Each solver takes the steps of diffusers' scheduler, to the bit, for any settings that a checkpoint may have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from kinema.engines.wan.denoise import guide
from kinema.engines.wan.solvers.choice import make_solver
from kinema.engines.wan.solvers.lcm import Lcm
from kinema.engines.wan.solvers.solver import Solver
from kinema.errors import InvalidRequest
from kinema.request.request import GenerationRequest

UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
LCM = {"_class_name": "FlowMatchLCMScheduler"}
SETTINGS: list[dict[str, Any]] = [
    UNIPC,
    {**UNIPC, "final_sigmas_type": "sigma_min"},
    {**UNIPC, "solver_order": 1},
    {**UNIPC, "shift_terminal": 0.1},
    {**UNIPC, "num_train_timesteps": 500},
    EULER,
    {**EULER, "shift_terminal": 0.1},
    {**EULER, "num_train_timesteps": 500},
    {**EULER, "stochastic_sampling": True},
    LCM,
    {**LCM, "shift_terminal": 0.1},
    {**LCM, "num_train_timesteps": 500},
]
LISTS = [(1000.0, 750.0, 500.0, 250.0), (1000.0, 757.0, 522.0), (999.0,), (990.0, 800.5, 3.25)]
SHAPE = (1, 4, 2, 6, 5)
CPU = torch.device("cpu")


def make_request(num_steps: int, flow_shift: float, **values: object) -> GenerationRequest:
    return GenerationRequest.model_validate(
        {
            "model": "any",
            "prompt": "",
            "negative_prompt": "",
            "width": 64,
            "height": 64,
            "num_frames": 5,
            "fps": 16,
            "guidance_scale": 5.0,
            "seed": 11,
            "num_inference_steps": num_steps,
            "flow_shift": flow_shift,
            **values,
        }
    )


def scheduler_of(config: dict[str, Any], flow_shift: float) -> Any:
    import diffusers

    name = config["_class_name"]
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    return getattr(diffusers, name)(**settings, **{"flow_shift" if name.startswith("UniPC") else "shift": flow_shift})


def make_noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))


def model(latents: Tensor, time: float, guidance_scale: float) -> Tensor:
    """A velocity that depends on latents and time, guided or not; a scale of 1 is one branch."""
    velocities = torch.cat([torch.sin(latents * factor) + time / 1000 for factor in (3.0, -1.5)])
    return guide(velocities if guidance_scale > 1 else velocities[:1], guidance_scale)


def ours(solver: Solver, guidance_scale: float, begin: int = 0, latents: Tensor | None = None) -> Iterator[Tensor]:
    """The latents after each step."""
    latents = make_noise() if latents is None else latents
    for index in range(begin, len(solver.schedule.times)):
        latents = solver.step(model(latents, solver.schedule.times[index], guidance_scale), latents, index)
        yield latents


def theirs(scheduler: Any, guidance_scale: float, noise_of: Callable[[Tensor, int], Tensor]) -> Iterator[Tensor]:
    """The same by diffusers, with this noise of each step."""
    name = type(scheduler).__module__
    latents = make_noise()
    scheduler.set_begin_index(0)  # as a pipeline does: without it a time that two steps share is taken for the later
    for index, time in enumerate(scheduler.timesteps):
        noise = noise_of(latents, index)
        with patch(f"{name}.randn_tensor", lambda *_, noise=noise, **__: noise, create=True):
            velocity = model(latents, time.item(), guidance_scale)
            latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
        yield latents


def no_noise(latents: Tensor, _index: int) -> Tensor:
    return torch.full_like(latents, torch.nan)


def assert_same(solver: Solver, scheduler: Any, guidance_scale: float = 5.0) -> None:
    """Levels, times, and the latents after every step."""
    assert torch.equal(solver.schedule.levels, scheduler.sigmas)
    assert torch.equal(solver.schedule.timesteps, scheduler.timesteps)
    assert solver.schedule.timesteps.dtype == scheduler.timesteps.dtype
    noise_of = solver.noise if isinstance(solver, Lcm) else no_noise
    own = list(ours(solver, guidance_scale))
    for mine, other in zip(own, theirs(scheduler, guidance_scale, noise_of), strict=True):
        assert torch.equal(mine, other)
    assert own[-1].isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("flow_shift", [0.5, 1.0, 3.0, 5.0, 12.0])
def test_a_trajectory_is_that_of_diffusers(settings: dict[str, Any], flow_shift: float) -> None:
    """For few steps and for many, guided and not."""
    # A single step has no level between the first one and the last to stretch.
    counts = (2, 4, 7, 50) if "shift_terminal" in settings else (1, 2, 4, 7, 50)
    for num_steps, guidance_scale in product(counts, (1.0, 5.0)):
        scheduler = scheduler_of(settings, flow_shift)
        scheduler.set_timesteps(num_steps)
        assert_same(make_solver(settings, make_request(num_steps, flow_shift), CPU), scheduler, guidance_scale)


@pytest.mark.parametrize(
    ("settings", "timesteps"),
    # A single step has no level between the first one and the last to stretch.
    [
        (settings, timesteps)
        for settings in SETTINGS
        for timesteps in LISTS
        if "shift_terminal" not in settings or len(timesteps) > 1
    ],
    ids=str,
)
def test_listed_timesteps_are_the_levels_before_the_shift(
    settings: dict[str, Any], timesteps: tuple[float, ...]
) -> None:
    """As diffusers' ``sigmas``; without a shift they are the times themselves."""
    scale = settings.get("num_train_timesteps", 1000)
    timesteps = tuple(time * scale / 1000 for time in timesteps)
    for flow_shift in (1.0, 5.0):
        scheduler = scheduler_of(settings, flow_shift)
        scheduler.set_timesteps(sigmas=np.array([time / scale for time in timesteps]))
        solver = make_solver(settings, make_request(len(timesteps), flow_shift, timesteps=timesteps), CPU)
        assert_same(solver, scheduler)
    euler = make_solver(EULER, make_request(4, 1.0, timesteps=LISTS[0]), CPU)
    assert euler.schedule.times == LISTS[0]
    assert make_solver(EULER, make_request(4, 5.0, timesteps=LISTS[0]), CPU).schedule.times[1] == pytest.approx(937.5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_edit_has_the_last_part_of_the_levels(settings: dict[str, Any]) -> None:
    """And begins with as much noise as the first of them has, as diffusers adds it."""
    scheduler = scheduler_of(settings, 3.0)
    scheduler.set_timesteps(10)
    schedule = make_solver(settings, make_request(10, 3.0, strength=0.6), CPU).schedule
    assert torch.equal(schedule.levels, scheduler.sigmas[4:])
    assert torch.equal(schedule.timesteps, scheduler.timesteps[4:])
    clean, noise, first = torch.full(SHAPE, 0.5), make_noise(), scheduler.timesteps[4:5]
    if hasattr(scheduler, "add_noise"):
        assert torch.equal(schedule.add_noise(clean, noise), scheduler.add_noise(clean, noise, first))
    elif hasattr(scheduler, "scale_noise"):
        assert torch.equal(schedule.add_noise(clean, noise), scheduler.scale_noise(clean, first, noise))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("strength", [None, 0.6])
def test_resumed_after_any_step_equals_uninterrupted(settings: dict[str, Any], strength: float | None) -> None:
    """A new solver goes on from the state of another, whose names are known beforehand."""
    request = make_request(7, 3.0, strength=strength)
    whole = list(ours(make_solver(settings, request, CPU), 5.0))
    solver = make_solver(settings, request, CPU)
    for num_done, latents in enumerate(ours(solver, 5.0), start=1):
        state = solver.state()
        other = make_solver(settings, request, CPU)
        assert list(state) == other.state_names(num_done)
        other.restore(state)
        rest = list(ours(other, 5.0, num_done, latents))
        assert len(rest) == len(whole) - num_done
        assert all(torch.equal(one, expected) for one, expected in zip(rest, whole[num_done:], strict=True))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_clean_latents_of_a_step_are_known(settings: dict[str, Any]) -> None:
    """Latents of clean and noise, and the velocity from the one to the other, give the clean ones back."""
    solver = make_solver(settings, make_request(5, 3.0), CPU)
    clean, noise = torch.full(SHAPE, 0.5), make_noise()
    solver.step(noise - clean, solver.schedule.add_noise(clean, noise), 0)
    assert torch.allclose(solver.predicted, clean, atol=1e-5)


def test_noise_of_a_step_follows_from_seed_and_step() -> None:
    """No two are equal, and none is the noise that a video of a near seed begins with."""
    seeds, steps = range(5), range(5)
    found = [
        solver.noise(make_noise(), index)
        for solver in (make_solver(LCM, make_request(5, 3.0, seed=seed), CPU) for seed in seeds)
        if isinstance(solver, Lcm)
        for index in steps
    ]
    first = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(10)]
    assert len(found) == 25
    assert len({tuple(noise.flatten()[:4].tolist()) for noise in [*found, *first]}) == 35


@pytest.mark.parametrize("name", ["unipc", "euler", "lcm"])
@pytest.mark.parametrize("settings", [UNIPC, EULER, LCM], ids=str)
def test_a_request_may_name_another_solver_than_the_checkpoints(name: str, settings: dict[str, Any]) -> None:
    """It is that of a checkpoint which has it, with the same number of training steps."""
    own = {"unipc": UNIPC, "euler": EULER, "lcm": LCM}[name] | {"num_train_timesteps": 500}
    expected = list(ours(make_solver(own, make_request(5, 3.0), CPU), 5.0))
    solver = make_solver({**settings, "num_train_timesteps": 500}, make_request(5, 3.0, solver=name), CPU)
    assert all(torch.equal(*pair) for pair in zip(ours(solver, 5.0), expected, strict=True))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"solver": "dpm++"}, r"solver 'dpm\+\+' is not known; accepted: unipc, euler, lcm"),
        ({"timesteps": (1000.0, 500.0, 250.0)}, "timesteps has 3 numbers for 4 steps"),
        ({"timesteps": ()}, "timesteps has 0 numbers for 4 steps"),
        ({"timesteps": (1000.0, 500.0, 500.0, 250.0)}, "must fall from at most 1000 to more than 0"),
        ({"timesteps": (1001.0, 750.0, 500.0, 250.0)}, "must fall from at most 1000 to more than 0"),
        ({"timesteps": (1000.0, 750.0, 500.0, 0.0)}, "must fall from at most 1000 to more than 0"),
        ({"timesteps": (1000.0, float("nan"), 500.0, 1.0)}, "must fall from at most 1000 to more than 0"),
    ],
    ids=str,
)
def test_what_no_solver_has_is_refused(values: dict[str, object], sentence: str) -> None:
    """In one sentence, before a step."""
    with pytest.raises(InvalidRequest, match=sentence):
        make_solver(EULER, make_request(4, 3.0, **values), CPU)
