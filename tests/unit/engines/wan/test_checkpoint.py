"""A checkpoint folder is understood from its small files, and an incomplete one is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from kinema.engines.wan.checkpoint import BUNDLED, inspect
from kinema.engines.wan.fingerprint import weights_digest
from kinema.errors import ConfigError
from kinema.request.geometry import Geometry
from kinema.request.shapes import Size

WAN_21_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
}

UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
LCM = {"_class_name": "FlowMatchLCMScheduler", "shift": 7.0}
WITHOUT_SHIFT = {key: value for key, value in UNIPC.items() if key != "flow_shift"}


def write(folder: Path, name: str, value: object = None) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value if value is not None else {}), encoding="utf-8")


def make_folder(folder: Path, *, index: dict[str, object] | None = None, **transformer: object) -> Path:
    """The files of a checkpoint, with empty weights: nothing here reads them."""
    write(folder, "model_index.json", {"transformer_2": [None, None], **(index or {})})
    write(folder, "transformer/config.json", {**WAN_21_1_3B, **transformer})
    write(folder, "transformer/diffusion_pytorch_model.safetensors")
    write(folder, "vae/config.json", {"scale_factor_spatial": 8, "scale_factor_temporal": 4})
    write(folder, "vae/diffusion_pytorch_model.safetensors")
    write(folder, "text_encoder/config.json")
    write(folder, "text_encoder/model.safetensors.index.json", {"weight_map": {"a": "part-1.safetensors"}})
    write(folder, "text_encoder/part-1.safetensors")
    write(folder, "tokenizer/tokenizer_config.json")
    write(folder, "tokenizer/tokenizer.json")
    write(folder, "scheduler/scheduler_config.json", UNIPC)
    return folder


def test_wan_21_has_the_published_defaults(tmp_path: Path) -> None:
    """81 frames at 16 fps, 832x480, 50 steps, guidance 5; text-to-video only."""
    can = inspect(str(make_folder(tmp_path))).capabilities()
    preset = can.preset
    assert (preset.size, preset.num_frames, preset.fps) == (Size(width=832, height=480), 81, 16)
    assert (preset.num_inference_steps, preset.guidance_scale, preset.flow_shift) == (50, 5.0, 3.0)
    assert preset.negative_prompt
    assert (can.limits.size_multiple, can.limits.max_prompt_tokens) == (16, 512)
    assert can.geometry == Geometry()
    assert (can.is_text_to_video, can.is_image_to_video, can.has_two_experts) == (True, False, False)


@pytest.mark.parametrize("config", [{**UNIPC, "flow_shift": 7.0}, EULER, LCM], ids=str)
@pytest.mark.parametrize(
    "published", [{}, {"expand_timesteps": True}, {"boundary_ratio": 0.9}, {"num_attention_heads": 5}], ids=str
)
def test_the_solvers_own_shift_is_the_default(
    config: dict[str, object], published: dict[str, object], tmp_path: Path
) -> None:
    """Whichever model it is; ``kinema.json`` alone comes before it, and a file that names none leaves the model's."""
    heads = {key: value for key, value in published.items() if key == "num_attention_heads"}
    index = {key: value for key, value in published.items() if key not in heads}
    folder = make_folder(tmp_path, index=index, **heads)

    def shift() -> float:
        return inspect(str(folder)).capabilities().preset.flow_shift

    write(folder, "scheduler/scheduler_config.json", config)
    assert shift() == 7.0
    write(folder, "kinema.json", {"flow_shift": 2.0})
    assert shift() == 2.0
    (folder / "kinema.json").unlink()
    none = {key: value for key, value in config.items() if key not in ("shift", "flow_shift")}
    write(folder, "scheduler/scheduler_config.json", none)
    assert (
        shift()
        == {"{}": 3.0, "expand_timesteps": 5.0, "boundary_ratio": 12.0, "num_attention_heads": 1.0}[
            next(iter(published), "{}")
        ]
    )


def test_ti2v_makes_videos_from_images_too(tmp_path: Path) -> None:
    """expand_timesteps says that a clean first frame can stand among noisy ones."""
    folder = make_folder(tmp_path, index={"expand_timesteps": True})
    write(folder, "vae/config.json", {"scale_factor_spatial": 16, "scale_factor_temporal": 4, "patch_size": 2})
    can = inspect(str(folder)).capabilities()
    assert can.is_image_to_video
    assert (can.preset.size, can.preset.fps) == (Size(width=1280, height=704), 24)
    assert can.limits.size_multiple == 32
    assert (can.geometry.token_pixels, can.geometry.token_frames) == (1024, 4)


def test_two_experts_bring_their_boundary(tmp_path: Path) -> None:
    """boundary_ratio comes from the checkpoint; the second transformer must be there."""
    folder = make_folder(tmp_path, index={"boundary_ratio": 0.875, "transformer_2": ["diffusers", "Wan"]})
    with pytest.raises(ConfigError, match=r"transformer_2/config\.json is missing"):
        inspect(str(folder))
    write(folder, "transformer_2/config.json", WAN_21_1_3B)
    write(folder, "transformer_2/diffusion_pytorch_model.safetensors")
    can = inspect(str(folder)).capabilities()
    assert can.has_two_experts
    assert (can.preset.boundary_ratio, can.preset.guidance_scale_2) == (0.875, 3.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Wan2.1-I2V-14B-480P-Diffusers", ("832x480", 40, 3.0)),
        ("Wan2.1-I2V-14B-720P-Diffusers", ("1280x720", 40, 5.0)),
        ("Wan2.1-FLF2V-14B-720P-diffusers", ("1280x720", 50, 16.0)),
    ],
)
def test_frames_in_channels_make_an_image_to_video_model(
    name: str, expected: tuple[str, int, float], tmp_path: Path
) -> None:
    """Every video begins with a given frame and may end with one; the models of Wan 2.1 differ by their names."""
    index = {"_class_name": "WanImageToVideoPipeline"}
    folder = make_folder(tmp_path / name, index=index, in_channels=36, num_attention_heads=40)
    write(folder, "scheduler/scheduler_config.json", WITHOUT_SHIFT)
    can = inspect(str(folder)).capabilities()
    assert (can.is_text_to_video, can.is_image_to_video, can.is_first_last_frame_to_video) == (False, True, True)
    assert not can.is_video_to_video
    preset = can.preset
    assert (str(preset.size), preset.num_inference_steps, preset.flow_shift) == expected
    assert (preset.guidance_scale, preset.num_frames, preset.fps) == (5.0, 81, 16)


def test_two_experts_with_frames_in_channels_have_their_own_defaults(tmp_path: Path) -> None:
    """Those of Wan 2.2 I2V A14B."""
    index = {"boundary_ratio": 0.9, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    folder = make_folder(tmp_path, index=index, in_channels=36)
    write(folder, "scheduler/scheduler_config.json", WITHOUT_SHIFT)
    write(folder, "transformer_2/config.json", {**WAN_21_1_3B, "in_channels": 36})
    write(folder, "transformer_2/diffusion_pytorch_model.safetensors")
    preset = inspect(str(folder)).capabilities().preset
    assert (preset.boundary_ratio, preset.guidance_scale, preset.guidance_scale_2) == (0.9, 3.5, 3.5)
    assert (preset.num_inference_steps, preset.flow_shift) == (40, 5.0)
    write(folder, "transformer_2/config.json", WAN_21_1_3B)
    with pytest.raises(ConfigError, match=r"transformer_2/config\.json: in_channels = 16, and the first expert has 36"):
        inspect(str(folder))


@pytest.mark.parametrize(
    ("channels", "sentence"),
    [
        (
            {"in_channels": 33},
            "in_channels = 33; the wan engine runs text-to-video with 16, and image-to-video with 36",
        ),
        ({"in_channels": 52}, "in_channels = 52; the wan engine runs"),
        ({"out_channels": 36, "in_channels": 36}, "out_channels = 36, and the VAE has z_dim = 16"),
    ],
)
def test_channels_that_no_known_model_has_are_refused(
    channels: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    """Nobody would know what to put into them."""
    with pytest.raises(ConfigError, match=re.escape(f"transformer/config.json: {sentence}")):
        inspect(str(make_folder(tmp_path, **channels)))


@pytest.mark.parametrize(
    ("kind", "runs"), [("VACE", "the engine diffusers runs"), ("Animate", "no engine of this version runs")]
)
def test_a_kind_of_model_that_wan_does_not_run_is_named(kind: str, runs: str, tmp_path: Path) -> None:
    """By its pipeline and by its transformer, whichever the folder says, with the engine that runs it."""
    for index, name in ((f"Wan{kind}Pipeline", "WanTransformer3DModel"), (None, f"Wan{kind}Transformer3DModel")):
        with pytest.raises(ConfigError, match=f"; the wan engine runs .*, and {runs} Wan {kind}"):
            inspect(str(make_folder(tmp_path, index={"_class_name": index}, _class_name=name)))


def test_another_pipelines_checkpoint_is_refused(tmp_path: Path) -> None:
    """Its parts may have the classes of a Wan model, and mean something else."""
    folder = make_folder(tmp_path, index={"_class_name": "LTXPipeline"})
    with pytest.raises(ConfigError, match=r"model_index\.json: _class_name is 'LTXPipeline'; the wan engine runs WanP"):
        inspect(str(folder))


@pytest.mark.parametrize("name", ["WanDMDPipeline", "WanVACEPipeline", "WanAnimatePipeline", ["WanPipeline"], 5, ""])
def test_a_pipeline_of_the_same_parts_is_refused_by_its_name(name: object, tmp_path: Path) -> None:
    """A distilled model's solver is another one, though all of its files are those of a Wan model."""
    with pytest.raises(ConfigError, match=r"_class_name is .*; the wan engine runs WanPipeline, ") as refused:
        inspect(str(make_folder(tmp_path, index={"_class_name": name})))
    assert repr(name) in refused.value.message


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"vace": ["diffusers", "WanVACE"]}, "'vace' is no part of a Wan pipeline; known are transformer, "),
        (
            {"transformer": ["my_code", "Wan"]},
            "transformer is of the library 'my_code'; only diffusers and transformers",
        ),
        ({"vae": [None, "AutoencoderKLWan"]}, "vae is of the library None"),
        ({"scheduler": [["x"], "y"]}, "scheduler is of the library"),
        ({"tokenizer": []}, "tokenizer is of the library"),
    ],
)
def test_a_part_that_nobody_knows_is_refused_by_its_name(
    index: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    """Nothing of a model is left out, and no code of its own is run."""
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        inspect(str(make_folder(tmp_path, index=index)))


@pytest.mark.parametrize("is_for_another_engine", [True, False], ids=["sglang", "wan"])
@pytest.mark.parametrize(
    "file",
    ["tokenizer/tokenizer_config.json", "text_encoder/config.json", "transformer/config.json"],
)
def test_code_of_a_models_own_is_refused(file: str, is_for_another_engine: bool, tmp_path: Path) -> None:
    """Wherever the libraries would look for it, and for every engine, before any library reads the folder."""
    folder = make_folder(tmp_path)
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    write(folder, file, {**values, "auto_map": {"AutoTokenizer": ["code.py", None]}})
    with pytest.raises(ConfigError, match=f"{file}: auto_map names code of the model's own, which is never run"):
        inspect(str(folder), is_for_another_engine=is_for_another_engine)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
DEEP = "[" * 100_000
LESS_DEEP = "[" * 200 + "]" * 200
JSON_FILES = [
    "model_index.json",
    "kinema.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DEEP, "it is nested too deeply"),
        ('{"a": ' * 100_000, "it is nested too deeply"),
        (f'{{"boundary_ratio": {LESS_DEEP}}}', "it is nested deeper than 16 levels"),
        (" " * 5 * 2**20, "it is larger than 4 MiB"),
        ("[" + "0," * 200_000 + "0]", "it has too many values"),
        (r'{"a": ["\ud800"]}', "it is not valid Unicode: it has a lone surrogate"),
        ('{"a": NaN}', "it is not valid JSON: NaN is not a JSON number"),
        (POINTER, "it is a pointer of Git LFS .*git lfs pull"),
        ("<!DOCTYPE html>", "it is a page of HTML"),
        ("[]", "is not a JSON object"),
        ("\udcff", "can't decode byte"),
    ],
    ids=[
        "lists",
        "objects",
        "a value",
        "size",
        "values",
        "a surrogate",
        "NaN",
        "a pointer",
        "a page",
        "a list",
        "no text",
    ],
)
def test_a_json_file_without_bounds_is_refused(file: str, text: str, reason: str, tmp_path: Path) -> None:
    """Whichever of the checkpoint's files it is, in one short sentence."""
    folder = make_folder(tmp_path)
    (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=f"{file} .*{reason}") as refused:
        inspect(str(folder))
    assert len(refused.value.message) < 400


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "tokenizer/spiece.model"])
def test_a_tokenizer_that_is_too_large_is_refused(file: str, tmp_path: Path) -> None:
    """A library would read all of it."""
    folder = make_folder(tmp_path)
    with (folder / file).open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(ConfigError, match=f"{file} is larger than 128 MiB"):
        inspect(str(folder))


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "tokenizer/spiece.model"])
def test_a_pointer_in_place_of_a_tokenizer_is_refused_at_once(file: str, tmp_path: Path) -> None:
    """As one in place of weights is; a text with a byte order mark is read."""
    folder = make_folder(tmp_path)
    index = folder / "model_index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    inspect(str(folder))
    (folder / file).write_text(POINTER)
    with pytest.raises(ConfigError, match=f"{file} is a pointer of Git LFS .*git lfs pull"):
        inspect(str(folder))


@pytest.mark.parametrize("value", [10**9, 10**30, 1e300, -1, 0, "1e9", None, []], ids=repr)
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps"),
        ("scheduler/scheduler_config.json", "solver_order"),
        ("transformer/config.json", "num_layers"),
        ("transformer/config.json", "num_attention_heads"),
        ("transformer/config.json", "rope_max_seq_len"),
        ("vae/config.json", "z_dim"),
        ("vae/config.json", "num_res_blocks"),
        ("vae/config.json", "dim_mult"),
        ("text_encoder/config.json", "num_layers"),
        ("text_encoder/config.json", "relative_attention_max_distance"),
    ],
)
def test_a_number_that_no_model_has_is_refused(file: str, key: str, value: object, tmp_path: Path) -> None:
    """By its name, before memory is taken for it."""
    folder = make_folder(tmp_path)
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    write(folder, file, {**values, key: value})
    with pytest.raises(ConfigError, match=f"{file}: .*{key}") as refused:
        inspect(str(folder))
    assert len(refused.value.message) < 400


@pytest.mark.parametrize("key", ["flow_shift", "shift_terminal"])
@pytest.mark.parametrize("value", [1e300, -1, 10**40, 1e6, "x"])
def test_a_noise_level_that_no_solver_has_is_refused(key: str, value: object, tmp_path: Path) -> None:
    """Its videos would be noise, or no number."""
    folder = make_folder(tmp_path)
    write(folder, "scheduler/scheduler_config.json", {**UNIPC, key: value})
    with pytest.raises(ConfigError, match=f"scheduler/scheduler_config.json: {key}"):
        inspect(str(folder))


def test_the_second_expert_and_the_text_encoder_are_read_at_once(tmp_path: Path) -> None:
    """Before a service takes jobs, not when their weights are read."""
    folder = make_folder(tmp_path, index={"transformer_2": ["diffusers", "WanTransformer3DModel"]})
    write(folder, "transformer_2/diffusion_pytorch_model.safetensors")
    write(folder, "transformer_2/config.json", {**WAN_21_1_3B, "num_layers": "many"})
    with pytest.raises(ConfigError, match=r"transformer_2/config\.json: num_layers = 'many'"):
        inspect(str(folder))
    write(folder, "transformer_2/config.json", {**WAN_21_1_3B, "_class_name": "WanVACETransformer3DModel"})
    with pytest.raises(ConfigError, match=r"transformer_2/config\.json: _class_name is 'WanVACETransformer3DModel'"):
        inspect(str(folder))
    write(folder, "transformer_2/config.json", WAN_21_1_3B)
    write(folder, "text_encoder/config.json", {"model_type": "t5"})
    with pytest.raises(ConfigError, match=r"text_encoder/config\.json: model_type = 't5'"):
        inspect(str(folder))


def test_a_list_of_shards_may_name_thousands_of_tensors(tmp_path: Path) -> None:
    """More than a body of a client has fields: that of a 14B transformer has 1,095."""
    folder = make_folder(tmp_path)
    shards = {f"layer.{i}": "part-1.safetensors" for i in range(2000)}
    write(folder, "text_encoder/model.safetensors.index.json", {"weight_map": shards})
    assert inspect(str(folder)).capabilities().is_text_to_video


@pytest.mark.parametrize("shard", ["../vae/diffusion_pytorch_model.safetensors", "/etc/hostname", "a/b", ".."])
def test_a_shard_lies_beside_its_list(shard: str, tmp_path: Path) -> None:
    """A list of shards names no other place."""
    folder = make_folder(tmp_path)
    write(folder, "text_encoder/model.safetensors.index.json", {"weight_map": {"a": shard}})
    with pytest.raises(ConfigError, match="is no file beside it"):
        inspect(str(folder))


def test_a_checkpoint_may_say_its_own_preset(tmp_path: Path) -> None:
    """kinema.json has the first word, and a key that it does not know is refused."""
    folder = make_folder(tmp_path)
    write(folder, "kinema.json", {"size": "128x64", "num_frames": 9, "max_pixels": 65536, "description": "small"})
    can = inspect(str(folder)).capabilities()
    assert (str(can.preset.size), can.preset.num_frames, can.preset.guidance_scale) == ("128x64", 9, 5.0)
    assert (can.limits.max_pixels, can.description) == (65536, "small")
    assert can.limits.max_volume == 65536 * can.limits.max_frames


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"num_frame": 9}, "unknown key num_frame"),
        ({"max_pixels": "many"}, "max_pixels = 'many': Input should be a valid integer"),
        ({"max_frames": None}, "max_frames = None: Input should be a valid integer"),
        ({"size": "abc"}, "size 'abc' is not WIDTHxHEIGHT"),
        ({"fps": 0}, "fps = 0: Input should be greater than 0"),
        ({"fps": "16"}, "fps = '16': Input should be a valid integer"),
        ({"max_frames": "81"}, "max_frames = '81': Input should be a valid integer"),
        ({"num_frames": 18}, "num_frames 18 -> 17: must be a multiple of 4 plus 1"),
        ({"num_frames": 201}, "num_frames must be a whole number from 1 to 161"),
        ({"size": "1920x1088"}, "size 1920x1088 has 2088960 pixels; this model makes at most 921600"),
        ({"size": "130x128"}, "size 130x128: both sides must be multiples of 16"),
        ({"num_inference_steps": 500}, "num_inference_steps must be a whole number from 1 to 200"),
        ({"guidance_scale": 99.0}, "guidance_scale must be a number from 0 to 30"),
        ({"max_pixels": 128 * 128, "size": "128x128", "max_volume": 1000}, "81 frames of 128x128 are more than"),
        ({"description": 5}, "description = 5: Input should be a valid string"),
    ],
)
def test_a_preset_that_does_not_fit_is_refused_in_one_sentence(
    own: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    """It names the file and the key."""
    write(make_folder(tmp_path), "kinema.json", own)
    with pytest.raises(ConfigError) as refused:
        inspect(str(tmp_path)).capabilities()
    assert refused.value.message.startswith(f"the model folder {tmp_path}: kinema.json: {sentence}")
    assert "\n" not in refused.value.message


def test_a_checkpoint_may_have_tiers(tmp_path: Path) -> None:
    """Each has what its table says; whole numbers are numbers too."""
    draft = {"timesteps": [1000, 500.5], "guidance_scale": 1, "solver": "lcm", "loras": [{"name": "fast", "scale": 1}]}
    quick = {"num_inference_steps": 4, "flow_shift": 5, "description": "Four steps."}
    write(make_folder(tmp_path), "kinema.json", {"tiers": {"draft": draft, "quick": quick}})
    first, second = inspect(str(tmp_path)).capabilities().tiers
    assert (first.name, first.timesteps, first.guidance_scale, first.solver) == ("draft", (1000.0, 500.5), 1.0, "lcm")
    assert [(lora.name, lora.scale, lora.scale_2) for lora in first.loras] == [("fast", 1.0, None)]
    assert (second.name, second.num_inference_steps, second.flow_shift) == ("quick", 4, 5.0)
    assert second.description == "Four steps."


@pytest.mark.parametrize(
    ("tier", "sentence"),
    [
        (5, "'draft' must be an object without a name in it"),
        ({"name": "other"}, "'draft' must be an object without a name in it"),
        ({"steps": 4}, "'draft': unknown key steps"),
        ({"num_inference_steps": -4}, "'draft': num_inference_steps = -4: Input should be greater than 0"),
        ({"num_inference_steps": "4"}, "'draft': num_inference_steps = '4': Input should be a valid integer"),
        ({"num_inference_steps": 500}, "draft: num_inference_steps must be a whole number from 1 to 200"),
        ({"num_inference_steps": 2, "timesteps": [9, 3]}, "draft: give num_inference_steps or timesteps, and not both"),
        ({"timesteps": []}, "'draft': timesteps = []: "),
        ({"timesteps": [250, 500]}, "draft: timesteps must fall from at most 1000 to more than 0"),
        ({"timesteps": [1500, 500]}, "draft: timesteps must fall from at most 1000 to more than 0"),
        ({"solver": "heun"}, "draft: solver 'heun' is not known; accepted: unipc, euler, lcm"),
        ({"guidance_scale": 99}, "draft: guidance_scale must be a number from 0 to 30"),
        ({"guidance_scale_2": 1}, "draft: guidance_scale_2 is for models with two experts"),
        ({"flow_shift": 0}, "draft: flow_shift must be a number from 0.01 to 100"),
        ({"loras": [{"name": "a"}, {"name": "a"}]}, "draft: loras must be at most 4, each once"),
        ({"loras": [{"name": "a", "scale": 11}]}, "'draft': loras.0.scale = 11: "),
        ({"loras": [{"name": "a", "scale_2": 1}]}, "draft: scale_2 is for models with two experts"),
        ({"loras": [{"scale": 1}]}, "'draft': loras.0.name is missing"),
        ({"loras": [{"name": "a", "path": "/a"}]}, "'draft': unknown key loras.0.path"),
    ],
)
def test_a_tier_that_makes_no_sense_is_refused(tier: object, sentence: str, tmp_path: Path) -> None:
    """At the start, in one sentence."""
    write(make_folder(tmp_path), "kinema.json", {"tiers": {"draft": tier}})
    with pytest.raises(ConfigError) as refused:
        inspect(str(tmp_path)).capabilities()
    assert refused.value.message.startswith(f"the model folder {tmp_path}: kinema.json: tiers.{sentence}")
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("tiers", [[], {"a@b": {}}, {"": {}}, {"a b": {}}, {"a:b": {}}])
def test_a_table_of_tiers_has_names_that_a_model_may_have_behind_it(tiers: object, tmp_path: Path) -> None:
    write(make_folder(tmp_path), "kinema.json", {"tiers": tiers})
    with pytest.raises(ConfigError, match=r"kinema\.json: tiers"):
        inspect(str(tmp_path)).capabilities()


WITHOUT_HEADS = {key: value for key, value in WAN_21_1_3B.items() if key != "num_attention_heads"}


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("model_index.json", {"boundary_ratio": "half"}, "boundary_ratio = 'half'"),
        ("transformer/config.json", WITHOUT_HEADS, "num_attention_heads is missing"),
        ("transformer/config.json", {**WAN_21_1_3B, "patch_size": 2}, "patch_size = 2"),
        ("vae/config.json", {"scale_factor_spatial": "eight"}, "scale_factor_spatial = 'eight'"),
        ("text_encoder/model.safetensors.index.json", {"a": "part-1.safetensors"}, "weight_map is missing"),
        ("text_encoder/model.safetensors.index.json", {"weight_map": ["part-1"]}, r"weight_map = \['part-1'\]"),
        ("scheduler/scheduler_config.json", {"flow_shift": 3.0}, "_class_name is None"),
        (
            "scheduler/scheduler_config.json",
            {**UNIPC, "_class_name": "FlowMatchHeunDiscreteScheduler"},
            "_class_name is 'FlowMatchHeunDiscreteScheduler'; the wan engine runs UniPCMultistepScheduler, "
            "FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler",
        ),
        ("scheduler/scheduler_config.json", {**EULER, "use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ("scheduler/scheduler_config.json", {**EULER, "use_karras_sigmas": True}, "use_karras_sigmas = True"),
        ("scheduler/scheduler_config.json", {**EULER, "use_exponential_sigmas": True}, "use_exponential_sigmas = True"),
        ("scheduler/scheduler_config.json", {**EULER, "use_beta_sigmas": True}, "use_beta_sigmas = True"),
        ("scheduler/scheduler_config.json", {**EULER, "invert_sigmas": True}, "invert_sigmas = True"),
        ("scheduler/scheduler_config.json", {**EULER, "shift": 0}, "shift = 0"),
        ("scheduler/scheduler_config.json", {**LCM, "scale_factors": [0.5]}, r"scale_factors"),
        ("scheduler/scheduler_config.json", {**UNIPC, "prediction_type": "epsilon"}, "prediction_type = 'epsilon'"),
        ("scheduler/scheduler_config.json", {**UNIPC, "use_flow_sigmas": False}, "use_flow_sigmas = False"),
        ("scheduler/scheduler_config.json", {**UNIPC, "use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ("scheduler/scheduler_config.json", {"_class_name": UNIPC["_class_name"]}, "prediction_type is missing"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_file_and_field(
    file: str, values: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    """One sentence in place of a traceback, or of a video that would be noise."""
    write(make_folder(tmp_path), file, values)
    with pytest.raises(ConfigError, match=f"{file}: {sentence}"):
        inspect(str(tmp_path))


def test_a_folder_is_served_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it lies on the server is not shown to clients."""
    folder = make_folder(tmp_path / "my-wan")
    monkeypatch.chdir(folder)
    for name in (str(folder), ".", "../my-wan/", str(folder / "vae" / "..")):
        assert inspect(name).capabilities().model == "my-wan"


def test_a_folder_of_the_hubs_cache_has_the_name_of_the_hub(tmp_path: Path) -> None:
    """Not that of a commit; and a link has its own name, wherever it leads."""
    commit = "0fad780a534b6463e45facd96134c9f345acfa5b"
    folder = make_folder(tmp_path / "hub" / "models--Wan-AI--Wan2.1-T2V--x" / "snapshots" / commit)
    assert inspect(str(folder)).capabilities().model == "Wan-AI/Wan2.1-T2V--x"
    (tmp_path / "current").symlink_to(folder)
    assert inspect(str(tmp_path / "current")).capabilities().model == "current"
    other = make_folder(tmp_path / "snapshots" / commit)
    assert inspect(str(other)).capabilities().model == commit


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/part-1.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_an_incomplete_folder_is_refused_by_the_missing_name(missing: str, tmp_path: Path) -> None:
    """The message names the file, so that it can be fetched."""
    (make_folder(tmp_path) / missing).unlink()
    with pytest.raises(ConfigError, match=f"{missing} is missing"):
        inspect(str(tmp_path))


def test_broken_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    """Broken JSON, another architecture, and a model that sees pictures without its image encoder are each said."""
    folder = make_folder(tmp_path, in_channels=36, image_dim=1280, added_kv_proj_dim=1536)
    with pytest.raises(ConfigError, match="names no image_encoder"):
        inspect(str(folder))
    write(folder, "transformer/config.json", {"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(ConfigError, match="FluxTransformer2DModel"):
        inspect(str(folder))
    (folder / "model_index.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model_index\.json cannot be read"):
        inspect(str(folder))


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_weights_that_another_library_quantised_are_refused(component: str, tmp_path: Path) -> None:
    """By the library's name. A transformer's file in their place is read all the same."""
    folder = make_folder(tmp_path)
    file = folder / component / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}}
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **quantised}), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{component}/config.json: .* are quantised by 'bitsandbytes'"):
        inspect(str(folder))
    if component == "transformer":
        with pytest.raises(ConfigError, match="no such file"):
            inspect(str(folder), files={"transformer": tmp_path / "other.safetensors"})


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c"])
def test_a_name_that_is_nothing_is_refused(name: str) -> None:
    """A path that does not exist is no hub name; the message says what would be accepted."""
    with pytest.raises(ConfigError, match="tiny-wan"):
        inspect(name)


def test_the_bundled_model_is_whole() -> None:
    """The package carries every file of its model, makes text-to-video and image-to-video, and stays small."""
    can = inspect("tiny-wan").capabilities()
    assert can.is_text_to_video
    assert can.is_image_to_video
    sizes = [file.stat().st_size for file in BUNDLED["tiny-wan"].rglob("*") if file.is_file()]
    assert sum(sizes) <= 25_000_000
    assert max(sizes) <= 15_000_000


def test_the_bundled_image_to_video_model_ships_its_transformer_alone() -> None:
    """It takes a first frame, and maybe a last one; all else is tiny-wan's, and is not shipped twice."""
    found, base = inspect("tiny-wan-i2v"), BUNDLED["tiny-wan"]
    can = found.capabilities()
    assert (can.is_text_to_video, can.is_image_to_video, can.is_first_last_frame_to_video) == (False, True, True)
    assert found.weight_files("transformer")[0].is_relative_to(BUNDLED["tiny-wan-i2v"])
    for component in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert found.root_of(component) == base
    files = [file for file in BUNDLED["tiny-wan-i2v"].rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3_400_000


def with_base(folder: Path, *own: str) -> Path:
    """A folder whose base is tiny-wan, with copies of these components."""
    folder.mkdir()
    origin = BUNDLED["tiny-wan"]
    shutil.copy(origin / "model_index.json", folder)
    (folder / "kinema.json").write_text('{"base": "tiny-wan", "num_frames": 5}', encoding="utf-8")
    for component in own:
        shutil.copytree(origin / component, folder / component)
    return folder


def test_a_base_has_the_components_that_a_folder_lacks(tmp_path: Path) -> None:
    """The model is the same as with copies of them, by its digest too; its defaults are its own."""
    shared = inspect(str(with_base(tmp_path / "shared", "scheduler")))
    copies = inspect(
        str(with_base(tmp_path / "copies", "scheduler", "transformer", "vae", "text_encoder", "tokenizer"))
    )
    assert shared.root_of("scheduler") == tmp_path / "shared"
    assert shared.root_of("vae") == BUNDLED["tiny-wan"]
    assert shared.capabilities().preset == copies.capabilities().preset
    assert shared.capabilities().preset.num_frames == 5
    assert shared.stored_bytes == copies.stored_bytes
    assert weights_digest(shared) == weights_digest(copies) == weights_digest(inspect("tiny-wan"))


def test_a_component_that_a_folder_has_in_part_is_not_the_bases(tmp_path: Path) -> None:
    """A missing file is a missing file, whatever the base has."""
    folder = with_base(tmp_path / "model", "vae")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"vae/diffusion_pytorch_model\.safetensors is missing"):
        inspect(str(folder))


@pytest.mark.parametrize("base", ["/etc", "..", "org/model", "tiny-wan-i2v", "", 7, ["tiny-wan"], {}])
def test_a_base_is_a_whole_model_of_the_package(tmp_path: Path, base: object) -> None:
    """A folder names no other place of the machine, starts no download, and leads to no chain."""
    folder = with_base(tmp_path / "model")
    (folder / "kinema.json").write_text(json.dumps({"base": base}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"kinema.json: base = .* it may be one of: tiny-wan$"):
        inspect(str(folder))


PACKAGES = {"transformers": "transformers", "sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


@pytest.mark.parametrize("absent", [["sentencepiece"], ["google.protobuf"], list(PACKAGES)], ids=str)
def test_a_sentencepiece_model_alone_needs_what_converts_it(
    absent: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the start would end in an error about tiktoken, after all weights were read."""
    folder = make_folder(tmp_path)
    (folder / "tokenizer/tokenizer.json").rename(folder / "tokenizer/spiece.model")
    monkeypatch.setattr("kinema.engines.wan.tokenizer_files.find_spec", lambda name: None if name in absent else name)
    packages = " ".join(PACKAGES[name] for name in absent)
    with pytest.raises(ConfigError, match=rf"spiece\.model and no tokenizer\.json, .*; pip install {packages}$"):
        inspect(str(folder))
    absent.clear()
    assert inspect(str(folder)).name == folder.name


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "transformer/wan2.1_t2v_1.3B_fp16.safetensors"),
        ("transformer/config.json", "Transformer/config.json"),
        ("transformer/config.json", "transformer/Config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/vae-ft.safetensors"),
        ("tokenizer/tokenizer.json", "tokenizer/sentencepiece.bpe.model"),
        ("model_index.json", "Wan2.1_VAE.pth"),
        ("model_index.json", "inner/model_index.json"),
    ],
)
def test_a_file_under_another_name_is_named(name: str, instead: str, tmp_path: Path) -> None:
    """ "Incomplete" would send its owner to download again what is there."""
    folder = make_folder(tmp_path)
    if instead.startswith("Transformer"):
        (folder / "transformer").rename(folder / "Transformer")
    else:
        (folder / instead).parent.mkdir(exist_ok=True)
        (folder / name).rename(folder / instead)
    with pytest.raises(ConfigError, match=rf"has no {re.escape(name)}, and has .*{re.escape(instead)}") as refused:
        inspect(str(folder))
    assert "incomplete" not in refused.value.message


def test_weights_in_float32_by_name_are_read(tmp_path: Path) -> None:
    """As a variant, when nothing else is there."""
    folder = make_folder(tmp_path)
    plain = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_suffix(".fp32.safetensors"))
    assert [file.name for file in inspect(str(folder)).weight_files("transformer")] == [
        "diffusion_pytorch_model.fp32.safetensors"
    ]


def test_a_model_for_two_pictures_says_so_itself(tmp_path: Path) -> None:
    """Whatever its folder is called: FLF2V has a table of positions for them."""
    given = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 1536, "pos_embed_seq_len": 514}
    folder = make_folder(tmp_path / "ours", index={"image_encoder": ["transformers", "CLIPVisionModel"]}, **given)
    write(folder, "image_encoder/config.json", {"hidden_size": 1280, "num_attention_heads": 16, "patch_size": 14})
    write(folder, "image_encoder/model.safetensors")
    write(folder, "image_processor/preprocessor_config.json")
    write(folder, "scheduler/scheduler_config.json", WITHOUT_SHIFT)
    preset = inspect(str(folder)).capabilities().preset
    assert (str(preset.size), preset.num_inference_steps, preset.flow_shift) == ("1280x720", 50, 16.0)


def test_what_a_checkpoint_states_and_the_engine_does_not_go_by_is_said(tmp_path: Path) -> None:
    """One sentence each; nothing is said of a checkpoint that agrees."""
    folder = make_folder(tmp_path, index={"transformer_2": ["diffusers", "Wan"], "boundary_ratio": 0.9})
    write(folder, "transformer_2/config.json", WAN_21_1_3B)
    write(folder, "transformer_2/diffusion_pytorch_model.safetensors")
    write(folder, "tokenizer/tokenizer_config.json", {"model_max_length": 512})
    assert list(inspect(str(folder)).differences()) == []
    write(folder, "tokenizer/tokenizer_config.json", {"model_max_length": 226})
    write(folder, "model_index.json", {"transformer_2": ["diffusers", "Wan"]})
    experts, tokens = inspect(str(folder)).differences()
    assert "two transformers and no boundary_ratio, so the second one takes no step" in experts
    assert "model_max_length is 226; prompts are read up to 512 tokens" in tokens
    write(folder, "kinema.json", {"boundary_ratio": 0.5})
    assert list(inspect(str(folder)).differences()) == [tokens]
