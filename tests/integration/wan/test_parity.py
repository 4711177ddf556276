"""Our loop makes what diffusers' own pipelines make of the same weights, prompt and seed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.engines.base import NO_INPUTS, Inputs
from kinema.engines.wan.checkpoint import BUNDLED, inspect
from kinema.engines.wan.configs import FlowMatchConfig
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.solvers.lcm import Lcm
from kinema.request.request import GenerationRequest
from tests.integration.wan.random_checkpoints import (
    save_flf2v,
    save_i2v,
    save_i2v21,
    save_i2v22,
    save_ti2v,
    save_two_experts,
    save_wan21,
    with_scheduler,
)

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, WanImageToVideoPipeline, WanPipeline

# In [0, 1]: a quarter of a level of 8 bits. Sums are made in another order, and edges make more of that than surfaces.
MAX_DIFFERENCE = 1e-3
# Of frames that are given in channels, whose colours change a random model's video little.
MAX_GIVEN_DIFFERENCE = 2e-5
SAVERS: dict[str, Callable[[Path], Path]] = {
    "wan21": save_wan21,
    "two-experts": save_two_experts,
    "ti2v": save_ti2v,
    "i2v": save_i2v,
    "i2v22": save_i2v22,
    "i2v21": save_i2v21,
    "flf2v": save_flf2v,
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every style with random weights, and the bundled model."""
    root = tmp_path_factory.mktemp("checkpoints")
    saved = {name: save(root / name) for name, save in SAVERS.items()}
    others = {
        f"{name} {solver}": with_scheduler(path, root / f"{name} {solver}", scheduler)
        for name, path in saved.items()
        for solver, scheduler in other_schedulers().items()
    }
    return {**saved, **others, "tiny-wan": BUNDLED["tiny-wan"]}


def other_schedulers() -> dict[str, SchedulerMixin]:
    """Those that a checkpoint may name in place of UniPC."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    return {"euler": FlowMatchEulerDiscreteScheduler(shift=5.0), "lcm": FlowMatchLCMScheduler(shift=5.0)}


@pytest.fixture(scope="session")
def load_engine(checkpoints: dict[str, Path]) -> Callable[[str], WanEngine]:
    @functools.cache
    def load(name: str) -> WanEngine:
        engine = WanEngine(inspect(str(checkpoints[name])), device="cpu", dtype="float32")
        engine.load()
        return engine

    return load


def make_request(model: str, **changes: object) -> GenerationRequest:
    values: dict[str, object] = {
        "model": model,
        "prompt": "a red circle moving right &amp; on the  black sky",
        "negative_prompt": "",
        "width": 32,
        "height": 32,
        "num_frames": 5,
        "fps": 16,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "flow_shift": 3.0,
        "seed": 11,
    }
    return GenerationRequest.model_validate({**values, **changes})


def ours(engine: WanEngine, request: GenerationRequest, inputs: Inputs = NO_INPUTS) -> np.ndarray:
    """Frames (f, h, w, 3) float in [0, 1]."""
    steps = engine.sample(request, inputs)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            latents = done.value
            break
    with torch.inference_mode():
        decoder = engine.decoder
        return np.concatenate([decoder.to_rgb(decoded).numpy() for decoded in decoder.decode(latents)])


@functools.cache
def load_pipeline(kind: type, path: Path) -> WanPipeline | WanImageToVideoPipeline:
    pipeline = kind.from_pretrained(str(path), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(path: Path, request: GenerationRequest, inputs: Inputs = NO_INPUTS) -> np.ndarray:
    from diffusers import WanImageToVideoPipeline, WanPipeline

    pipeline = load_pipeline(WanPipeline if inputs is NO_INPUTS else WanImageToVideoPipeline, path)
    names = {"first_frame": "image", "last_frame": "last_image"}
    pictures = {names[name]: Image.fromarray(picture) for name, picture in inputs.given().items()}
    return run(pipeline, request, **pictures)


def run(
    pipeline: WanPipeline | WanImageToVideoPipeline, request: GenerationRequest, **pictures: Image.Image
) -> np.ndarray:
    """Frames (f, h, w, 3) float in [0, 1]."""
    second = {} if request.guidance_scale_2 is None else {"guidance_scale_2": request.guidance_scale_2}
    return pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="np",
        **second,
        **pictures,
    ).frames[0]


def their_edit(path: Path, request: GenerationRequest, video: np.ndarray) -> np.ndarray:
    """diffusers takes the VAE's factor from its number of downsamplings, which leaves out the patches of Wan 2.2's."""
    from diffusers import WanPipeline, WanVideoToVideoPipeline

    parts = load_pipeline(WanPipeline, path)
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipeline = WanVideoToVideoPipeline(**{name: getattr(parts, name) for name in names})
    pipeline.vae_scale_factor_spatial = parts.vae.config.scale_factor_spatial
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        video=[Image.fromarray(frame) for frame in video],
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        strength=request.strength,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="np",
    ).frames[0]


VARIATIONS = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "blurry bad"},
    "wide": {"width": 96, "height": 32, "num_frames": 9},
}


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("name", ["wan21", "ti2v", "tiny-wan"])
def test_text_to_video_equals_diffusers(
    name: str, variation: str, checkpoints: dict[str, Path], load_engine: Callable[[str], WanEngine]
) -> None:
    """With and without guidance, with a negative prompt, at two sizes: the decoded frames agree."""
    request = make_request(name, **VARIATIONS[variation])
    expected = theirs(checkpoints[name], request)
    frames = ours(load_engine(name), request)
    assert frames.shape == expected.shape == (request.num_frames, request.height, request.width, 3)
    assert expected.std() > 1e-3  # a flat picture would agree with anything flat
    assert np.abs(frames - expected).max() <= MAX_DIFFERENCE


@pytest.fixture
def our_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[GenerationRequest], None]:
    """Let the steps of diffusers' LCM have our noise of a request: it would take that of torch's global generator."""
    from diffusers.schedulers import scheduling_flow_match_lcm

    def use(request: GenerationRequest) -> None:
        steps, solver = itertools.count(), Lcm(FlowMatchConfig(), request, torch.device("cpu"))

        def noise(shape: torch.Size, **_options: object) -> torch.Tensor:
            return solver.noise(torch.empty(shape), next(steps))

        monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", noise)

    return use


# The new solvers are held to less than the older parity tests: a tenth of that.
MAX_SOLVER_DIFFERENCE = 1e-4


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("solver", ["euler", "lcm"])
@pytest.mark.parametrize("name", ["wan21", "two-experts", "ti2v"])
def test_a_checkpoint_with_another_solver_equals_diffusers(
    name: str,
    solver: str,
    variation: str,
    checkpoints: dict[str, Path],
    load_engine: Callable[[str], WanEngine],
    our_noise: Callable[[GenerationRequest], None],
) -> None:
    """By the scheduler of its own folder, whose shift is the preset's; as text-to-video and from a first frame."""
    model, engine = f"{name} {solver}", load_engine(f"{name} {solver}")
    assert (engine.facts.solver, engine.capabilities.preset.flow_shift) == (solver, 5.0)
    request = make_request(model, flow_shift=5.0, num_inference_steps=4, **VARIATIONS[variation])
    if name == "two-experts":
        request = request.model_copy(update={"boundary_ratio": 0.875, "guidance_scale_2": request.guidance_scale})
    image = np.random.default_rng(3).integers(0, 256, (request.height, request.width, 3), dtype=np.uint8)
    for inputs in (NO_INPUTS, Inputs(first_frame=image)) if name == "ti2v" else (NO_INPUTS,):
        our_noise(request)
        expected = theirs(checkpoints[model], request, inputs)
        frames = ours(engine, request, inputs)
        assert expected.std() > 1e-3
        assert np.abs(frames - expected).max() <= MAX_SOLVER_DIFFERENCE


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", ["wan21", "ti2v"])
def test_an_edit_by_euler_equals_diffusers(
    name: str, strength: float, checkpoints: dict[str, Path], load_engine: Callable[[str], WanEngine]
) -> None:
    """It begins in the middle of Euler's noise levels."""
    request = make_request(name, flow_shift=5.0, strength=strength, num_inference_steps=5)
    video = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    expected = their_edit(checkpoints[f"{name} euler"], request, video)
    frames = ours(load_engine(f"{name} euler"), request, Inputs(film=video))
    assert expected.std() > 1e-3
    assert np.abs(frames - expected).max() <= MAX_SOLVER_DIFFERENCE


def test_two_experts_equal_diffusers(checkpoints: dict[str, Path], load_engine: Callable[[str], WanEngine]) -> None:
    """Both experts run, each with its own guidance, on the two sides of the boundary."""
    request = make_request("two-experts", guidance_scale_2=2.0, boundary_ratio=0.875)
    expected = theirs(checkpoints["two-experts"], request)
    frames = ours(load_engine("two-experts"), request)
    first_only = ours(load_engine("two-experts"), request.model_copy(update={"boundary_ratio": 0.0}))
    assert np.abs(frames - expected).max() <= MAX_DIFFERENCE
    assert np.abs(first_only - expected).max() > MAX_DIFFERENCE


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("name", ["ti2v", "tiny-wan"])
def test_image_to_video_equals_diffusers(
    name: str, variation: str, checkpoints: dict[str, Path], load_engine: Callable[[str], WanEngine]
) -> None:
    """The first frame is encoded, kept clean and decoded as WanImageToVideoPipeline does."""
    request = make_request(name, **VARIATIONS[variation])
    image = np.random.default_rng(3).integers(0, 256, (request.height, request.width, 3), dtype=np.uint8)
    inputs = Inputs(first_frame=image)
    expected = theirs(checkpoints[name], request, inputs)
    frames = ours(load_engine(name), request, inputs)
    assert np.abs(frames - expected).max() <= MAX_DIFFERENCE
    assert np.abs(frames - ours(load_engine(name), request)).max() > MAX_DIFFERENCE


@pytest.mark.parametrize("has_last_frame", [False, True], ids=["first", "first and last"])
@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("name", ["i2v", "i2v22"])
def test_given_frames_in_channels_equal_diffusers(
    name: str,
    variation: str,
    has_last_frame: bool,
    checkpoints: dict[str, Path],
    load_engine: Callable[[str], WanEngine],
) -> None:
    """The mask and the latents of the given frames stand beside the noisy ones, for both experts."""
    request = make_request(name, **VARIATIONS[variation])
    if name == "i2v22":
        request = request.model_copy(update={"guidance_scale_2": request.guidance_scale / 2, "boundary_ratio": 0.9})
    shape = (2, request.height, request.width, 3)
    first, last = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    inputs = Inputs(first, last if has_last_frame else None)
    expected = theirs(checkpoints[name], request, inputs)
    frames = ours(load_engine(name), request, inputs)
    assert frames.shape == expected.shape == (request.num_frames, request.height, request.width, 3)
    assert np.abs(frames - expected).max() <= MAX_GIVEN_DIFFERENCE
    other = Inputs(255 - first, inputs.last_frame) if not has_last_frame else Inputs(first, 255 - last)
    assert np.abs(frames - ours(load_engine(name), request, other)).max() > MAX_GIVEN_DIFFERENCE


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("name", ["i2v21", "flf2v"])
def test_what_clip_sees_in_given_frames_equals_diffusers(
    name: str,
    variation: str,
    checkpoints: dict[str, Path],
    load_engine: Callable[[str], WanEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first frame, or the first and the last, beside their channels."""
    request = make_request(name, **VARIATIONS[variation])
    shape = (2, request.height, request.width, 3)
    first, last = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    inputs = Inputs(first, last if name == "flf2v" else None)
    expected = theirs(checkpoints[name], request, inputs)
    frames = ours(load_engine(name), request, inputs)
    assert np.abs(frames - expected).max() <= MAX_GIVEN_DIFFERENCE
    parts = load_engine(name).parts
    encoder: Any = parts.image_encoder
    monkeypatch.setattr(parts, "image_encoder", lambda pictures: torch.zeros_like(encoder(pictures)))
    assert np.abs(frames - ours(load_engine(name), request, inputs)).max() > MAX_GIVEN_DIFFERENCE


@pytest.mark.parametrize(
    ("variation", "strength"), [("guided", 0.2), ("guided", 1.0), *((variation, 0.6) for variation in VARIATIONS)]
)
@pytest.mark.parametrize("name", ["wan21", "ti2v", "tiny-wan"])
def test_video_to_video_equals_diffusers(
    name: str, variation: str, strength: float, checkpoints: dict[str, Path], load_engine: Callable[[str], WanEngine]
) -> None:
    """The film is encoded, noised to the step that the strength selects and denoised from there.

    diffusers has no such pipeline for models with a timestep per token; there, one for all tokens is the same.
    """
    request = make_request(name, strength=strength, num_inference_steps=5, **VARIATIONS[variation])
    shape = (request.num_frames, request.height, request.width, 3)
    video = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    expected = their_edit(checkpoints[name], request, video)
    frames = ours(load_engine(name), request, Inputs(film=video))
    assert frames.shape == expected.shape == shape
    assert expected.std() > 1e-3
    assert np.abs(frames - expected).max() <= MAX_DIFFERENCE


def test_an_edit_keeps_more_of_its_film_the_less_strength_it_has(load_engine: Callable[[str], WanEngine]) -> None:
    """With the bundled model: a moving red circle that is asked to be blue."""
    engine = load_engine("tiny-wan")
    base = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 10, "guidance_scale": 3.0}
    first = make_request("tiny-wan", **{**base, "prompt": "a red circle moving right on a black background"})
    film = np.rint(ours(engine, first) * 255).astype(np.uint8)
    distances = []
    for strength in (0.1, 0.4, 0.7, 1.0):
        edit = make_request(
            "tiny-wan", **{**base, "prompt": "a blue circle moving right on a black background"}, strength=strength
        )
        distances.append(np.abs(ours(engine, edit, Inputs(film=film)) - film / 255).mean())
    assert distances == sorted(distances)
    assert distances[0] < distances[-1] / 4
