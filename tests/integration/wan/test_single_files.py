"""A transformer in a file of its own gives the weights and the videos of the folder that it stands for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinema.engines.base import Engine, Frames
from kinema.engines.registry import create_engine, find_checkpoint
from kinema.engines.wan import tensors, weights_cache
from kinema.engines.wan.checkpoint import Checkpoint, inspect
from kinema.engines.wan.engine import WanEngine
from kinema.engines.wan.fingerprint import weights_digest
from kinema.engines.wan.gguf_header import BLOCKS
from kinema.engines.wan.loading import load_transformers
from kinema.engines.wan.lora.keys import normal
from kinema.engines.wan.single_file import config_of, names_of_file, read_transformer
from kinema.engines.wan.transformer.network import dtype_of
from kinema.engines.wan.transformer.shapes import shapes
from kinema.errors import ConfigError
from kinema.request.options import GenerationOptions
from kinema.request.resolve import resolve
from kinema.settings import EngineSettings, WanSettings
from tests.integration.wan.random_checkpoints import save_two_experts, save_wan21

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
FEW = GenerationOptions(prompt="a red circle", size="64x64", num_frames=5, num_inference_steps=2, seed=3)
OUTSIDE = [
    "patch_embedding",
    *("time_embedding.0", "time_embedding.2", "time_projection.1", "text_embedding.0", "text_embedding.2", "head.head"),
]
LAYERS = [f"{part}_attn.{layer}" for part in ("self", "cross") for layer in "qkvo"] + ["norm3", "ffn.0", "ffn.2"]
NORMS = [f"{part}_attn.norm_{which}.weight" for part in ("self", "cross") for which in "qk"]
IMAGE_LAYERS = [f"img_emb.proj.{number}" for number in (0, 1, 3, 4)]
IMAGE_LAYERS_OF_BLOCKS = ["cross_attn.k_img", "cross_attn.v_img"]


def original_names(num_blocks: int, *, has_image: bool = False) -> list[str]:
    """Every tensor of Wan's own WanModel."""
    outside = OUTSIDE + (IMAGE_LAYERS if has_image else [])
    layers = LAYERS + (IMAGE_LAYERS_OF_BLOCKS if has_image else [])
    single = [*NORMS, "modulation", *(["cross_attn.norm_k_img.weight"] if has_image else [])]
    blocks = [f"blocks.{number}." for number in range(num_blocks)]
    return [
        "head.modulation",
        *(f"{layer}.{kind}" for layer in outside for kind in ("weight", "bias")),
        *(f"{block}{layer}.{kind}" for block in blocks for layer in layers for kind in ("weight", "bias")),
        *(block + name for block in blocks for name in single),
    ]


def in_original_names(tensors_: dict[str, Tensor], num_blocks: int, prefix: str = "") -> dict[str, Tensor]:
    names = names_of_file(original_names(num_blocks))
    assert sorted(names.values()) == sorted(tensors_)
    return {prefix + old: tensors_[new] for old, new in names.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("has_image", [False, True])
def test_names_are_those_of_diffusers(prefix: str, has_image: bool) -> None:
    """Each of Wan's own names becomes what diffusers' conversion makes of it, also those of image-to-video."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = [prefix + name for name in original_names(12, has_image=has_image)]
    ours = names_of_file(names)
    theirs = convert_wan_transformer_to_diffusers({name: torch.tensor(place) for place, name in enumerate(names)})
    assert {ours[name]: place for place, name in enumerate(names)} == {k: int(v) for k, v in theirs.items()}
    how: dict[str, Any] = {"image_dim": 8, "added_kv_proj_dim": 24} if has_image else {}
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8, num_layers=12, **how
        )
    assert sorted(ours.values()) == sorted(model.state_dict())
    assert names_of_file(ours.values()) == {name: name for name in ours.values()}
    # A LoRA for either name is one for the same module.
    for name, new in ours.items():
        module, _, kind = name.removeprefix(prefix).rpartition(".")
        if kind == "weight":
            assert normal(module) == normal(new.removesuffix(".weight"))


@pytest.mark.parametrize("has_positions", [False, True], ids=["one picture", "two pictures"])
def test_a_file_says_what_it_knows_of_pictures(has_positions: bool, tmp_path: Path) -> None:
    """By Wan's own names and by those of diffusers, whose conversion does not know the positions of two pictures."""
    from diffusers import WanTransformer3DModel

    config: dict[str, Any] = {"image_dim": 10, "added_kv_proj_dim": 128, "ffn_dim": 8, "num_layers": 1, "text_dim": 6}
    config |= {"num_attention_heads": 1, "freq_dim": 4, "pos_embed_seq_len": 6 if has_positions else None}
    whole = WanTransformer3DModel(**config).state_dict()
    names = names_of_file([*original_names(1, has_image=True), *(["img_emb.emb_pos"] if has_positions else [])])
    for kind, found in (("wan", {old: whole[new] for old, new in names.items()}), ("diffusers", whole)):
        file = tmp_path / f"{kind}.safetensors"
        save_file(found, file)
        stored = read_transformer(file, "engine.wan.transformer")
        made = config_of(stored, None, "the file")
        assert {name: getattr(made, name) for name in config} == config
        assert shapes(made) == stored


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_wan21(tmp_path / "model")


def weights_of(folder: Path, name: str = "transformer") -> dict[str, Tensor]:
    return load_file(folder / name / WEIGHTS)


def loaded(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    return [weights.tensors for weights in load_transformers(checkpoint, CPU, dtype)]


def assert_loads(checkpoint: Checkpoint, *expected: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """In the types that the engine has them in, and with these bits."""
    for found, wanted in zip(loaded(checkpoint, dtype), expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, wanted[name].to(dtype_of(name, dtype))), name


def with_file(folder: Path, file: Path) -> Checkpoint:
    return inspect(str(folder), files={"transformer": file})


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", ["diffusers", "wan", "comfy"])
def test_a_file_has_the_weights_of_a_folder(names: str, kind: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """By diffusers' names, Wan's own, and ComfyUI's; the folder's own weights need not be there."""
    whole = {name: tensor.to(kind) for name, tensor in weights_of(folder).items()}
    prefix = "model.diffusion_model." if names == "comfy" else ""
    file = tmp_path / "other.safetensors"
    save_file(whole if names == "diffusers" else in_original_names(whole, 2, prefix), file)
    (folder / "transformer" / WEIGHTS).unlink()
    assert_loads(with_file(folder, file), whole)
    assert_loads(with_file(folder, file), whole, dtype=torch.bfloat16)


def as_fp8(whole: dict[str, Tensor], scale_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file as ComfyUI's scripts write it, and its weights restored by hand."""
    file: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    restored = {}
    for name, tensor in in_original_names(whole, 2).items():
        if not (name.startswith("blocks.") and tensor.dim() == 2):
            file[name] = restored[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        file[name] = (tensor / scale).to(torch.float8_e4m3fn)
        file[name.replace(".weight", f".{scale_name}")] = scale
        file[name.replace(".weight", ".input_scale")] = torch.ones(1)
        restored[name] = file[name].float() * scale
    return file, {new: restored[old] for old, new in names_of_file(restored).items()}


@pytest.mark.parametrize("piece_bytes", [100, tensors._PIECE_BYTES])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_fp8_is_restored_by_its_scales(
    scale_name: str, piece_bytes: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scale for each weight; rounded once to the engine's type, whatever the pieces that are read."""
    monkeypatch.setattr(tensors, "_PIECE_BYTES", piece_bytes)
    file, restored = as_fp8(weights_of(folder), scale_name)
    save_file(file, tmp_path / "fp8.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        assert_loads(with_file(folder, tmp_path / "fp8.safetensors"), restored, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("blocks.0.ffn.0.scale_weight", None, "ffn.net.0.proj.weight is of torch.float8_e4m3fn and has no scale"),
        ("blocks.0.ffn.0.scale_weight", torch.ones(48, 1), "blocks.0.ffn.0.scale_weight is no scale of a whole weight"),
        ("blocks.0.ffn.0.scale_weight", torch.tensor(float("nan")), "is nan, and a scale is a number above 0"),
        ("blocks.9.ffn.0.scale_weight", torch.tensor(1.0), "blocks.9.ffn.0.scale_weight is the scale of no weight"),
    ],
)
def test_fp8_without_a_right_scale_is_refused(
    name: str, value: Tensor | None, sentence: str, folder: Path, tmp_path: Path
) -> None:
    """Its numbers would mean something else."""
    file = as_fp8(weights_of(folder), "scale_weight")[0]
    save_file(
        {**{k: v for k, v in file.items() if k != name}, **({} if value is None else {name: value})}, tmp_path / "f"
    )
    (tmp_path / "f").rename(tmp_path / "fp8.safetensors")
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        loaded(with_file(folder, tmp_path / "fp8.safetensors"))


def write_gguf(path: Path, arrays: Iterable[tuple[str, np.ndarray, GGMLQuantizationType]]) -> None:
    writer = GGUFWriter(path, "wan")
    writer.add_file_type(7)
    writer.add_array("general.tags", ["text-to-video"] * 3)
    for name, array, kind in arrays:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks_of(shape: tuple[int, int], kind: GGMLQuantizationType) -> np.ndarray:
    """Random blocks, whose scales are numbers: the package quantises to few types."""
    in_block, size = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(5).integers(0, 256, (shape[0] * shape[1] // in_block, size), dtype=np.uint8)
    scales = {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind.name, (0,))
    for place in scales:
        raw[:, place : place + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return raw.reshape(shape[0], -1)


def as_gguf(path: Path, whole: dict[str, Tensor], num_blocks: int, kind: GGMLQuantizationType) -> dict[str, Tensor]:
    """A file as ComfyUI's converter writes it; returns its weights, restored as a whole by the package."""
    arrays, restored = [], {}
    for name, tensor in in_original_names(whole, num_blocks).items():
        array = tensor.float().numpy()
        is_large = name.startswith("blocks.") and tensor.dim() == 2
        own = kind if is_large else GGMLQuantizationType.F32
        if is_large:
            array = blocks_of((array.shape[0], array.shape[1]), kind) if "_K" in kind.name else quantize(array, kind)
        elif name.endswith("modulation"):
            array = array[0]  # GGUF has no first dimensions of 1
        arrays.append((name, array, own))
        restored[name] = torch.from_numpy(dequantize(array, own).reshape(tensor.shape).copy())
    write_gguf(path, arrays)
    return {new: restored[old] for old, new in names_of_file(restored).items()}


KINDS = ["Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"]


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_is_restored(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every type has the numbers that the package restores from the whole tensor. No more than a piece is restored at
    a time."""
    piece_bytes = 50_000
    monkeypatch.setattr(tensors, "_PIECE_BYTES", piece_bytes)
    restore, sizes = tensors._restored, [0]

    def noted(raw: Tensor, blocks: str) -> Tensor:
        values = restore(raw, blocks)
        sizes.append(values.nbytes)
        return values

    monkeypatch.setattr(tensors, "_restored", noted)
    model = inspect("tiny-wan")
    file = tmp_path / "tiny.gguf"
    restored = as_gguf(file, weights_of(model.path), model.transformer.num_layers, GGMLQuantizationType[kind])
    assert_loads(inspect("tiny-wan", files={"transformer": file}), restored, dtype=torch.bfloat16)
    assert max(sizes) <= piece_bytes
    assert (len(sizes) > 1) == ("Q" in kind)


def test_blocks_are_those_of_the_format() -> None:
    """Their sizes are the package's; and Q8_0, restored without it, is a scale times whole numbers."""
    assert {name: GGML_QUANT_SIZES[GGMLQuantizationType[name]] for name in BLOCKS} == BLOCKS
    raw = quantize(np.random.default_rng(1).standard_normal((4, 64), dtype=np.float32), GGMLQuantizationType.Q8_0)
    blocks = raw.reshape(-1, 34)
    by_hand = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
    assert np.array_equal(tensors._restored(torch.from_numpy(raw.reshape(-1)), "Q8_0").numpy(), by_hand.reshape(-1))


def test_a_shape_that_the_converter_flattened_is_restored(folder: Path, tmp_path: Path) -> None:
    """GGUF's programs know four dimensions, so the patch embedding may be flat, with its shape beside it."""
    whole = weights_of(folder)
    writer = GGUFWriter(tmp_path / "flat.gguf", "wan")
    for name, tensor in in_original_names(whole, 2).items():
        is_patch = tensor.dim() == 5
        if is_patch:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
        writer.add_tensor(name, (tensor.flatten() if is_patch else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_loads(with_file(folder, tmp_path / "flat.gguf"), whole)


def test_each_expert_has_its_file(tmp_path: Path) -> None:
    """Either of them, or both; a model with one transformer has no second file."""
    folder = save_two_experts(tmp_path / "model")
    first, second = weights_of(folder), weights_of(folder, "transformer_2")
    for name, whole in (("high", second), ("low", first)):  # exchanged
        save_file(in_original_names(whole, 2), tmp_path / f"{name}.safetensors")
    high, low = tmp_path / "high.safetensors", tmp_path / "low.safetensors"
    assert_loads(inspect(str(folder), files={"transformer": high, "transformer_2": low}), second, first)
    assert_loads(inspect(str(folder), files={"transformer_2": low}), first, first)
    with pytest.raises(ConfigError, match=r"engine\.wan\.transformer_2 = .* is for a model with two experts"):
        inspect("tiny-wan", files={"transformer_2": low})


def film(engine: Engine) -> np.ndarray:
    engine.load()
    request = resolve(FEW, engine.capabilities).request
    frames = [output.data for output in engine.generate(request) if isinstance(output, Frames)]
    engine.close()
    return np.concatenate(frames)


def copy_with(whole: dict[str, Tensor], folder: Path) -> Path:
    """The bundled model with other weights in its transformer's folder."""
    shutil.copytree(inspect("tiny-wan").path, folder)
    save_file(whole, folder / "transformer" / WEIGHTS)
    return folder


def test_the_video_is_that_of_the_folder(tmp_path: Path) -> None:
    """From bf16 weights by Wan's own names, and from GGUF; other weights give another video."""
    whole = weights_of(inspect("tiny-wan").path)
    save_file(in_original_names(whole, 6), tmp_path / "own.safetensors")
    restored = as_gguf(tmp_path / "q4.gguf", whole, 6, GGMLQuantizationType.Q4_0)

    def made(model: str, transformer: str | None = None) -> np.ndarray:
        file = None if transformer is None else tmp_path / transformer
        return film(create_engine(EngineSettings(model=model, wan=WanSettings(transformer=file), device="cpu")))

    plain, rounded = made("tiny-wan"), made(str(copy_with(restored, tmp_path / "copy")))
    assert np.array_equal(made("tiny-wan", "own.safetensors"), plain)
    assert np.array_equal(made("tiny-wan", "q4.gguf"), rounded)
    assert not np.array_equal(plain, rounded)


@pytest.mark.usefixtures("forked_ranks")
def test_other_ranks_read_the_file_too(tmp_path: Path) -> None:
    """Two processes that share the passes of guidance make the video of one."""
    as_gguf(tmp_path / "q8.gguf", weights_of(inspect("tiny-wan").path), 6, GGMLQuantizationType.Q8_0)
    checkpoint = inspect("tiny-wan", files={"transformer": tmp_path / "q8.gguf"})
    alone = film(WanEngine(checkpoint, device="cpu"))
    assert np.array_equal(film(WanEngine(checkpoint, device="cpu", gpus=2, parallel="cfg")), alone)


def test_the_digest_of_the_weights_is_that_of_the_file(folder: Path, tmp_path: Path) -> None:
    """Another file is another model, wherever it lies and whatever its name; the folder's own weights do not count."""
    whole = weights_of(folder)
    one, same, other = (tmp_path / f"{name}.safetensors" for name in ("one", "same", "other"))
    save_file(whole, one)
    same.write_bytes(one.read_bytes())
    save_file({**whole, "proj_out.bias": whole["proj_out.bias"] + 1}, other)
    digest = weights_digest(with_file(folder, one))
    assert digest == weights_digest(with_file(folder, same))
    assert len({digest, weights_digest(with_file(folder, other)), weights_digest(inspect(str(folder)))}) == 3
    (folder / "transformer" / WEIGHTS).unlink()
    assert weights_digest(with_file(folder, one)) == digest


def test_a_manifest_names_the_package_that_restored(tmp_path: Path) -> None:
    """Another version of it may give other numbers."""
    as_gguf(tmp_path / "q8.gguf", weights_of(inspect("tiny-wan").path), 6, GGMLQuantizationType.Q8_0)
    for files, has_gguf in (({"transformer": tmp_path / "q8.gguf"}, True), ({}, False)):
        engine = WanEngine(inspect("tiny-wan", files=files), device="cpu")
        engine.load()
        assert ("gguf" in engine.facts.versions) is has_gguf
        engine.close()


def test_a_large_file_has_a_copy_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file has its own, and it has the same weights."""
    monkeypatch.setattr(weights_cache, "_LEAST_SAVING_BYTES", 1)
    whole = weights_of(folder)
    other = {name: tensor + 1 for name, tensor in whole.items()}
    save_file(whole, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    for name, expected in (("a", whole), ("b", other), ("a", whole)):
        checkpoint = replace(with_file(folder, tmp_path / f"{name}.safetensors"), cache=tmp_path / "cache")
        assert_loads(checkpoint, expected, dtype=torch.bfloat16)
    assert len(list((tmp_path / "cache").glob("model.transformer.*.safetensors"))) == 2


def test_the_network_is_read_from_a_file_whose_folder_says_nothing(tmp_path: Path) -> None:
    """Its shapes say all but the width of the heads, which is 128 in every published model."""
    folder = copy_with(weights_of(inspect("tiny-wan").path), tmp_path / "copy")
    save_file(in_original_names(weights_of(folder), 6), tmp_path / "own.safetensors")
    said = inspect(str(folder)).transformer
    shutil.rmtree(folder / "transformer")
    found = with_file(folder, tmp_path / "own.safetensors").transformer
    assert (found.num_attention_heads, found.attention_head_dim) == (2, 128)
    kept = {"num_attention_heads": 8, "attention_head_dim": 32, "rope_max_seq_len": said.rope_max_seq_len}
    assert found.model_copy(update=kept) == said


def cut_short(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in whole.items() if not name.startswith("blocks.1.")}


def wider(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "blocks.0.ffn.net.0.proj.weight"
    patches = whole["patch_embedding.weight"]
    return {**whole, name: torch.zeros(64, 24), "patch_embedding.weight": torch.cat([patches, patches], dim=1)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (cut_short, "does not fit the transformer's config.json: num_layers is 1 and not 2"),
        (wider, "config.json: ffn_dim is 64 and not 48, in_channels is 8 and not 4"),
        (lambda _: {"decoder.conv.weight": torch.zeros(3)}, "is no Wan transformer: it has no tensor patch_embedding"),
        (
            lambda _: {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(3)},
            "is a LoRA, which this engine does not read",
        ),
        (lambda whole: {**whole, "blocks.0.attn1.to_q.weight.absmax": torch.zeros(3)}, "quantised by bitsandbytes"),
        (lambda whole: {**whole, "blocks.0.attn1.to_q.qweight": torch.zeros(3)}, "by AWQ, GPTQ or nunchaku"),
        (lambda whole: {**whole, "blocks.0.attn1.to_q.wscales": torch.zeros(3)}, "is quantised by nunchaku"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], sentence: str, folder: Path, tmp_path: Path
) -> None:
    """By one sentence with the difference, before a weight is read."""
    file = tmp_path / "other.safetensors"
    save_file(change(weights_of(folder)), file)
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        find_checkpoint(EngineSettings(model=str(folder), wan=WanSettings(transformer=file)))
    assert f"engine.wan.transformer = {str(file)!r}" in str(caught.value)


def test_a_tensor_by_two_names_is_refused(folder: Path, tmp_path: Path) -> None:
    """Nobody knows which one is meant."""
    whole = in_original_names(weights_of(folder), 2)
    save_file(
        {**whole, "model.diffusion_model.head.head.bias": whole["head.head.bias"] + 1}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ConfigError, match=r"transformer has proj_out\.bias twice"):
        loaded(with_file(folder, tmp_path / "a.safetensors"))
