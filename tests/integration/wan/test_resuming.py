"""A generation that goes on from a checkpoint makes what it would have made: the real tiny model, on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from kinema.engines.base import NO_INPUTS, Frames, Inputs, Output, Step, UInt8Array
from kinema.engines.sealing import seal
from kinema.engines.wan import denoise
from kinema.engines.wan.checkpoint import BUNDLED, inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.fingerprint import weights_digest
from kinema.engines.wan.finite import Arrival
from kinema.errors import OutOfMemory
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from tests.integration.wan.random_checkpoints import save_two_experts, save_wan21

NUM_STEPS = 4
FILM = np.random.default_rng(5).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


class Made:
    """A whole generation, with the checkpoint of each of its steps."""

    def __init__(self, engine: WanEngine, request: GenerationRequest, inputs: Inputs = NO_INPUTS) -> None:
        self.engine, self.request, self.inputs = engine, request, inputs
        outputs = []
        self.checkpoints: list[bytes] = []
        for output in engine.generate(request, inputs):
            outputs.append(output)
            if isinstance(output, Step):
                assert output.checkpoint is not None
                self.checkpoints.append(output.checkpoint())
        self.frames = collect(outputs)

    def resume(self, checkpoint: bytes) -> tuple[list[int], UInt8Array]:
        """The steps that are taken, and the frames."""
        outputs = list(self.engine.generate(self.request, self.inputs, resume=checkpoint))
        return [output.index for output in outputs if isinstance(output, Step)], collect(outputs)


def collect(outputs: list[Output]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


def make_request(engine: WanEngine, **values: object) -> GenerationRequest:
    asked = {"prompt": "a red circle moving right", "num_inference_steps": NUM_STEPS, "seed": 3, "num_frames": 5}
    options = GenerationOptions.model_validate({"size": "64x64", **asked, **values})
    return resolve(options, engine.capabilities).request


def loaded(model: str) -> WanEngine:
    engine = WanEngine(inspect(model), device="cpu")
    engine.load()
    return engine


@pytest.fixture(scope="module")
def engine() -> WanEngine:
    return loaded("tiny-wan")


@pytest.fixture(scope="module")
def from_text(engine: WanEngine) -> Made:
    return Made(engine, make_request(engine))


@pytest.fixture(scope="module")
def from_image(engine: WanEngine) -> Made:
    return Made(engine, make_request(engine, prompt="it moves left"), Inputs(first_frame=FILM[0]))


@pytest.fixture(scope="module")
def edit(engine: WanEngine) -> Made:
    request = make_request(engine, num_inference_steps=6).model_copy(update={"strength": 0.7})
    return Made(engine, request, Inputs(film=FILM))


@pytest.fixture(scope="module")
def euler(engine: WanEngine) -> Made:
    request = make_request(engine, num_inference_steps=6)
    return Made(engine, request.model_copy(update={"strength": 0.7, "solver": "euler"}), Inputs(film=FILM))


@pytest.fixture(scope="module")
def lcm(engine: WanEngine) -> Made:
    listed = {"solver": "lcm", "timesteps": (1000.0, 750.0, 500.0, 250.0)}
    return Made(engine, make_request(engine, guidance_scale=1.0).model_copy(update=listed), Inputs(first_frame=FILM[0]))


@pytest.mark.parametrize("mode", ["from_text", "from_image", "edit", "euler", "lcm"])
@pytest.mark.parametrize("num_done", range(1, NUM_STEPS + 1))
def test_resumed_equals_uninterrupted(mode: str, num_done: int, request: pytest.FixtureRequest) -> None:
    """Bit for bit, from every step, the last one too; and no step is taken twice."""
    made: Made = request.getfixturevalue(mode)
    assert len(made.checkpoints) == NUM_STEPS
    steps, frames = made.resume(made.checkpoints[num_done - 1])
    assert steps == list(range(num_done + 1, NUM_STEPS + 1))
    assert np.array_equal(frames, made.frames)


@pytest.mark.parametrize("num_done", range(1, NUM_STEPS))
def test_a_checkpoint_stays_that_of_its_step(num_done: int, from_text: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when memory runs out at the very end of the next step."""

    def fail(_latents: Tensor) -> Arrival:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    generation = from_text.engine.generate(from_text.request)
    step = [next(generation) for _ in range(num_done)][-1]
    monkeypatch.setattr(denoise, "expect", fail)
    with pytest.raises(OutOfMemory):
        next(generation)
    assert isinstance(step, Step)
    assert step.checkpoint is not None
    assert step.checkpoint() == from_text.checkpoints[num_done - 1]


def test_a_film_is_encoded_once(edit: Made) -> None:
    """A resumed edit does not look at it, here there is none: all that it needs of the film is in its latents."""
    outputs = list(edit.engine.generate(edit.request, Inputs(film=FILM[:0]), resume=edit.checkpoints[1]))
    assert np.array_equal(collect(outputs), edit.frames)


def test_checkpoints_of_a_resumed_generation_are_the_same(from_text: Made) -> None:
    """So that it can be lost again, and again."""
    outputs = from_text.engine.generate(from_text.request, resume=from_text.checkpoints[0])
    again = [output.checkpoint() for output in outputs if isinstance(output, Step) and output.checkpoint]
    assert again == from_text.checkpoints[1:]


@pytest.mark.parametrize("save", [save_wan21, save_two_experts])
def test_other_models_resume_too(save: object, tmp_path: Path) -> None:
    """One transformer or two, in the middle and on both sides of the boundary."""
    engine = loaded(str(save(tmp_path / "model")))  # type: ignore[operator]
    made = Made(engine, make_request(engine))
    for checkpoint in made.checkpoints:
        assert np.array_equal(made.resume(checkpoint)[1], made.frames)


def test_what_others_do_in_between_changes_nothing(from_text: Made, from_image: Made) -> None:
    """A resumed generation takes turns with one that is new."""
    resumed = from_text.engine.generate(from_text.request, resume=from_text.checkpoints[1])
    outputs: list[Output] = []
    for output in from_image.engine.generate(from_image.request, from_image.inputs):
        del output
        outputs += [mine for mine in [next(resumed, None)] if mine is not None]
    outputs += list(resumed)
    assert np.array_equal(collect(outputs), from_text.frames)


def damaged(data: bytes) -> dict[str, bytes]:
    def flipped(at: int) -> bytes:
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    header = data.index(b"\n", data.index(b"\n") + 1)
    places = {"digest": 3, "header": 80, "tensor names": header + 40, "middle": len(data) // 2, "end": len(data) - 1}
    cut = {"nothing": b"", "half": data[: len(data) // 2], "one byte less": data[:-1], "one byte more": data + b"\0"}
    return {"no checkpoint": b"\x80\x04K\x01.", **cut, **{name: flipped(at) for name, at in places.items()}}


def test_a_damaged_checkpoint_begins_again(from_text: Made) -> None:
    """Torn, cut, longer, or with one bit that is another, anywhere: the right video, from the first step."""
    for name, data in damaged(from_text.checkpoints[1]).items():
        steps, frames = from_text.resume(data)
        assert steps == list(range(1, NUM_STEPS + 1)), name
        assert np.array_equal(frames, from_text.frames), name


def contents(data: bytes) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    return load(data.split(b"\n", 2)[2])


def changed(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors that are none of this state."""
    latents = tensors["latents"]
    others = {name: tensor for name, tensor in tensors.items() if name != "latents"}
    return {
        "nothing": {},
        "no latents": others,
        "one more": {**tensors, "more": latents.clone()},
        "velocities": {**tensors, "computed.0": latents.clone()},
        "smaller": {**tensors, "latents": latents[:, :, :1].clone()},
        "larger": {**tensors, "latents": latents.repeat(1, 1, 9, 9, 9)},
        "flat": {**tensors, "last_sample": latents.flatten().clone()},
        "empty": {**tensors, "predicted.0": torch.zeros(0)},
        "no numbers": {**tensors, "latents": torch.full_like(latents, torch.nan)},
        "half": {**tensors, "latents": latents.half()},
        "whole numbers": {**tensors, "latents": latents.to(torch.int32)},
    }


def test_a_whole_checkpoint_that_is_none_of_ours_begins_again(from_text: Made) -> None:
    """Its digest is right, and its steps or tensors are others than the request's."""
    facts, request, made = from_text.engine.facts, from_text.request, from_text.checkpoints[1]
    tensors = contents(made)
    bad = {name: seal(facts, request, {"num_done": 2}, save(other)) for name, other in changed(tensors).items()}
    bad["too far"] = seal(facts, request, {"num_done": 10**9}, save(tensors))
    bad["too early"] = seal(facts, request, {"num_done": 1}, save(tensors))
    bad["before"] = seal(facts, request, {"num_done": -1}, save(tensors))
    bad["no tensors"] = seal(facts, request, {"num_done": 2}, b"\xff" * 100)
    bad["padded"] = seal(facts, request, {"num_done": 2}, save(tensors) + bytes(10**6))
    for name, data in bad.items():
        assert next(from_text.engine.generate(request, resume=data)).index == 1, name  # type: ignore[union-attr]
    good = seal(facts, request, {"num_done": 2}, save(tensors))
    assert next(from_text.engine.generate(request, resume=good)).index == 3  # type: ignore[union-attr]


def test_a_checkpoint_of_another_request_begins_again(engine: WanEngine, from_text: Made) -> None:
    """Although its latents would fit."""
    other = make_request(engine, seed=4)
    outputs = list(engine.generate(other, resume=from_text.checkpoints[1]))
    assert [output.index for output in outputs if isinstance(output, Step)] == [1, 2, 3, 4]
    assert np.array_equal(collect(outputs), collect(list(engine.generate(other))))


@pytest.mark.parametrize(
    "values", [{"solver": "euler"}, {"solver": "lcm"}, {"timesteps": (1000.0, 750.0, 500.0, 250.0)}], ids=str
)
def test_a_checkpoint_of_another_solver_begins_again(
    values: dict[str, object], engine: WanEngine, from_text: Made
) -> None:
    """Or of other timesteps; either makes another video."""
    other = from_text.request.model_copy(update=values)
    outputs = list(engine.generate(other, resume=from_text.checkpoints[1]))
    assert [output.index for output in outputs if isinstance(output, Step)] == [1, 2, 3, 4]
    assert not np.array_equal(collect(outputs), from_text.frames)


def test_a_checkpoint_of_a_model_with_another_solver_begins_again(from_text: Made, tmp_path: Path) -> None:
    """The same weights, and a folder that says Euler: an engine's facts name its solver."""
    folder = tmp_path / from_text.request.model
    shutil.copytree(BUNDLED["tiny-wan"], folder)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    other = loaded(str(folder))
    assert (from_text.engine.facts.solver, other.facts.solver) == ("unipc", "euler")
    outputs = list(other.generate(from_text.request, resume=from_text.checkpoints[1]))
    assert [output.index for output in outputs if isinstance(output, Step)] == [1, 2, 3, 4]
    named = from_text.request.model_copy(update={"solver": "euler"})
    assert np.array_equal(collect(outputs), collect(list(from_text.engine.generate(named))))


def test_a_checkpoint_of_other_weights_begins_again(from_text: Made, tmp_path: Path) -> None:
    """The same shapes, names and sizes in another folder, and one tensor that was tuned a little."""
    folder = tmp_path / from_text.request.model
    shutil.copytree(BUNDLED["tiny-wan"], folder)
    assert weights_digest(inspect(str(folder))) == weights_digest(inspect("tiny-wan"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"] = tensors["proj_out.bias"] * 1.01
    save_file(tensors, weights, metadata={"format": "pt"})
    tuned = loaded(str(folder))
    assert tuned.facts != from_text.engine.facts
    outputs = list(tuned.generate(from_text.request, resume=from_text.checkpoints[1]))
    assert [output.index for output in outputs if isinstance(output, Step)] == [1, 2, 3, 4]
    assert np.array_equal(collect(outputs), collect(list(tuned.generate(from_text.request))))


def test_a_checkpoint_of_another_type_begins_again(from_text: Made) -> None:
    """Whatever an engine's facts name makes other numbers: code, weights, libraries, device, threads and type."""
    other = WanEngine(inspect("tiny-wan"), device="cpu", dtype="bfloat16")
    other.load()
    outputs = list(other.generate(from_text.request, resume=from_text.checkpoints[1]))
    assert [output.index for output in outputs if isinstance(output, Step)] == [1, 2, 3, 4]
