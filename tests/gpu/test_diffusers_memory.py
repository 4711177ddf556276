"""What makes the diffusers engine take less memory, or less time, on a GPU: quantised weights, transformers in files of
their own, compiled blocks, and what lies in the host's memory beside each of these.

The models are random, and wide enough that their weights are more than the rest and suit the kernels.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kinema.engines.base import Engine, UInt8Array
from kinema.engines.diffusers.engine import DiffusersEngine
from kinema.engines.diffusers.families import Family
from kinema.engines.diffusers.memory import Savings
from kinema.engines.diffusers.model_folder import Model
from kinema.engines.registry import create_engine
from kinema.engines.wan.lora.library import LoraLibrary
from kinema.errors import ConfigError
from kinema.settings import DiffusersSettings, EngineSettings
from tests.contract.diffusers.test_contract_of_families import MODES, SERVED
from tests.contract.diffusers.test_families import inputs_for, request_for
from tests.contract.diffusers.test_loras import LTX as LORA_ROW
from tests.contract.diffusers.test_loras import asked, make_lora
from tests.contract.engine import begin, frames_of, make_all
from tests.dummies import parts, texts
from tests.dummies.pipelines import make

pytestmark = pytest.mark.filterwarnings("ignore")

DEVICE = "cuda"
FAMILIES = ["wan", "ltx"]
QUANTISERS = ["torchao_int8", "torchao_fp8", "bitsandbytes_8bit", "bitsandbytes_4bit"]
# The width of the texts, and of the transformers: of four heads, and of whole blocks of every kind of numbers.
TEXTS, WIDTH, NUM_LAYERS = 64, 256, 4
# What weights of so many bits take of the memory of those in bfloat16: embeddings and the like are not quantised.
SHARE_OF_8_BITS, SHARE_OF_4_BITS = 0.65, 0.45
# A row of Q8_0 has whole blocks of so many numbers.
GGUF_BLOCK = 32
# Errors of layers in a row add up as a root: four blocks have about twenty.
DEPTH = 20**0.5


def wan() -> Any:
    from diffusers import WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    size = {**parts.WAN, "attention_head_dim": WIDTH // 4, "num_attention_heads": 4, "num_layers": NUM_LAYERS}
    transformer = WanTransformer3DModel(**{**size, "text_dim": TEXTS, "freq_dim": 64, "ffn_dim": 4 * WIDTH})
    made = parts.wan_like(transformer, text_encoder=UMT5EncoderModel(UMT5Config(**_t5())).eval())
    return WanPipeline(**made)


def ltx() -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    channels = 64
    return LTXPipeline(
        scheduler=parts.flow_euler(),
        vae=AutoencoderKLLTXVideo(
            latent_channels=channels,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=T5EncoderModel(T5Config(**_t5())).eval(),
        tokenizer=texts.tokenizer(),
        transformer=LTXVideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=4,
            attention_head_dim=WIDTH // 4,
            cross_attention_dim=WIDTH,
            num_layers=NUM_LAYERS,
            caption_channels=TEXTS,
        ),
    )


def _t5() -> dict[str, Any]:
    return {**texts._t5(TEXTS, texts.VOCABULARY), "d_kv": 32, "d_ff": 4 * TEXTS, "num_layers": 2}


def allocated() -> int:
    """The bytes of the tensors on the GPU, without the workspaces that cuBLAS keeps for each thread."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@contextmanager
def loaded(
    folder: Path, offload: str = "none", dtype: str = "bfloat16", **settings: Any
) -> Iterator[tuple[Engine, int]]:
    """An engine with these settings, and the bytes of its weights on the GPU, which are free when it is closed."""
    before = allocated()
    own = DiffusersSettings(**settings)
    given = {"name": "diffusers", "model": str(folder), "device": DEVICE, "offload": offload, "dtype": dtype}
    engine = create_engine(EngineSettings.model_validate({**given, "diffusers": own}))
    engine.load()
    weights = allocated() - before
    try:
        yield engine, weights
    finally:
        engine.close()
    assert allocated() - before < weights / 100  # compiled code keeps a few numbers


@dataclass(frozen=True, repr=False)
class Made:
    """What one engine made: two videos, and the bytes of its weights."""

    first: UInt8Array
    second: UInt8Array
    weights: int

    def __repr__(self) -> str:
        return f"{self.weights} bytes of weights"


def made_by(folder: Path, offload: str = "none", dtype: str = "bfloat16", **settings: Any) -> Made:
    """Of two that take turns, each is what it is alone."""
    with loaded(folder, offload, dtype, **settings) as (engine, weights):
        alone = [frames_of(make_all(engine, seed=seed)) for seed in (3, 4)]
        turns = list(zip(begin(engine, seed=3), begin(engine, seed=4), strict=True))
        for video, outputs in zip(alone, zip(*turns, strict=True), strict=True):
            assert np.array_equal(frames_of(list(outputs)), video)
    return Made(alone[0], alone[1], weights)


def distance(one: Made, other: Made) -> float:
    """The mean of the differences of the pixels of their first videos, in levels of 256."""
    return _distance(one.first, other.first)


def _distance(one: UInt8Array, other: UInt8Array) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@dataclass(frozen=True)
class Plain:
    """A family's model as it is, in bfloat16.

    ``noise`` is what bfloat16 alone does to a pixel, compared with float32; ``spread`` is how far videos are apart that
    have nothing in common but the model.
    """

    folder: Path
    made: Made
    noise: float
    spread: float


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Plain]:
    """Of a family, by its name."""

    @cache
    def plain(family: str) -> Plain:
        torch.manual_seed(7)
        folder = saved({"wan": wan, "ltx": ltx}[family](), tmp_path_factory.mktemp(family))
        made = made_by(folder)
        spread = _distance(made.first, made.second)
        return Plain(folder, made, distance(made, made_by(folder, dtype="float32")), spread)

    return plain


# Round a weight (rows, columns) float32 to the numbers of a quantiser.
Round = Callable[[Tensor], Tensor]


def round_int8(weight: Tensor) -> Tensor:
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def round_fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def round_nf4(weight: Tensor) -> Tensor:
    """The steps are those of the library."""
    from bitsandbytes import functional

    numbers, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4")
    restored: Tensor = functional.dequantize_4bit(numbers, state)
    return restored


def round_gguf(weight: Tensor) -> Tensor:
    import gguf

    if weight.shape[1] % GGUF_BLOCK:
        return weight
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))


ROUND = {
    "torchao_int8": round_int8,
    "torchao_fp8": round_fp8,
    "bitsandbytes_8bit": round_int8,
    "bitsandbytes_4bit": round_nf4,
    "gguf": round_gguf,
}


def rounded(folder: Path, kind: str, parts: Sequence[str], made: Path) -> float:
    """Save the model again with its layers rounded, from bfloat16. Returns how far a weight is from what it was, as a
    part of it: the root of the mean square."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    changed, all_of_it = 0.0, 0.0
    with torch.no_grad():
        for name in parts:
            for layer in layers_of(getattr(pipeline, name)).values():
                before = layer.weight.bfloat16().float()
                layer.weight.copy_(ROUND[kind](before))
                changed += float((layer.weight - before).square().sum())
                all_of_it += float(before.square().sum())
    saved(pipeline, made)
    return (changed / all_of_it) ** 0.5


def layers_of(network: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are quantised, by their names; the library keeps some in float32."""
    keeps = getattr(network, "_keep_in_fp32_modules", None) or ()
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in linear.items() if not any(kept in name for kept in keeps)}


def saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    (folder / "kinema.json").write_text(json.dumps({"size": "96x64", "num_frames": 9}))
    return folder


def assert_equal(one: Made, other: Made) -> None:
    are_equal = np.array_equal(one.first, other.first) and np.array_equal(one.second, other.second)
    assert are_equal, f"their pixels are {distance(one, other)} levels apart"


def assert_near(made: Made, plain: Plain, error: float) -> None:
    """A relative error of the weights is at most that of what the model adds to noise, times the root of its depth."""
    assert 0 < distance(made, plain.made) <= 2 * plain.noise + DEPTH * error * plain.spread


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_weights(family: str, quantiser: str, plain: Callable[[str], Plain], tmp_path: Path) -> None:
    """They take less memory, and the video is near to the plain one, and is that of a plain model with the same rounded
    weights, but for what bfloat16 does. bitsandbytes_8bit rounds what comes into a layer, too."""
    usual = plain(family)
    error = rounded(usual.folder, quantiser, ("transformer", "text_encoder"), tmp_path)
    made = made_by(usual.folder, quantization=quantiser)
    share = SHARE_OF_4_BITS if quantiser == "bitsandbytes_4bit" else SHARE_OF_8_BITS
    assert made.weights / usual.made.weights < share
    assert_near(made, usual, error)
    if quantiser != "bitsandbytes_8bit":
        assert distance(made, made_by(tmp_path)) <= 2 * usual.noise


@pytest.mark.parametrize("offload", ["text", "blocks", "networks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_the_host(family: str, offload: str, plain: Callable[[str], Plain]) -> None:
    """The same bits, from less memory."""
    usual = plain(family)
    made = made_by(usual.folder, offload)
    assert_equal(made, usual.made)
    assert made.weights / usual.made.weights < (1 if offload == "text" else 0.5)


@pytest.mark.parametrize("row", SERVED, ids=[row.name for row in SERVED])
def test_every_family_makes_the_same_video_with_an_offload(row: Family) -> None:
    """Bit for bit, beside another one that is closed in the middle, and twice."""
    name = MODES[row.name]
    request, inputs = request_for(row, name, seed=3), inputs_for(request_for(row, name, seed=3), name)
    other = request.model_copy(update={"seed": 4})
    model = Model(row.name, Path(), {"_class_name": row.pipelines[0]}, row, {}, flow_shift=1.0)
    made = {}
    for offload in ("none", "text", "blocks", "networks"):
        engine = DiffusersEngine(
            model, DEVICE, "float32", savings=Savings(offload), load_pipeline=lambda *_: make(row.name)
        )
        engine.load()
        closed, first, second = (engine.generate(one, inputs) for one in (other, request, request))
        outputs = [next(closed), next(first), next(closed)][1:2]
        closed.close()
        outputs += list(first)
        made[offload] = frames_of(outputs)
        assert np.array_equal(frames_of(list(second)), made[offload])
        engine.close()
    assert made["none"].any()
    assert [way for way, frames in made.items() if not np.array_equal(frames, made["none"])] == []


@pytest.mark.parametrize("offload", ["text", "blocks", "networks"])
def test_loras_with_an_offload(offload: str, tmp_path: Path) -> None:
    """Their adapters come and go with their networks, also when they were added after these had come."""
    make_lora(tmp_path / "paper.safetensors", 1)
    model = Model(LORA_ROW.name, Path(), {"_class_name": LORA_ROW.pipelines[0]}, LORA_ROW, {}, flow_shift=1.0)
    requests = [asked(tmp_path, **scales) for scales in ({}, {"paper": 0.7}, {}, {"paper": -0.4})]
    made = []
    for way in ("none", offload):
        engine = DiffusersEngine(
            model,
            DEVICE,
            "float32",
            savings=Savings(way),
            loras=LoraLibrary(tmp_path, None),
            load_pipeline=lambda *_: make(LORA_ROW.name),
        )
        engine.load()
        together = zip(*map(engine.generate, requests), strict=True)
        made.append([frames_of(list(outputs)) for outputs in zip(*together, strict=True)])
        engine.close()
    plain, with_lora, again, other = made[0]
    assert np.array_equal(plain, again)
    assert not np.array_equal(plain, with_lora)
    assert not np.array_equal(with_lora, other)
    assert all(np.array_equal(one, another) for one, another in zip(*made, strict=True))


@pytest.mark.parametrize("offload", ["text", "blocks", "networks"])
@pytest.mark.parametrize("quantiser", ["torchao_int8", "torchao_fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_weights_in_the_host(
    family: str, quantiser: str, offload: str, plain: Callable[[str], Plain]
) -> None:
    """The same bits, from less memory."""
    folder = plain(family).folder
    resident, offloaded = (made_by(folder, way, quantization=quantiser) for way in ("none", offload))
    assert_equal(offloaded, resident)
    assert offloaded.weights / resident.weights < (1 if offload == "text" else 0.5)


@pytest.mark.parametrize("quantiser", ["bitsandbytes_8bit", "bitsandbytes_4bit"])
def test_bitsandbytes_stays_on_the_gpu(quantiser: str, plain: Callable[[str], Plain]) -> None:
    """An offload is refused at the start; auto is none."""
    folder = plain("ltx").folder
    with pytest.raises(ConfigError, match=r"not with engine\.offload = 'blocks'"):
        made_by(folder, "blocks", quantization=quantiser)
    with loaded(folder, "auto", quantization=quantiser) as (engine, weights):
        assert weights > 0
        assert frames_of(make_all(engine)).any()


@pytest.mark.parametrize(
    ("offload", "settings"),
    [
        ("none", {}),
        ("blocks", {}),
        ("networks", {}),
        ("none", {"quantization": "torchao_int8"}),
        ("none", {"quantization": "torchao_fp8"}),
        ("networks", {"quantization": "torchao_int8"}),
        ("networks", {"quantization": "torchao_fp8"}),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks(family: str, offload: str, settings: dict[str, str], plain: Callable[[str], Plain]) -> None:
    """They compute what those do that are not compiled, but for what bfloat16 does."""
    usual = plain(family)
    expected = made_by(usual.folder, **settings) if settings else usual.made
    assert distance(made_by(usual.folder, offload, compile=True, **settings), expected) <= 2 * usual.noise


def tensors_of(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The transformer of a folder: its file and its tensors."""
    from safetensors.torch import load_file

    (file,) = (folder / "transformer").glob("*.safetensors")
    return file, load_file(file)


@pytest.mark.parametrize("offload", ["none", "blocks", "networks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformer_in_a_safetensors_file(
    family: str, offload: str, plain: Callable[[str], Plain], tmp_path: Path
) -> None:
    """It makes the bits of the folder that has the same one; the folder named has another."""
    usual = plain(family)
    file, tensors = tensors_of(usual.folder)
    other = shutil.copytree(usual.folder, tmp_path / "other")
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, other / "transformer" / file.name)
    made = made_by(other, offload, transformer=file)
    assert_equal(made, usual.made)


@pytest.mark.parametrize(
    ("offload", "is_compiled"), [("none", False), ("blocks", False), ("networks", False), ("none", True)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformer_in_a_gguf_file(
    family: str, is_compiled: bool, offload: str, plain: Callable[[str], Plain], tmp_path: Path
) -> None:
    """Its blocks take less memory, and its video is that of the numbers that they stand for."""
    usual = plain(family)
    file = gguf_of(usual.folder, tmp_path / "model.gguf")
    error = rounded(usual.folder, "gguf", ("transformer",), tmp_path / "rounded")
    made = made_by(usual.folder, offload, transformer=file, compile=is_compiled)
    assert made.weights / usual.made.weights < SHARE_OF_8_BITS
    assert_near(made, usual, error)
    assert distance(made, made_by(tmp_path / "rounded")) <= 2 * usual.noise


def gguf_of(folder: Path, file: Path) -> Path:
    """A file of Q8_0 with the layers that ``rounded`` rounds, and all other tensors as they are."""
    import diffusers
    import gguf

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    layers = {f"{name}.weight" for name in layers_of(pipeline.transformer)}
    writer, kind = gguf.GGUFWriter(file, "video"), gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors_of(folder)[1].items():
        if name in layers and tensor.shape[1] % GGUF_BLOCK == 0:
            writer.add_tensor(name, gguf.quants.quantize(tensor.bfloat16().float().numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
