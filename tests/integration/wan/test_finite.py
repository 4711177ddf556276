"""Weights that are damaged, and a solver that makes no sense, are named at once; an overflow costs no video."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.engines.base import NO_INPUTS, Frames, Inputs, Output, Step, UInt8Array
from kinema.engines.wan.checkpoint import inspect
from kinema.engines.wan.decode import decode
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.outbox import Outbox
from kinema.engines.wan.vae.decoder import VaeDecoder
from kinema.errors import EngineFailed, InvalidRequest
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest, LoraUse
from kinema.request.resolve import resolve
from kinema.request.shapes import Size
from tests.integration.wan.random_checkpoints import make_vae, save_i2v22, save_ti2v, save_two_experts
from tests.integration.wan.taken import own_vae

FILM = np.random.default_rng(5).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
Change = Callable[[Tensor], Tensor]


def changed(origin: Path, folder: Path, component: str, name: str, change: Change) -> Path:
    """A copy of a checkpoint in which one tensor is another."""
    folder.mkdir()
    for path in origin.iterdir():
        if path.name != component:
            (folder / path.name).symlink_to(path)
    (folder / component).mkdir()
    for path in (origin / component).iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, folder / component / path.name)
        else:
            (folder / component / path.name).symlink_to(path)
    return folder


def with_solver(origin: Path, folder: Path, **settings: object) -> Path:
    """The checkpoint with other settings of its solver."""
    changed(origin, folder, "scheduler", "", nan)
    config = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text()) | settings
    config.unlink()
    config.write_text(json.dumps(values))
    return folder


def nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan)


def loaded(model: object, vae_dtype: str = "auto") -> WanEngine:
    engine = WanEngine(inspect(str(model)), device="cpu", vae_dtype=vae_dtype)
    engine.load()
    return engine


def make_request(engine: WanEngine, **values: object) -> GenerationRequest:
    asked = {"prompt": "a red circle moving right", "num_inference_steps": 3, "seed": 3, "num_frames": 5}
    options = GenerationOptions.model_validate({"size": "64x64", **asked, **values})
    return resolve(options, engine.capabilities).request


def collect(outputs: list[Output]) -> UInt8Array:
    return np.concatenate([output.data for output in outputs if isinstance(output, Frames)])


def failure(engine: WanEngine, request: GenerationRequest, inputs: Inputs = NO_INPUTS) -> tuple[list[Output], str]:
    """What comes before the error, and its sentence."""
    outputs: list[Output] = []
    with pytest.raises(EngineFailed) as caught:
        outputs.extend(engine.generate(request, inputs))
    return outputs, caught.value.message


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is in order: it takes prompts, first frames and films."""
    return save_ti2v(tmp_path_factory.mktemp("checkpoints") / "whole")


@pytest.fixture(scope="module")
def engine(whole: Path) -> WanEngine:
    return loaded(whole)


@pytest.mark.parametrize(
    ("component", "name", "change", "part"),
    [
        ("transformer", "proj_out.bias", nan, "transformer"),
        ("transformer", "proj_out.weight", lambda weight: torch.full_like(weight, 3e38), "transformer"),
        ("text_encoder", "encoder.final_layer_norm.weight", nan, "text encoder"),
    ],
    ids=["NaN", "too large", "text"],
)
def test_damaged_weights_are_named_at_the_first_step(
    component: str, name: str, change: Change, part: str, whole: Path, tmp_path: Path
) -> None:
    """And no step of such a video is told of."""
    broken = loaded(changed(whole, tmp_path / "model", component, name, change))
    outputs, message = failure(broken, make_request(broken))
    assert outputs == []
    assert message == f"The {part} gave values that are not finite, noticed at step 1 of 3: its weights are damaged."


def test_a_lora_that_is_too_strong_is_named(whole: Path, tmp_path: Path) -> None:
    """It is the request's fault, not the model's, whose next video is made."""
    transformer = inspect(str(whole)).transformer
    rows, columns = 4 * transformer.out_channels, transformer.width
    huge = {"lora_A": torch.full((2, columns), 1e30), "lora_B": torch.full((rows, 2), 1e30)}
    save_file(
        {f"transformer.proj_out.{key}.weight": value for key, value in huge.items()}, tmp_path / "huge.safetensors"
    )
    engine = WanEngine(inspect(str(whole)), device="cpu", loras=tmp_path)
    engine.load()
    (info,) = engine.loras.described(["huge"])
    request = make_request(engine).model_copy(update={"loras": (LoraUse(name="huge", digest=info.digest, scale=1),)})
    with pytest.raises(InvalidRequest, match=r"LoRAs of the request \(huge\) the transformer gave .*less scale"):
        list(engine.generate(request))
    assert isinstance(list(engine.generate(make_request(engine)))[-1], Frames)


def test_a_damaged_encoder_is_named_by_who_needs_it(whole: Path, tmp_path: Path, engine: WanEngine) -> None:
    """A first frame and a film; a video from text alone is what it was."""
    broken = loaded(changed(whole, tmp_path / "model", "vae", "encoder.conv_in.bias", nan))
    edit = make_request(broken).model_copy(update={"strength": 0.7})
    for request, inputs in ((make_request(broken), Inputs(FILM[0])), (edit, Inputs(film=FILM))):
        outputs, message = failure(broken, request, inputs)
        assert outputs == []
        assert message.startswith("The VAE's encoder gave values that are not finite, noticed at step 1 of ")
    expected = collect(list(engine.generate(make_request(engine))))
    assert np.array_equal(collect(list(broken.generate(make_request(broken)))), expected)


def test_a_damaged_encoder_is_named_by_frames_in_channels(tmp_path: Path) -> None:
    """The latents are noise there, and finite until the first step has read the channels."""
    whole = save_i2v22(tmp_path / "whole")
    broken = loaded(changed(whole, tmp_path / "model", "vae", "encoder.conv_in.bias", nan))
    options = GenerationOptions(prompt="a red circle", size="64x64", num_frames=5, num_inference_steps=3)
    request = resolve(options, broken.capabilities, Size(width=64, height=64)).request
    outputs, message = failure(broken, request, Inputs(FILM[0], FILM[1]))
    assert outputs == []
    assert message.startswith("The VAE's encoder gave values that are not finite, noticed at step 1 of 3")


@pytest.mark.parametrize("vae_dtype", ["float32", "bfloat16", "float16"])
def test_a_damaged_decoder_is_named_without_advice(vae_dtype: str, whole: Path, tmp_path: Path) -> None:
    """No other type would help, whichever is set."""
    broken = loaded(changed(whole, tmp_path / "model", "vae", "decoder.conv_in.bias", nan), vae_dtype)
    outputs, message = failure(broken, make_request(broken, num_inference_steps=1, num_frames=1))
    assert outputs == [Step(1, 1)]
    assert message.startswith("The VAE's decoder gave values that are not finite: its weights are damaged")
    assert "vae_dtype" not in message


def test_a_second_expert_is_named_at_its_first_step(tmp_path: Path) -> None:
    """Its steps come late; a video that takes turns with it and does not need it is what it is alone."""
    whole = save_two_experts(tmp_path / "whole")
    broken = loaded(changed(whole, tmp_path / "model", "transformer_2", "proj_out.bias", nan))
    healthy = make_request(broken, seed=4).model_copy(update={"boundary_ratio": 0.0})
    alone = collect(list(broken.generate(healthy)))
    failing = broken.generate(make_request(broken).model_copy(update={"boundary_ratio": 0.9, "flow_shift": 12.0}))
    beside = broken.generate(healthy)
    outputs, steps = [next(beside)], [next(failing), next(failing)]
    with pytest.raises(EngineFailed, match=r"The transformer_2 gave .* at step 3 of 3"):
        next(failing)
    assert steps == [Step(1, 3), Step(2, 3)]
    assert np.array_equal(collect([*outputs, *beside]), alone)


def test_a_damaged_word_fails_who_uses_it(whole: Path, tmp_path: Path, engine: WanEngine) -> None:
    """Others, which take turns with that video, are what they are with whole weights."""
    word = engine.parts.tokenizer.tokens("circle")[0]

    def damage(table: Tensor) -> Tensor:
        table[word] = torch.nan
        return table

    broken = loaded(changed(whole, tmp_path / "model", "text_encoder", "shared.weight", damage))
    expected = collect(list(engine.generate(make_request(engine, prompt="a red sky"))))
    beside = broken.generate(make_request(broken, prompt="a red sky"))
    outputs = [next(beside)]
    assert failure(broken, make_request(broken, prompt="a circle"))[1].startswith("The text encoder gave values")
    assert np.array_equal(collect([*outputs, *beside]), expected)


def test_a_solver_that_makes_no_sense_is_named_before_a_step(whole: Path, tmp_path: Path, engine: WanEngine) -> None:
    """The last step divides by nothing, unless it is the first; a video of one step is made."""
    broken = loaded(with_solver(whole, tmp_path / "model", lower_order_final=False))
    outputs, message = failure(broken, make_request(broken, flow_shift=100.0))
    assert outputs == []
    assert message == (
        "The solver's settings give values that are not finite at step 3 of 3: the model's scheduler_config.json makes "
        "no sense with num_inference_steps = 3 and flow_shift = 100."
    )
    one = {"num_inference_steps": 1}
    expected = collect(list(engine.generate(make_request(engine, **one))))
    assert np.array_equal(collect(list(broken.generate(make_request(broken, **one)))), expected)


def test_one_step_has_nothing_to_stretch(whole: Path, tmp_path: Path) -> None:
    """Two have."""
    stretched = loaded(with_solver(whole, tmp_path / "model", shift_terminal=0.5))
    assert "at step 1 of 1" in failure(stretched, make_request(stretched, num_inference_steps=1))[1]
    assert len(collect(list(stretched.generate(make_request(stretched, num_inference_steps=2))))) == 5


@pytest.mark.parametrize("flow_shift", [0.01, 100.0])
@pytest.mark.parametrize("settings", [{"solver_type": "bh1"}, {"final_sigmas_type": "sigma_min"}], ids=str)
def test_settings_at_their_bounds_make_a_video(
    flow_shift: float, settings: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    """What looks odd and can be computed is computed."""
    odd = loaded(with_solver(whole, tmp_path / "model", **settings))
    assert len(collect(list(odd.generate(make_request(odd, flow_shift=flow_shift))))) == 5


@pytest.fixture(scope="module")
def half() -> VaeDecoder:
    torch.manual_seed(5)
    return VaeDecoder(own_vae(make_vae(is_patched=True)), torch.float16)


def bright(first: int, frames: int = 3) -> Tensor:
    """Latents (1, 4, f, 2, 2) that float16 cannot hold from the frame ``first`` on."""
    latents = torch.randn(1, 4, frames, 2, 2, generator=torch.Generator().manual_seed(1))
    latents[:, :, first:] *= 1e6
    return latents


@torch.inference_mode()
def chunks(decoder: VaeDecoder, latents: Tensor) -> list[bytes]:
    found = list(decode(decoder, latents, Outbox()))
    assert [(chunk.index, chunk.total) for chunk in found] == [(i + 1, 3) for i in range(3)]
    return [chunk.data.tobytes() for chunk in found]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_an_overflow_of_float16_goes_on_in_bfloat16(
    first: int, half: VaeDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    """Each chunk is wholly of one type: the first ones, which were handed out, stay."""
    latents = bright(first)
    assert chunks(half, latents) == chunks(half, bright(3))[:first] + chunks(half.in_bfloat16(), latents)[first:]
    assert f"chunks {first + 1} to 3 are of bfloat16" in caplog.text


@torch.inference_mode()
def test_films_beside_an_overflow_are_what_they_are_alone(half: VaeDecoder) -> None:
    """The other films stay in float16, those that take turns with it and those after it."""
    alone = chunks(half, bright(3))
    turns = zip(decode(half, bright(3), Outbox()), decode(half, bright(1), Outbox()), strict=True)
    assert [chunk.data.tobytes() for chunk, _ in turns] == alone
    assert chunks(half, bright(3)) == alone


def test_a_video_in_float16_does_not_fail(whole: Path, tmp_path: Path) -> None:
    """The weights of the decoder are so large that float16 overflows: the frames are nearly those of float32."""
    folder = changed(whole, tmp_path / "model", "vae", "decoder.conv_in.weight", lambda weight: weight * 1e5)
    made = []
    for vae_dtype in ("float16", "float32"):
        engine = loaded(folder, vae_dtype)
        made.append(collect(list(engine.generate(make_request(engine, num_inference_steps=1)))))
    assert np.abs(made[0].astype(int) - made[1].astype(int)).mean() < 3
