"""A folder says which pipeline it is for, and what that makes is known without torch."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from kinema.engines.diffusers.families import FAMILIES, Family
from kinema.engines.diffusers.model_folder import inspect
from kinema.engines.diffusers.signatures import signature_of
from kinema.engines.registry import capabilities_of, create_engine, known_models, with_engine
from kinema.errors import ConfigError, UnsupportedRequest
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings, WanSettings
from tests.unit.engines.wan.tiny import tiny_with

SERVED = [family for family in FAMILIES if family.needs is None]
# What a pipeline without a row must be told.
TOLD = {
    "size": "512x512",
    "num_frames": 17,
    "fps": 8,
    "num_inference_steps": 20,
    "guidance_scale": 5.0,
    "frame_step": 4,
}


def folder(root: Path, pipeline: object, overrides: dict[str, Any] | None = None, **components: object) -> Path:
    """A folder with the JSON files of a model; its components have no weights."""
    path = root / "model"
    for name in ("scheduler", *components):
        (path / name).mkdir(parents=True, exist_ok=True)
    (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **components}))
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": 7.0}))
    if overrides is not None:
        (path / "kinema.json").write_text(json.dumps(overrides))
    return path


@pytest.mark.parametrize("family", SERVED, ids=[family.name for family in SERVED])
def test_each_row_makes_its_own_preset(family: Family, tmp_path: Path) -> None:
    """And the installed library has its pipelines, with the arguments that the row names."""
    can = inspect(str(folder(tmp_path, family.pipelines[0]))).capabilities()
    assert (can.engine, can.has_checkpoints, can.has_previews, can.is_interleaved) == ("diffusers", False, False, True)
    assert (can.preset.num_frames, can.limits.max_prompt_tokens) == (family.preset.num_frames, family.prompt_tokens)
    assert can.preset.flow_shift == 7.0
    for pipeline in (family.text, family.image, family.first_last, family.film):
        if pipeline is not None:
            signature = signature_of(pipeline)
            assert signature is not None
            assert {*family.names.values(), *family.always} <= signature.arguments
            assert signature.has_bar


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_each_row_is_of_the_installed_library(family: Family) -> None:
    """Its classes are there, also those whose inputs no request has, and read as much of a prompt as it says."""
    signatures = [signature_of(pipeline) for pipeline in family.pipelines]
    assert all(signatures)
    said = [one.prompt_tokens for one in signatures if one is not None and one.prompt_tokens is not None]
    assert not said or min(said) == family.prompt_tokens


def test_a_class_belongs_to_one_row() -> None:
    """So a folder is one kind of checkpoint."""
    named = [pipeline for family in FAMILIES for pipeline in family.pipelines]
    assert len(named) == len(set(named))


def test_a_row_that_needs_more_than_a_request_has_is_refused(tmp_path: Path) -> None:
    """In one sentence, which says what."""
    with pytest.raises(ConfigError, match="ConsisID needs a picture of a face with its features"):
        inspect(str(folder(tmp_path, "ConsisIDPipeline")))


def test_an_unknown_class_says_what_is_missing(tmp_path: Path) -> None:
    """All keys of kinema.json that must be there."""
    path = folder(tmp_path, "I2VGenXLPipeline", {"size": "512x512", "fps": 8})
    with pytest.raises(
        ConfigError, match=r"that says num_frames, num_inference_steps, guidance_scale, frame_step is missing"
    ):
        inspect(str(path))


def test_an_unknown_class_runs_from_its_signature(tmp_path: Path) -> None:
    """With its frame rule and preset from kinema.json."""
    path = folder(tmp_path, "I2VGenXLPipeline", {**TOLD, "frame_offset": 0, "num_frames": 16, "max_frames": 32})
    can = inspect(str(path)).capabilities()
    assert (can.is_text_to_video, can.is_image_to_video, can.is_video_to_video) == (True, True, False)
    assert (can.limits.frame_step, can.limits.frame_offset, can.limits.max_frames) == (4, 0, 32)
    assert resolve(GenerationOptions(prompt="a cat", num_frames=9), can).request.num_frames == 8
    assert (can.geometry.token_pixels, can.geometry.token_frames) == (256, 4)


@pytest.mark.parametrize(
    ("pipeline", "pixels", "frames", "parts"),
    [
        ("LTXPipeline", 1024, 8, {161: 1}),
        ("MochiPipeline", 256, 6, {19: 1}),
        ("AnimateDiffPipeline", 64, 1, {16: 1}),
        ("HeliosPipeline", 256, 4, {33: 1, 129: 4}),
        ("HunyuanVideoFramepackPipeline", 256, 4, {37: 1, 109: 3}),
        ("SkyReelsV2DiffusionForcingPipeline", 256, 4, {97: 1, 177: 2, 257: 3}),
    ],
)
def test_a_row_says_how_its_videos_are_counted(
    pipeline: str, pixels: int, frames: int, parts: dict[int, int], tmp_path: Path
) -> None:
    """Its tokens, and the parts of a long video; a pipeline decodes in one turn."""
    geometry = inspect(str(folder(tmp_path, pipeline))).capabilities().geometry
    assert (geometry.token_pixels, geometry.token_frames, geometry.chunk_frames) == (pixels, frames, None)
    assert {length: geometry.num_parts(length) for length in parts} == parts


def test_a_solver_without_a_shift_gives_none(tmp_path: Path) -> None:
    """And a request that asks for one is refused; with a shift there is no other."""
    path = folder(tmp_path, "AnimateDiffPipeline")
    with pytest.raises(UnsupportedRequest, match="flow_shift is 7 for model here; leave it out"):
        resolve(GenerationOptions(prompt="a cat", flow_shift=3.0), inspect(str(path)).capabilities())
    (path / "scheduler" / "scheduler_config.json").write_text("{}")
    can = inspect(str(path)).capabilities()
    assert can.preset.flow_shift is None
    with pytest.raises(UnsupportedRequest, match="model has no flow_shift; leave it out"):
        resolve(GenerationOptions(prompt="a cat", flow_shift=3.0), can)


def test_an_unknown_class_that_needs_more_is_refused(tmp_path: Path) -> None:
    """Its signature says what."""
    with pytest.raises(ConfigError, match="Kandinsky6SRPipeline needs video, which requests of this version do not"):
        inspect(str(folder(tmp_path, "Kandinsky6SRPipeline", TOLD)))


def test_a_pipeline_whose_steps_are_not_known_is_refused(tmp_path: Path) -> None:
    """It draws its loops by another bar than the library's, so it could only run as a whole."""
    with pytest.raises(ConfigError, match="AnyFlowFARPipeline', which does not say when a step is done"):
        inspect(str(folder(tmp_path, "AnyFlowFARPipeline", TOLD)))


@pytest.mark.parametrize("pipeline", ["NoSuchPipeline", ["my_pipeline", "MyPipeline"], None, 7])
def test_no_code_of_a_folder_is_run(pipeline: object, tmp_path: Path) -> None:
    """A class that the library does not have is none."""
    with pytest.raises(ConfigError, match="the installed diffusers has no such pipeline"):
        inspect(str(folder(tmp_path, pipeline, TOLD)))


def test_components_are_of_the_libraries(tmp_path: Path) -> None:
    """Or of diffusers' own pipelines; a module of another name would be imported."""
    components = {"transformer": ["diffusers", "LTX2VideoTransformer3DModel"], "connectors": ["ltx2", "LTX2Connectors"]}
    inspect(str(folder(tmp_path, "LTX2Pipeline", **components)))
    for library in ("os", "../ltx2", "ltx2.pipeline_ltx2", None, 3):
        with pytest.raises(ConfigError, match=re.escape(f"vae is of the library {library!r}")):
            inspect(str(folder(tmp_path, "LTX2Pipeline", vae=[library, "Vae"])))


def test_a_prompt_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    """Where the pipeline takes no negative prompt."""
    can = inspect(str(folder(tmp_path, "HunyuanVideoPipeline"))).capabilities()
    with pytest.raises(UnsupportedRequest, match="negative_prompt is not set for model here; leave it out"):
        resolve(GenerationOptions(prompt="a cat", negative_prompt="grey"), can)


def test_a_size_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    """The VAE of Allegro decodes others in part."""
    can = inspect(str(folder(tmp_path, "AllegroPipeline"))).capabilities()
    with pytest.raises(UnsupportedRequest, match="size 640x360: this model makes 1280x720 alone"):
        resolve(GenerationOptions(prompt="a cat", size="640x360"), can)


def test_auto_is_wan_where_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else diffusers; the log says why."""
    caplog.set_level("INFO", "kinema.engines.registry")
    assert with_engine(EngineSettings()).name == "wan"
    path = str(folder(tmp_path, "LTXPipeline"))
    assert create_engine(EngineSettings(model=path)).capabilities.engine == "diffusers"
    assert caplog.messages == [
        "engine.name = 'auto': the engine is diffusers, since the model's pipeline is LTXPipeline"
    ]
    assert capabilities_of(EngineSettings(model=path, served_name="films")).model == "films"
    assert [can.engine for can, _ in known_models(EngineSettings(model=path))] == ["wan", "wan", "diffusers"]


def test_auto_is_diffusers_for_a_wan_model_that_wan_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Here for its solver, which diffusers has. What neither runs is wan's to refuse."""
    caplog.set_level("INFO", "kinema.engines.registry")
    path = tiny_with(tmp_path / "model", {})
    (path / "kinema.json").unlink()  # whose tiers are wan's
    (path / "scheduler").unlink()
    (path / "scheduler").mkdir()
    config = {"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert create_engine(EngineSettings(model=str(path))).capabilities.engine == "diffusers"
    (said,) = caplog.messages
    assert "the engine is diffusers, since wan does not run it: the model folder" in said
    assert "_class_name is 'DPMSolverMultistepScheduler'" in said
    (path / "vae").unlink()
    assert with_engine(EngineSettings(model=str(path))).name == "wan"


def test_what_wan_alone_has_chooses_it(tmp_path: Path) -> None:
    """Rather than be ignored."""
    path = str(folder(tmp_path, "LTXPipeline"))
    assert with_engine(EngineSettings(model=path, wan=WanSettings(step_cache=True))).name == "wan"


def test_a_folder_without_a_part_is_refused(tmp_path: Path) -> None:
    """Before a library is imported: without the part's folder, and without the weights of a network."""
    path = folder(tmp_path, "LTXPipeline", vae=["diffusers", "AutoencoderKLLTXVideo"])
    (path / "vae" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"vae/diffusion_pytorch_model\.safetensors"):
        inspect(str(path))
    shutil.rmtree(path / "vae")
    with pytest.raises(ConfigError, match=r"model_index\.json names vae, and that folder is missing"):
        inspect(str(path))


def test_packages_of_one_pipeline_are_named(tmp_path: Path) -> None:
    """With what brings them."""
    path = str(folder(tmp_path, "Cosmos2_5_PredictBasePipeline"))
    with pytest.raises(ConfigError, match=r"diffusers needs the package \w+ for it; pip install \w+"):
        create_engine(EngineSettings(model=path))


@pytest.mark.parametrize(
    ("name", "num_frames", "loops"),
    [
        ("LTX-Video", 161, 1),
        ("Helios", 33, 1),
        ("Helios", 129, 4),
        ("HunyuanVideo FramePack", 37, 1),
        ("HunyuanVideo FramePack", 109, 3),
        ("SkyReels V2 diffusion forcing", 97, 1),
        ("SkyReels V2 diffusion forcing", 177, 2),
        ("SkyReels V2 diffusion forcing", 257, 3),
        ("Wan Animate", 77, 1),
        ("Wan Animate", 153, 2),
        ("Wan Animate", 157, 3),
    ],
)
def test_the_loops_of_a_long_video_are_known(name: str, num_frames: int, loops: int) -> None:
    """By the windows in which the pipeline makes it."""
    family = next(family for family in FAMILIES if family.name == name)
    assert family.num_loops(num_frames) == loops


def test_the_page_has_each_row() -> None:
    """With its defaults and a checkpoint, or with what it needs."""
    page = (Path(__file__).parents[4] / "docs" / "models.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        if family.needs is not None:
            assert f"| {family.name} | {family.needs} | {family.checkpoint} | {family.licence} |" in page
            continue
        has = family.preset
        values = (has.size, has.num_frames, has.fps, has.num_inference_steps, f"{has.guidance_scale:g}")
        defaults = " | ".join(map(str, values))
        size = "" if family.weights_gb is None else "{:.1f} + {:.1f}".format(*family.weights_gb)
        origin = f"{family.checkpoint} | {size} | {family.licence}"
        assert f"| {family.name} | {', '.join(family.modes)} | {defaults} | {origin} |" in page


@pytest.mark.parametrize(
    ("pipeline", "network", "config", "expected"),
    [
        ("CogVideoXPipeline", "transformer", {"sample_height": 96, "sample_width": 170}, ("1360x768", 49)),
        ("CogVideoXImageToVideoPipeline", "transformer", {"sample_frames": 81}, ("720x480", 81)),
        ("AnimateDiffPipeline", "unet", {"sample_size": 96}, ("768x768", 16)),
        ("StableVideoDiffusionPipeline", "unet", {"num_frames": 14, "sample_size": 96}, ("1024x576", 14)),
        ("LattePipeline", "transformer", {"sample_size": 32}, ("256x256", 16)),
    ],
)
def test_what_a_checkpoint_states_comes_before_its_kind(
    pipeline: str, network: str, config: dict[str, int], expected: tuple[str, int], tmp_path: Path
) -> None:
    """CogVideoX 1.5 has the pipeline of CogVideoX; ``kinema.json`` comes before both."""
    path = folder(tmp_path, pipeline)
    for part in (network, "vae"):
        (path / part).mkdir()
    (path / network / "config.json").write_text(json.dumps(config))
    (path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8, 8, 8]}))
    preset = inspect(str(path)).capabilities().preset
    assert (str(preset.size), preset.num_frames) == expected
    (path / "kinema.json").write_text(json.dumps({"size": "512x512"}))
    assert str(inspect(str(path)).capabilities().preset.size) == "512x512"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"sample_height": 61, "sample_width": 90}, "a size of 720x488"),
        ({"sample_height": 4000, "sample_width": 4000}, "a size of 32000x32000"),
        ({"sample_frames": 50}, "a num_frames of 50"),
    ],
)
def test_what_a_checkpoint_states_and_its_kind_does_not_make_is_said(
    config: dict[str, int], said: str, tmp_path: Path
) -> None:
    """And the default is that of the kind."""
    path = folder(tmp_path, "CogVideoXPipeline")
    (path / "transformer").mkdir()
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    model = inspect(str(path))
    preset = model.capabilities().preset
    assert (str(preset.size), preset.num_frames) == ("720x480", 49)
    (sentence,) = model.stated.differences
    assert f"is for {said}, which this kind of model does not make here; the default is" in sentence


def test_tiers_are_left_out_and_said(tmp_path: Path) -> None:
    """A model of the engine wan has its other values here too."""
    path = tiny_with(tmp_path / "tiers", {"draft": {"num_inference_steps": 4}})
    model = inspect(str(path))
    can = model.capabilities()
    assert (can.tiers, str(can.preset.size)) == ((), "128x128")
    assert model.stated.differences[0].endswith("has tiers, which are for the engine wan and not offered here")


@pytest.mark.parametrize(
    ("pipeline", "told", "reason"),
    [
        ("LTXPipeline", {"max_pixels": None}, "kinema.json: max_pixels = None: Input should be a valid integer"),
        ("LTXPipeline", {"max_frames": {}}, "kinema.json: max_frames = {}: Input should be a valid integer"),
        (
            "LTXPipeline",
            {"max_pixels": 9},
            "kinema.json: max_pixels = 9 and min_side = 64: the smallest size, 64x64, has 4096",
        ),
        (
            "LTXPipeline",
            {"max_pixels": 4096},
            "kinema.json: size 704x480 has 337920 pixels; this model makes at most 4096",
        ),
        ("LTXPipeline", {"guidance_scale_2": 3}, "kinema.json has guidance_scale_2, for a model with two experts"),
        ("LTXPipeline", {"frame_step": 4}, "kinema.json: frame_step = 4: it is 8 for every LTX-Video; leave it out"),
        ("LTXPipeline", {"size_multiple": "x"}, "kinema.json: size_multiple = 'x': it is 32 for every LTX-Video"),
        ("FluxPipeline", TOLD, "FluxPipeline takes no num_frames, so it makes no videos here"),
    ],
    ids=[
        "null",
        "an object",
        "no size",
        "its own size",
        "no second",
        "another rule",
        "another type",
        "a pipeline of pictures",
    ],
)
def test_what_a_folder_says_is_true_or_refused(
    pipeline: str, told: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Also where nobody would ask for it; what a row says itself may be said again."""
    with pytest.raises(ConfigError, match=re.escape(reason)):
        inspect(str(folder(tmp_path, pipeline, told))).capabilities()
    assert inspect(str(folder(tmp_path, "LTXPipeline", {"frame_step": 8}))).capabilities().limits.frame_step == 8


@pytest.mark.parametrize("shift", [0, -1, 1e999, True, "3", [3]])
def test_a_shift_that_is_no_number_above_0_is_refused(shift: object, tmp_path: Path) -> None:
    """At the start, as with wan; null is none."""
    path = folder(tmp_path, "LTXPipeline")
    config = path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"flow_shift": None}))
    assert inspect(str(path)).flow_shift is None
    config.write_text(json.dumps({"flow_shift": shift}))
    with pytest.raises(ConfigError, match=r"scheduler_config\.json"):
        inspect(str(path))


@pytest.mark.parametrize("family", SERVED, ids=[family.name for family in SERVED])
def test_sides_are_whole_tokens(family: Family) -> None:
    """A network that cuts its latents into patches fails for half of one; that of Cosmos 3 fills it up."""
    assert family.size_multiple % family.token_side == 0 or family.name == "Cosmos 3"
