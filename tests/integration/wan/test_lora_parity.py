"""Videos with LoRAs are those of diffusers' own way: ``load_lora_weights`` and ``set_adapters``, which is PEFT's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinema.engines.wan.checkpoint import Checkpoint, inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.tensors import write_tensors
from kinema.engines.wan.transformer.shapes import shapes
from tests.integration.wan.random_checkpoints import save_two_experts, save_wan21
from tests.integration.wan.test_lora_reading import BLOCKS, dotted, pairs_for
from tests.integration.wan.test_loras import asked
from tests.integration.wan.test_parity import MAX_DIFFERENCE, ours, run

pytestmark = pytest.mark.usefixtures("one_thread")

SCALES = {"style": 0.8, "face": -0.5, "slow": 0.6, "far": 0.3}
_TEXT_BLOCKS = {ours: theirs for ours, theirs in BLOCKS.items() if ".add_" not in ours}


@pytest.fixture(scope="module", params=[save_wan21, save_two_experts], ids=["one", "two experts"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    save: Callable[[Path], Path] = request.param
    return inspect(str(save(tmp_path_factory.mktemp("checkpoint") / "model")))


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four LoRAs, as diffusers, ComfyUI and kohya's scripts write them, and one whose scale is in its metadata."""
    folder = tmp_path_factory.mktemp("loras")
    names = shapes(checkpoint.transformer)
    every = {name.removesuffix(".weight"): shape for name, shape in names.items() if len(shape) == 2}
    attention = {name: shape for name, shape in every.items() if ".attn1." in name}
    write_tensors(folder / "style.safetensors", _by_diffusers(every, 4, seed=0), {})
    with_alpha = dotted("diffusion_model.", "lora_down", "lora_up", _TEXT_BLOCKS, has_alpha=True)
    write_tensors(folder / "face.safetensors", with_alpha(_small(pairs_for(names, _TEXT_BLOCKS))), {})
    _save_by_diffusers(folder / "slow.safetensors", _by_diffusers(every, 2, seed=1), rank=2, alpha=3)
    write_tensors(folder / "far.safetensors", _by_diffusers(attention, 16, seed=2), {})
    return folder


def _by_diffusers(layers: Mapping[str, tuple[int, ...]], rank: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (outs, ins) in layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = 0.3 * torch.randn(rank, ins, generator=generator)
        tensors[f"transformer.{name}.lora_B.weight"] = 0.3 * torch.randn(outs, rank, generator=generator)
    return tensors


def _small(pairs: Mapping[str, tuple[Tensor, Tensor, float]]) -> dict[str, tuple[Tensor, Tensor, float]]:
    return {name: (0.2 * down, 0.2 * up, alpha / 8) for name, (down, up, alpha) in pairs.items()}


def _save_by_diffusers(path: Path, tensors: Mapping[str, Tensor], rank: int, alpha: int) -> None:
    from diffusers import WanPipeline
    from peft import LoraConfig

    layers = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    modules = sorted({name.partition(".lora_")[0] for name in layers})
    WanPipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=layers,
        weight_name=path.name,
        transformer_lora_adapter_metadata=LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules).to_dict(),
    )


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint, folder: Path) -> WanEngine:
    made = WanEngine(checkpoint, device="cpu", dtype="float32", loras=folder)
    made.load()
    return made


@pytest.fixture(scope="module")
def pipeline(checkpoint: Checkpoint, folder: Path) -> Any:
    """diffusers' pipeline, whose transformers have all LoRAs, none of them switched on."""
    from diffusers import WanPipeline

    made = WanPipeline.from_pretrained(str(checkpoint.path), dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # there are several adapters, and shall be
        for name in SCALES:
            for number in range(len(checkpoint.transformers)):
                made.load_lora_weights(
                    folder, weight_name=f"{name}.safetensors", adapter_name=name, load_into_transformer_2=number == 1
                )
    return made


@pytest.mark.parametrize("guidance", [4.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("names", [["style"], ["face"], ["slow"], ["style", "face"], list(SCALES)], ids="-".join)
def test_the_video_is_that_of_diffusers(
    checkpoint: Checkpoint, engine: WanEngine, pipeline: Any, names: list[str], guidance: float
) -> None:
    scales = {"transformer": [SCALES[name] for name in names]}
    if len(checkpoint.transformers) > 1:
        scales["transformer_2"] = [scale / 2 for scale in scales["transformer"]]
    request = asked(engine, *zip(names, *scales.values(), strict=True), guidance_scale=guidance)
    for transformer, strengths in scales.items():
        getattr(pipeline, transformer).set_adapters(names, strengths)
    made, theirs = ours(engine, request), run(pipeline, request)
    assert np.abs(made - theirs).max() < MAX_DIFFERENCE
    assert np.abs(made - ours(engine, request.model_copy(update={"loras": ()}))).max() > 10 * MAX_DIFFERENCE
