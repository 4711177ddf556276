"""``kinema bench diffusers``, with random weights of a tiny size and the configs of published ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kinema.bench.app import app
from kinema.bench.diffusers.architectures import ARCHITECTURES, Architecture
from kinema.bench.diffusers.overhead import measure
from kinema.bench.diffusers.random_pipeline import draw, family_named, make_network
from kinema.engines.diffusers.model_folder import Model
from kinema.settings import EngineSettings

pytestmark = pytest.mark.filterwarnings("ignore")

PUBLISHED = [name for name in ARCHITECTURES if name != "tiny"]
VIDEO = {"size": "64x64", "num_frames": 1, "num_inference_steps": 2}
_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
# The same classes, a few numbers wide.
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "hunyuanvideo-1.5": {
        "transformer": {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "rope_axes_dim": (2, 2, 4),
            "text_embed_dim": 16,
            "text_embed_2_dim": 16,
            "image_embed_dim": 16,
            "target_size": 32,
        },
        "vae": {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8, 8), "layers_per_block": 1},
        "text_encoder": {
            **_TEXT,
            "vocab_size": 4000,
            "num_hidden_layers": 4,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        "text_encoder_2": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    },
    "ltx-2": {
        "transformer": {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": 16,
        },
        "connectors": {
            "caption_channels": 16,
            "text_proj_in_factor": 3,
            "connector_rope_base_seq_len": 32,
            **{
                f"{kind}_connector_{name}": value
                for kind in ("video", "audio")
                for name, value in (
                    ("num_attention_heads", 2),
                    ("attention_head_dim", 8),
                    ("num_layers", 1),
                    ("num_learnable_registers", None),
                )
            },
        },
        "vae": {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (16, 32, 64),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1),
        },
        "audio_vae": {
            "base_channels": 4,
            "ch_mult": (1,),
            "num_res_blocks": 1,
            "resolution": 32,
            "latent_channels": 2,
            "mel_bins": 8,
        },
        "vocoder": {
            "in_channels": 16,
            "hidden_channels": 8,
            "upsample_kernel_sizes": [4, 4],
            "upsample_factors": [2, 2],
            "resnet_kernel_sizes": [3],
            "resnet_dilations": [[1, 3, 5]],
        },
        "text_encoder": {
            "text_config": {**_TEXT, "vocab_size": 4000, "num_hidden_layers": 2, "head_dim": 8},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 16,
            },
            "mm_tokens_per_image": 4,
        },
    },
}


def small(name: str) -> Architecture:
    made = ARCHITECTURES[name]
    components = {
        part: replace(one, config={**one.config, **SMALL[name].get(part, {})}) for part, one in made.components.items()
    }
    return replace(made, components=components)


def test_the_command_compares_the_engine_with_the_library(tmp_path: Path) -> None:
    """Both make the same frames; the parts add up to the whole."""
    path = tmp_path / "report.json"
    arguments = ["diffusers", "--architecture", "tiny", "--device", "cpu", "--size", "64x64", "--frames", "9"]
    result = CliRunner().invoke(app, [*arguments, "--steps", "3", "--runs", "1", "--output", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["is_same"] is True
    for name in ("engine", "stock"):
        times = report[name]
        assert times["video_s"] == pytest.approx(
            times["first_step_s"] + 2 * times["step_s"] + times["decode_s"], rel=0.05
        )
    assert report["ratios"]["video_s"] == pytest.approx(report["engine"]["video_s"] / report["stock"]["video_s"])
    assert "the frames are the same, bit for bit" in result.output


@pytest.mark.parametrize("name", [*SMALL])
def test_the_pipeline_of_an_architecture_makes_a_video(name: str) -> None:
    """Its components fit each other, offloaded too."""
    architecture = small(name)
    family = family_named(architecture.family)
    model = Model(name, Path(), {"_class_name": family.pipelines[0]}, family, {}, flow_shift=None)

    def build(_model: Model, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
        return draw(architecture, device, dtype, vae_dtype)

    settings = EngineSettings(device="cpu", offload="blocks")
    report = measure(model, build, settings, VIDEO, 1)
    assert (report.is_same, report.num_inference_steps, report.pipeline) == (True, 2, family.pipelines[0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_architecture_has_the_published_size(name: str) -> None:
    """As the table of families has it, in billions of parameters; a meta device has no memory for them."""
    architecture = ARCHITECTURES[name]
    sizes = {"transformer": 0.0, "text_encoder": 0.0}
    for part, component in architecture.components.items():
        kind = next((key for key in sizes if part.startswith(key)), None)
        if kind is not None:
            network = make_network(component, torch.device("meta"), torch.bfloat16)
            sizes[kind] += sum(one.numel() for one in network.parameters()) / 1e9
    assert (*sizes.values(),) == pytest.approx(family_named(architecture.family).billions, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "give one of --model and --architecture"),
        (("--model", "tiny-wan", "--architecture", "tiny"), "give one of --model and --architecture"),
        (("--architecture", "wan-9"), "--architecture 'wan-9' is not known; give one of: tiny, "),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], reason: str) -> None:
    """In a sentence."""
    result = CliRunner().invoke(app, ["diffusers", *arguments], env={"COLUMNS": "200"})
    assert (result.exit_code, reason in " ".join(result.output.split())) == (2, True), result.output
