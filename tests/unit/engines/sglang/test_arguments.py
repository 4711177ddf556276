"""Settings and requests in the library's words."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.engines.sglang.arguments import (
    arguments_of,
    capabilities_of,
    check_request,
    environment_of,
    num_gpus,
    parameters_of,
    refused_tiers,
)
from kinema.engines.sglang.facts import lora_facts
from kinema.engines.wan.checkpoint import Checkpoint, inspect
from kinema.errors import ConfigError, InvalidRequest, UnsupportedRequest
from kinema.request.options import GenerationOptions
from kinema.request.request import GenerationRequest
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings
from tests.unit.engines.wan.test_checkpoint import EULER, make_folder, with_base, write

IMAGE_TO_VIDEO = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "num_attention_heads": 40}


def settings(**values: object) -> EngineSettings:
    """On a GPU, with the library's own pipelines."""
    return EngineSettings.model_validate({"name": "sglang", "device": "cuda", **values})


def checkpoint(folder: Path, *, pipeline: str = "WanPipeline", **transformer: object) -> Checkpoint:
    made = make_folder(folder, index={"_class_name": pipeline}, **transformer)
    return inspect(str(made), is_for_another_engine=True)


def make_request(model: Checkpoint, **options: object) -> GenerationRequest:
    asked = GenerationOptions.model_validate({"prompt": "a cat", "seed": 3, **options})
    return resolve(asked, capabilities_of(model, settings())).request


def test_every_value_of_a_request_is_said(tmp_path: Path) -> None:
    """None of the library's own defaults has a word in a video; it writes no file."""
    parameters = parameters_of(make_request(checkpoint(tmp_path), negative_prompt=""), {})
    shape = {"width": 832, "height": 480, "num_frames": 81}
    assert parameters == {
        **shape,
        "prompt": "a cat",
        "negative_prompt": "",
        "fps": 16,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "seed": 3,
        "adjust_frames": False,
        "save_output": False,
        "return_frames": True,
        "suppress_logs": True,
        "diffusers_kwargs": {**shape, "negative_prompt": ""},
    }


def test_a_first_frame_goes_by_its_path(tmp_path: Path) -> None:
    """The library takes no other."""
    request = make_request(checkpoint(tmp_path))
    assert parameters_of(request, {"first_frame": Path("/x/first.png")})["image_path"] == "/x/first.png"


def test_settings_go_to_the_arguments_of_the_same_meaning(tmp_path: Path) -> None:
    """All that the engine has, beside what is the same for every video."""
    chosen = settings(
        dtype="bfloat16",
        vae_dtype="float16",
        sglang={
            "num_gpus": 4,
            "tp_size": 2,
            "sp_degree": 2,
            "ulysses_degree": 2,
            "cfg_parallel": False,
            "attention": "torch_sdpa",
            "lora": "some/lora",
            "lora_scale": 0.5,
            "offload": True,
        },
    )
    assert arguments_of(checkpoint(tmp_path), chosen) == {
        "model_path": str(tmp_path.resolve()),
        "backend": "sglang",
        "num_gpus": 4,
        "tp_size": 2,
        "sp_degree": 2,
        "ulysses_degree": 2,
        "enable_cfg_parallel": False,
        "attention_backend": "torch_sdpa",
        "lora_path": "some/lora",
        "lora_scale": 0.5,
        "dit_precision": "bf16",
        "vae_precision": "fp16",
        "dit_cpu_offload": True,
        "text_encoder_cpu_offload": True,
        "image_encoder_cpu_offload": True,
        "vae_cpu_offload": True,
        "flow_shift": 3.0,
        "warmup_mode": "off",
        "log_level": "warning",
    }


def test_what_is_not_set_is_the_librarys_choice(tmp_path: Path) -> None:
    """But for the backend and the precision, which it would choose badly."""
    assert arguments_of(checkpoint(tmp_path), settings(device="cpu")) == {
        "model_path": str(tmp_path.resolve()),
        "backend": "diffusers",
        "num_gpus": 1,
        "dit_precision": "fp32",
        "warmup_mode": "off",
        "log_level": "warning",
    }


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({}, 1),
        ({"sglang": {"tp_size": 2}}, 2),
        ({"sglang": {"tp_size": 2, "ulysses_degree": 2}}, 4),
        ({"sglang": {"sp_degree": 4, "ulysses_degree": 2}}, 4),
        ({"sglang": {"tp_size": 2, "cfg_parallel": True}}, 4),
        ({"sglang": {"num_gpus": 8, "tp_size": 2}}, 8),
    ],
)
def test_so_many_gpus_are_taken_as_the_degrees_make(values: dict[str, object], count: int) -> None:
    """Unless their number is said."""
    assert num_gpus(settings(**values)) == count


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"device": "cuda:1", "sglang": {"tp_size": 2}}, "engine.device = 'cuda:1': 2 GPUs for one video"),
        ({"sglang": {"backend": "diffusers", "tp_size": 2}}, "engine.sglang.num_gpus, tp_size"),
        ({"device": "cpu", "sglang": {"lora": "some/lora"}}, "engine.sglang.lora: these are for SGLang's own"),
        ({"device": "cpu", "sglang": {"attention": "fa"}}, "engine.sglang.attention: these are for SGLang's own"),
    ],
)
def test_settings_without_an_effect_are_refused(values: dict[str, object], sentence: str, tmp_path: Path) -> None:
    """At the start, by name."""
    with pytest.raises(ConfigError, match=sentence):
        arguments_of(checkpoint(tmp_path), settings(**values))


def test_its_process_speaks_on_this_machine_alone_and_sees_the_named_device() -> None:
    """As far as the library lets us say so."""
    assert environment_of(settings(device="cpu"))["CUDA_VISIBLE_DEVICES"] == ""
    assert environment_of(settings(device="cuda:3"))["CUDA_VISIBLE_DEVICES"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in environment_of(settings())
    assert environment_of(settings())["NCCL_SOCKET_IFNAME"] == "lo"


def test_what_it_does_not_offer_is_said(tmp_path: Path) -> None:
    """No turns, checkpoints, previews, films; presets are ours, and what the library fixes is fixed."""
    can = capabilities_of(checkpoint(tmp_path), settings())
    assert (can.engine, can.is_text_to_video, can.is_image_to_video) == ("sglang", True, False)
    assert [can.is_interleaved, can.has_checkpoints, can.has_previews, can.is_video_to_video] == [False] * 4
    (warning,) = resolve(GenerationOptions(prompt="a cat", preview_every=2), can).warnings
    assert warning.startswith("preview_every was ignored: ")
    assert (can.preset.num_frames, can.preset.fps, can.fixed_options) == (81, 16, ("flow_shift",))
    with pytest.raises(UnsupportedRequest, match="flow_shift is 3 for"):
        resolve(GenerationOptions(prompt="a cat", flow_shift=5.0), can)
    assert resolve(GenerationOptions(prompt="a cat", flow_shift=3.0), can).request.flow_shift == 3.0


def test_tiers_that_the_library_does_not_run_are_not_offered(tmp_path: Path) -> None:
    """Each with a reason; a request with such steps is refused."""
    tiers = {
        "quick": {"num_inference_steps": 8, "solver": "unipc", "flow_shift": 3},
        "euler": {"solver": "euler"},
        "listed": {"timesteps": [1000, 500]},
        "distilled": {"loras": [{"name": "fast"}]},
        "shifted": {"flow_shift": 8},
    }
    model = checkpoint(tmp_path)
    write(tmp_path, "kinema.json", {"tiers": tiers})
    model = inspect(str(tmp_path))
    assert [tier.name for tier in capabilities_of(model, settings()).tiers] == ["quick"]
    refused = refused_tiers(model, settings())
    assert refused["euler"] == "its solver is euler, and the sglang engine runs unipc"
    assert list(refused) == ["euler", "listed", "distilled", "shifted"]
    request = make_request(model, tier="quick")
    assert parameters_of(request, {})["num_inference_steps"] == 8
    check_request(request)
    for changes in ({"solver": "euler"}, {"timesteps": (1000.0,) * 8}):
        with pytest.raises(InvalidRequest, match="runs unipc with even steps"):
            check_request(request.model_copy(update=changes))


def test_an_image_to_video_model_needs_a_picture(tmp_path: Path) -> None:
    """With the published defaults. The library looks at the image encoder itself, where the wan engine asks for it."""
    folder = make_folder(tmp_path, index={"_class_name": "WanImageToVideoPipeline"}, **IMAGE_TO_VIDEO)
    with pytest.raises(ConfigError, match="names no image_encoder"):
        inspect(str(folder))
    can = capabilities_of(inspect(str(folder), is_for_another_engine=True), settings())
    assert (can.is_text_to_video, can.is_image_to_video) == (False, True)
    assert (can.preset.num_frames, can.preset.fps, can.preset.guidance_scale) == (81, 16, 5.0)


def test_another_solver_than_the_librarys_is_refused(tmp_path: Path) -> None:
    """It would compute UniPC without a word."""
    folder = checkpoint(tmp_path).path
    write(folder, "scheduler/scheduler_config.json", EULER)
    with pytest.raises(
        ConfigError, match="'FlowMatchEulerDiscreteScheduler'; the sglang engine runs UniPCMultistepSch"
    ):
        capabilities_of(inspect(str(folder), is_for_another_engine=True), settings())


def test_a_pipeline_that_the_library_does_not_have_is_refused(tmp_path: Path) -> None:
    """By its name."""
    with pytest.raises(ConfigError, match="_class_name is 'WanVACEPipeline'"):
        capabilities_of(checkpoint(tmp_path, pipeline="WanVACEPipeline"), settings())


def test_a_model_with_parts_of_another_is_refused(tmp_path: Path) -> None:
    """The library reads one folder."""
    with pytest.raises(ConfigError, match=r"kinema\.json: base names another model's parts"):
        capabilities_of(inspect(str(with_base(tmp_path / "model")), is_for_another_engine=True), settings())


@pytest.mark.parametrize(
    ("index", "vae_scale", "name"),
    [
        ({}, 8, None),
        ({"expand_timesteps": True}, 16, "Wan2.2-TI2V-5B-Diffusers"),
        ({"expand_timesteps": True}, 8, None),
    ],
)
def test_a_folder_is_known_by_what_is_in_it(
    index: dict[str, object], vae_scale: int, name: str | None, tmp_path: Path
) -> None:
    """The library goes by names; a TI2V model with another VAE than the published one would come out half as large."""
    folder = make_folder(tmp_path, index={"_class_name": "WanPipeline", **index})
    (folder / "vae/config.json").write_text(f'{{"scale_factor_spatial": {vae_scale}}}')
    found = inspect(str(folder))
    assert arguments_of(found, settings()).get("model_id") == name
    assert capabilities_of(found, settings()).is_image_to_video == (name is not None)


def test_a_lora_is_known_by_its_bytes(tmp_path: Path) -> None:
    """A manifest names no path; one of the hub is known by its name."""
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    one = lora_facts(settings(sglang={"lora": str(file)}))
    assert one == lora_facts(settings(sglang={"lora": str(tmp_path)}))
    file.write_bytes(b"two")
    assert one != lora_facts(settings(sglang={"lora": str(file)}))
    assert lora_facts(settings(sglang={"lora": "some/lora", "lora_scale": 0.5})) == {"lora": "some/lora x 0.5"}
    assert lora_facts(settings()) == {}
