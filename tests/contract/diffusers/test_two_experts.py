"""A model with two experts on the diffusers engine, as Wan 2.2 A14B: the second one makes the last steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.engines.base import Engine, Inputs, UInt8Array
from kinema.engines.registry import create_engine
from kinema.errors import ConfigError, InvalidRequest, UnsupportedRequest
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve_alone
from kinema.settings import DiffusersSettings, EngineSettings
from tests.contract.engine import frames_of

pytestmark = pytest.mark.filterwarnings("ignore")

BOUNDARY = 0.9
ASKED = {"prompt": "a cat", "size": "64x64", "num_frames": 5, "num_inference_steps": 3, "seed": 3}


def pipeline() -> Any:
    """The dummy."""
    import torch
    from diffusers import WanPipeline, WanTransformer3DModel

    from tests.dummies.parts import WAN, wan_like

    torch.manual_seed(7)
    parts = wan_like(WanTransformer3DModel(**WAN), transformer_2=WanTransformer3DModel(**WAN))
    return WanPipeline(**parts, boundary_ratio=BOUNDARY)


def tensors(seed: int, prefix: str) -> dict[str, Any]:
    """A LoRA of the attention of all blocks."""
    import torch

    from tests.dummies.parts import WAN

    generator, width = torch.Generator().manual_seed(seed), 24
    return {
        f"{prefix}.blocks.{block}.attn1.{layer}.lora_{matrix}.weight": torch.randn(shape, generator=generator)
        for block in range(WAN["num_layers"])
        for layer in ("to_q", "to_v")
        for matrix, shape in (("A", (2, width)), ("B", (width, 2)))
    }


# The files, and what of them each expert gets.
FILES: Mapping[str, Mapping[str, Any]] = {
    "both": {"transformer": (1, "transformer")},
    "style_high_noise": {"transformer": (2, "transformer")},
    "style_low_noise": {"transformer": (3, "transformer")},
    "named": {"transformer": (4, "transformer"), "transformer_2": (5, "transformer_2")},
    "second": {"transformer_2": (6, "transformer_2")},
    "pair": {"transformer": (7, "transformer")},
    "pair_b": {"transformer": (8, "transformer")},
    "odd": {"transformer": (7, "transformer")},
    "odd_b": {"transformer_2": (8, "transformer_2")},
}
# The second files, by the first ones.
SECONDS = {"pair": "pair_b", "odd": "odd_b"}
EXPERTS = {
    "both": {"transformer": 1, "transformer_2": 1},
    "style_high_noise": {"transformer": 2},
    "style_low_noise": {"transformer_2": 3},
    "named": {"transformer": 4, "transformer_2": 5},
    "second": {"transformer_2": 6},
    "pair": {"transformer": 7, "transformer_2": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("two")
    pipeline().save_pretrained(folder / "model")
    (folder / "loras").mkdir()
    for name, parts in FILES.items():
        content = {key: tensor for seed, prefix in parts.values() for key, tensor in tensors(seed, prefix).items()}
        save_file(content, folder / "loras" / f"{name}.safetensors")
    for name, second in SECONDS.items():
        (folder / "loras" / f"{name}.json").write_text(json.dumps({"second": f"{second}.safetensors"}))
    wrong = tensors(1, "transformer") | {
        key.replace("blocks", "no_blocks"): tensor for key, tensor in tensors(1, "transformer_2").items()
    }
    save_file(wrong, folder / "loras" / "half.safetensors")
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    settings = DiffusersSettings(loras=folder / "loras")
    made = create_engine(
        EngineSettings(
            name="diffusers", model=str(folder / "model"), device="cpu", diffusers=settings, weights_cache_dir=folder
        )
    )
    made.load()
    return made


def made_by(engine: Engine, **options: Any) -> UInt8Array:
    request = resolve_alone(GenerationOptions.model_validate({**ASKED, **options}), engine.capabilities).request
    return frames_of(list(engine.generate(request, Inputs())))


def stock(
    folder: Path, options: Mapping[str, Any], experts: Mapping[str, int], scales: Mapping[str, float]
) -> UInt8Array:
    """The library's own video, with a LoRA of these seeds in its experts."""
    import torch
    from diffusers import WanPipeline

    own = WanPipeline.from_pretrained(folder / "model")
    own.set_progress_bar_config(disable=True)
    for expert, seed in experts.items():
        more = {"load_into_transformer_2": True} if expert == "transformer_2" else {}
        own.load_lora_weights(tensors(seed, "transformer"), adapter_name="one", **more)
        getattr(own, expert).set_adapters(["one"], [scales[expert]])
    made = own(
        prompt="a cat",
        width=64,
        height=64,
        num_frames=5,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **options,
    ).frames[0]
    return (np.asarray(made) * 255).round().astype(np.uint8)


def test_each_expert_has_its_guidance(engine: Engine, folder: Path) -> None:
    """The boundary is the folder's."""
    can = engine.capabilities
    assert can.has_two_experts
    assert can.preset.boundary_ratio == BOUNDARY
    plain, other = (made_by(engine, guidance_scale=4.0, **more) for more in ({}, {"guidance_scale_2": 2.0}))
    assert np.array_equal(plain, stock(folder, {"guidance_scale": 4.0}, {}, {}))
    assert np.array_equal(other, stock(folder, {"guidance_scale": 4.0, "guidance_scale_2": 2.0}, {}, {}))
    assert not np.array_equal(plain, other)
    with pytest.raises(UnsupportedRequest, match=r"boundary_ratio is 0\.9 for"):
        made_by(engine, boundary_ratio=0.5)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_lora_goes_to_the_experts_that_it_is_for(engine: Engine, folder: Path, name: str) -> None:
    """By its tensors, by its name or by its file, each with its strength; else to both. The next video has none."""
    made = made_by(engine, loras=[{"name": name, "scale": 0.7, "scale_2": 0.4}])
    expected = stock(folder, {"guidance_scale": 5.0}, EXPERTS[name], {"transformer": 0.7, "transformer_2": 0.4})
    assert np.array_equal(made, expected)
    assert not np.array_equal(made, made_by(engine))
    (info,) = (info for info in engine.capabilities.loras if info.name == name)
    is_for = {("transformer", "transformer_2"): "both", ("transformer",): "high_noise", ("transformer_2",): "low_noise"}
    assert info.is_for == is_for[tuple(EXPERTS[name])]


def test_a_lora_that_fits_one_of_its_experts_alone_is_refused(engine: Engine) -> None:
    """And leaves nothing in the other one."""
    before = made_by(engine)
    with pytest.raises(InvalidRequest, match="the LoRA half does not fit the model"):
        made_by(engine, loras=[{"name": "half"}])
    assert np.array_equal(made_by(engine), before)


def test_the_files_of_a_pair_name_no_experts(engine: Engine) -> None:
    """Each is for one by its place."""
    with pytest.raises(InvalidRequest, match=r"the LoRA odd has two files, .*: 'transformer_2\.blocks\.0"):
        made_by(engine, loras=[{"name": "odd"}])


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"boundary_ratio": 0.5}, r"boundary_ratio = 0\.5: it is 0\.9 in model_index\.json"),
        ({"guidance_scale_2": "high"}, "guidance_scale_2"),
        ({"guidance_scale_2": -1}, "guidance_scale_2"),
    ],
)
def test_a_kinema_json_that_no_expert_keeps_to_is_refused(
    own: dict[str, Any], sentence: str, folder: Path, tmp_path: Path
) -> None:
    """With its key; so is a boundary of the folder that is no part."""
    (tmp_path / "model").mkdir()
    for one in (folder / "model").iterdir():
        (tmp_path / "model" / one.name).symlink_to(one)
    (tmp_path / "model" / "kinema.json").write_text(json.dumps(own))
    with pytest.raises(ConfigError, match=f"kinema.json.*{sentence}"):
        create_engine(EngineSettings(name="diffusers", model=str(tmp_path / "model"), device="cpu"))
